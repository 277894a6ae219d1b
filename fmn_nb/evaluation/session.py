"""A session: what all measurements of one model share, from its judge and its names to how images are drawn.

Each image has a seed of its own and is drawn in batches of one size: on a CPU, the last bits of a convolution depend on
how many images go through it together, and single pixels then differ by one of 255 levels. So each call of the pipeline
draws the same number of images, and the last one is filled up. Then neither order nor interruption can change an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin

from fmn_nb.concepts import Concept, JudgeLike, NotThereError, Vocabulary, World, world_of
from fmn_nb.evaluation.checkpoints import CheckpointWorld
from fmn_nb.evaluation.measures import check_image, judge_images
from fmn_nb.evaluation.protocol import Drawing, drawings, evenly, repeated
from fmn_nb.files import one_at_a_time, replacing
from fmn_nb.models import GUIDANCE, STEPS, Images, SeedOffset, borrowed, denoiser, drawing_key, generate, load_images
from fmn_nb.patches import Patch

SMALL_BATCH, LARGE_BATCH = 24, 4
PATIENCE = 60  # seconds to wait for another process that draws with the same model; then both draw
LARGE = 10**8  # parameters of the denoiser
_TEXT = "fmn-drawing"  # key of the PNG text that says what an image is

Progress = Callable[[int, int], None]


class MeasurementError(ValueError):
    """It can't be measured as asked: there is no judge, there are too few references, or a prompt lacks the concept."""


@dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    Attributes:
        steps, guidance: the sampling steps and the guidance scale of each image.
        batch: how many images each call of the pipeline draws; by default 24, for large models 4.
        cache: a folder that keeps drawn images, see `draw_images`.
        progress: called with the numbers of finished images and of all.
    """

    steps: int = STEPS
    guidance: float = GUIDANCE
    batch: int | None = None
    cache: str | Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Session:
    """A model that is measured, its world, its judge, and how its images are drawn.

    Attributes:
        pipe: the base model; `patched` is a context with the forgetting model.
        world: names, prompts, real images; a `CheckpointWorld` for a model that belongs to no world.
        judge: the judge that was given, or None for the world's own.
    """

    pipe: DiffusionPipeline
    world: World
    judge: JudgeLike | None = None
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, pipe: DiffusionPipeline | Session, judge: JudgeLike | None = None, **sampling: object) -> Session:
        """The session of a pipeline in its own world, `sampling` as in `Sampling`; a session stays itself."""
        if isinstance(pipe, Session):
            return pipe
        return cls(pipe, world_of(pipe) or CheckpointWorld(), judge, Sampling(**sampling))

    @property
    def vocabulary(self) -> Vocabulary:
        """The world's names."""
        return self.world.vocabulary

    def judge_for(self, concept: Concept) -> JudgeLike:
        """The judge of this concept: the given one, or the world's; NotThereError, with the reason, without one."""
        return self.judge or self.world.judge_for(concept)

    def patched(self, patch: Patch | None) -> AbstractContextManager[None]:
        """Context with the forgetting model: the pipe with the patch, or as it is without one."""
        return nullcontext() if patch is None else patch.applied(self.pipe)

    def check_fits(self, patch: Patch | None) -> None:
        """Raise a PatchMismatchError for a patch of another model, before hours go into drawing without it."""
        if patch is not None:
            patch.check_fits(self.pipe, force=False)

    def draw(self, wanted: Sequence[Drawing]) -> list[Image.Image]:
        """One image for each, in order (`draw_images`)."""
        return draw_images(self.pipe, wanted, **vars(self.sampling))

    def judged(self, concept: Concept, wanted: Sequence[Drawing], prompts: Sequence[str] | None = None) -> pd.DataFrame:
        """Draw and judge (`judge_images`); `prompts` are drawn in the drawings' own places.

        Raises:
            MeasurementError: there is no judge.
        """
        judge = self.judge_now(concept)
        with borrowed(self.pipe):
            images = generate(self.pipe, list(prompts or [d.prompt for d in wanted]), [d.seed for d in wanted],
                              steps=self.sampling.steps, guidance=self.sampling.guidance,
                              batch=self.sampling.batch or images_at_once(self.pipe))
        return judge_images(judge, concept, wanted, images, self.vocabulary)

    def judge_now(self, concept: Concept) -> JudgeLike:
        """The judge of this concept; MeasurementError, which says what to give, if there is none."""
        try:
            return self.judge_for(concept)
        except NotThereError as missing:
            raise MeasurementError(f"nobody judges whether {concept.name!r} is seen: give a judge, "
                                   f"Session.of(pipe, judge=...), such as a ClipJudge ({missing})") from missing

    def shows(self, concept: Concept, wanted: Sequence[Drawing], images: Sequence[Image.Image],
              judge: JudgeLike | None = None, anywhere: bool = False) -> pd.Series:
        """For each of these images, drawn for the drawings, whether the judge (or another) sees the concept in it;
        `anywhere`: also where something else stands out more."""
        outcomes = judge_images(judge or self.judge_now(concept), concept, wanted, images, self.vocabulary)
        return ~outcomes["gone" if anywhere else "right"].astype(bool)

    def seen(self, concept: Concept, wanted: Sequence[Drawing], prompts: Sequence[str] | None = None) -> pd.Series:
        """For each drawing, whether the judge sees the concept in it; `prompts` are drawn in the drawings' places."""
        return ~self.judged(concept, wanted, prompts)["right"].astype(bool)

    def fresh_drawings(self, concept: Concept, count: int, seed: int) -> list[Drawing]:
        """`count` drawings that name the concept, evenly spread over the forget set's prompts, each with its own seed.

        They are drawn with other seeds than the evaluation's, so that an attack isn't judged on images that chose it.
        """
        if count < 1:
            raise MeasurementError(f"at least one image is needed, not {count}")
        forget = [d for d in drawings(concept, self.vocabulary, seed) if d.role == "forget"]
        prompts = evenly(list({d.prompt: d for d in forget}.values()), count)
        rounds = -(-count // len(prompts))
        many = repeated(prompts, rounds, seed + SeedOffset.ATTACK_IMAGES)
        return [many[p * rounds + r] for r in range(rounds) for p in range(len(prompts))][:count]

    def references(self, concept: Concept, given: Images | None, count: int, seed: int) -> list[Image.Image]:
        """Images of the concept: the first `count` of the given ones, or else real ones of the world.

        Raises:
            MeasurementError: fewer than `count` were given, or none and the world has none.
            ReferenceImageError: one can't be read.
        """
        if given is not None:
            images = load_images(given)
            if len(images) < count:
                raise MeasurementError(f"{len(images)} references were given but {count} are to be used: give more, or "
                                       "ask for fewer (references=... of the budget)")
            return images[:count]
        try:
            real = self.world.real_images(self.fresh_drawings(concept, count, seed))
        except NotThereError as missing:
            raise MeasurementError(f"give references: this model's world has no real images of {concept.name} "
                                   f"({missing})") from missing
        return [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in real]


def draw_images(pipe: DiffusionPipeline, wanted: Sequence[Drawing], *, steps: int = STEPS, guidance: float = GUIDANCE,
                batch: int | None = None, cache: str | Path | None = None,
                progress: Progress | None = None) -> list[Image.Image]:
    """One image for each drawing, in order; the options are those of `Sampling`.

    A folder `cache` keeps the images, and images that it already holds of this model (weights as they are now, settings
    and versions) are taken from there. Several processes can share it: what one draws, the others find.
    """
    batch = batch or images_at_once(pipe)
    kept = ImageCache(cache, drawing_key(pipe, steps, guidance, batch)) if cache else None
    found: dict[tuple[str, int], Image.Image] = {}
    missing = list({(d.prompt, d.seed): d for d in wanted}.values())
    while missing:
        with one_at_a_time(kept.folder / ".lock", PATIENCE) if kept else nullcontext():
            known = {(d.prompt, d.seed): kept.load(d) for d in missing} if kept else {}
            found |= {place: image for place, image in known.items() if image is not None}
            missing = [d for d in missing if (d.prompt, d.seed) not in found]
            chunk, missing = missing[:batch], missing[batch:]
            if not chunk:
                break
            filled = [*chunk, *chunk[-1:] * (batch - len(chunk))]
            drawn = generate(pipe, [d.prompt for d in filled], [d.seed for d in filled], steps=steps, guidance=guidance,
                             batch=batch)
            for drawing, image in zip(chunk, drawn, strict=False):
                check_image(image, drawing)
                found[drawing.prompt, drawing.seed] = image
                if kept:
                    kept.save(drawing, image)
        if progress:
            progress(len(wanted) - len(missing), len(wanted))
    return [found[d.prompt, d.seed] for d in wanted]


def images_at_once(pipe: DiffusionPipeline) -> int:
    """How many images one call of the pipeline draws, by the size of its denoiser."""
    parameters = sum(parameter.numel() for parameter in denoiser(pipe).parameters())
    return LARGE_BATCH if parameters > LARGE else SMALL_BATCH


class ImageCache:
    """Drawn images of one model under fixed settings, one PNG file each, in `folder/KEY`.

    Each file's text says which model, prompt and seed it belongs to, and has a checksum of its pixels. For one that is
    missing, damaged or another's, `load` returns None, so it is drawn anew.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder) / key[:16], key

    def path(self, drawing: Drawing) -> Path:
        """The path of a drawing's image."""
        name = hashlib.sha256(f"{drawing.seed}|{drawing.prompt}".encode()).hexdigest()[:24]
        return self.folder / f"{name}.png"

    def load(self, drawing: Drawing) -> Image.Image | None:
        """The image if it is there, whole, and of this model, prompt and seed."""
        try:
            with Image.open(self.path(drawing)) as file:
                image = file.convert("RGB") if file.mode != "RGB" else file.copy()
                file.load()  # text may stand after the pixels
                said = json.loads(file.text.get(_TEXT, "{}"))
        except (OSError, ValueError, SyntaxError, AttributeError):
            return None
        return image if said == self._text(drawing, image) else None

    def save(self, drawing: Drawing, image: Image.Image) -> None:
        """Keep an image; the file is whole or absent, whenever the process is killed."""
        text = PngImagePlugin.PngInfo()
        text.add_itxt(_TEXT, json.dumps(self._text(drawing, image)))
        with replacing(self.path(drawing)) as temporary:
            image.save(temporary, format="PNG", pnginfo=text)

    def _text(self, drawing: Drawing, image: Image.Image) -> dict[str, str | int]:
        pixels = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
        return {"model": self.key, "prompt": drawing.prompt, "seed": drawing.seed, "pixels": pixels}
