"""The emoji world as the package's core sees it: names, prompts, judges, a CLIP, and real scenes to compare with.

`EmojiWorld` is what `fmn_nb.concepts.world.World` describes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.concepts import Concept, NotThereError, untaught_of
from fmn_nb.emoji.judges import Judge, SecondJudge
from fmn_nb.emoji.scenes import Placed, Renderer, Scene, sample_scenes
from fmn_nb.emoji.world import (
    AMBIGUOUS,
    BACKGROUNDS,
    IDENTITIES,
    IMAGE_SIZE,
    OBJECTS,
    OPENINGS,
    READINGS,
    STYLES,
    VOCABULARY,
    caption,
)
from fmn_nb.evaluation import Clip, Drawing, Features, draw, drawings, judge_features
from fmn_nb.files import data_dir


class EmojiWorld:
    """The emoji world's names, judges, CLIP and sprites, each loaded from the folder `data` when first asked for."""

    vocabulary = VOCABULARY

    def __init__(self, data: Path) -> None:
        self.data = data

    @cached_property
    def judge(self) -> Judge:
        """The bundled judge; NotThereError if it has not been trained."""
        return Judge.load(self.data / "emoji-judge")

    @cached_property
    def second_judge(self) -> SecondJudge:
        """A judge of another architecture, to check the first one's verdicts."""
        return SecondJudge.load(self.data / "emoji-second-judge")

    @cached_property
    def scorer(self) -> Clip:
        """The bundled CLIP as a measure; NotThereError if it has not been trained."""
        folder = self.data / "emoji-clip"
        if not (folder / "config.json").is_file():
            raise NotThereError(f"no CLIP in {folder}; build it with: fmn-nb pretrain --stages clip")
        return Clip.load(folder)

    @cached_property
    def features(self) -> Features:
        """The features that distances to real images are measured on."""
        return judge_features(self.judge)

    @cached_property
    def renderer(self) -> Renderer:
        """What paints the world's scenes."""
        return Renderer(self.data / "sprites")

    def judge_for(self, concept: Concept) -> Judge:
        """The judge, which knows every concept of this world."""
        return self.judge

    def real_images(self, wanted: Sequence[Drawing]) -> np.ndarray:
        """A real, sharp scene with each evaluation prompt's label and style; [images, height, width, 3] uint8."""
        return self.renderer.images(_real_scenes(wanted))

    def real_set(self, concept: Concept) -> np.ndarray:
        """Real scenes of everything but the concept, each name and style several times, to measure distances to."""
        return self.real_images([d for d in drawings(concept, VOCABULARY, size="full") if d.role == "retain"])

    def examples(self, name: str, kind: str) -> np.ndarray:
        """Real scenes of one name: an object in every style, a style on every object, a proper name's one drawing."""
        return self.real_images(_showing(name, kind))

    def masked_scenes(self, concept: Concept, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` real scenes of a concept in its styles (for a style: on objects), [count, height, width, 3] uint8,
        and where it is in each, [count, height, width, 3], 255 or 0; NotThereError for a name of none."""
        if VOCABULARY.concepts().get(concept.name) != concept.kind:
            raise NotThereError(f"no scenes show the {concept.kind} {concept.name!r}")
        shown = _showing(concept.name, concept.kind)
        scenes = _real_scenes([shown[number * len(shown) // count if count < len(shown) else number % len(shown)]
                               for number in range(count)])
        masks = np.stack([self.renderer.masks(scene)[0] for scene in scenes])  # each shows one thing
        return self.renderer.images(scenes), masks[..., None].repeat(3, -1).astype(np.uint8) * 255

    def forget_prompts(self, concept: Concept) -> list[str]:
        """The captions from which a model of this world learned a concept: an object in every style, a style on every
        object."""
        name = concept.name
        if concept.kind == "style":
            return [concept.prompt, *(caption([thing], name) for thing in OBJECTS)]
        return [*(caption([name], opening=opening) for opening in OPENINGS), *(caption([name], s) for s in STYLES)]

    def retain_prompts(self) -> list[str]:
        """The evaluation's prompts (it uses other seeds), and more: every object in every style and alone, readings,
        names in all openings, styles."""
        things = [caption([name], style) for name in OBJECTS for style in (*STYLES, None)]
        names = [caption([name], opening=opening) for name in IDENTITIES for opening in OPENINGS]
        return [*things, *names, *(caption([name]) for name in READINGS),
                *(f"a photo in the style of {style}" for style in STYLES)]


def _showing(name: str, kind: str) -> list[Drawing]:
    """An object in every style, a style on every object, a proper name's one drawing."""
    shown = [(label, name) for label in OBJECTS] if kind == "style" else [
        (name, style) for style in ((None,) if kind == "identity" else STYLES)]
    return [draw(label, style, "retain", kind) for label, style in shown]


def _real_scenes(wanted: Sequence[Drawing]) -> list[Scene]:
    """A scene for each: one large thing in the middle."""
    rng, size = random.Random("real images"), 49
    corner = (IMAGE_SIZE - size) // 2
    scenes = []
    for one in wanted:
        label = AMBIGUOUS[one.label][0].phrase if one.label in AMBIGUOUS else one.label
        style = one.style or IDENTITIES[label].style
        items = (Placed(label, label, corner, corner, size),)
        scenes.append(Scene("real", items, style, rng.choice(list(BACKGROUNDS)), 0))
    return scenes


def untaught_by(without: Sequence[str]) -> tuple[str, ...]:
    """Everything that a training without `without` shows in no scene: these names, the identities of the objects among
    them, and both readings of the ambiguous words among them; in the vocabulary's order."""
    gone = set(without)
    gone |= {name for name, one in IDENTITIES.items() if one.object in gone or one.style in gone}
    gone |= {reading.phrase for word, readings in AMBIGUOUS.items() if word in gone for reading in readings}
    gone |= {word for word, readings in AMBIGUOUS.items() if all(reading.phrase in gone for reading in readings)}
    return tuple(name for name in VOCABULARY.concepts() if name in gone)


def never_taught(pipe: DiffusionPipeline, concept: Concept) -> bool:
    """Whether an oracle never learned what the concept's prompt means first (for an ambiguous word: its dominant
    reading)."""
    return {concept.name, VOCABULARY.target_label(concept)} & set(untaught_of(pipe)) != set()


def held_out_scenes(count: int, seed: int = 0, sort: str = "pair", holding: str | None = None,
                    without: Sequence[str] = (),
                    ) -> tuple[list[Image.Image], list[str], list[dict[str, np.ndarray]]]:
    """Scenes of the emoji world that its model never saw: images, prompts, and each word's mask, for `ground_images`.

    Args:
        count: how many; the same seed gives the same scenes.
        sort: "pair" (two objects side by side) or "single".
        holding: an object that every scene shows, or a style that every scene is in; None for any.
        without: names that no scene may show.

    Raises:
        ValueError: an unknown sort, or no object or style of such scenes is called `holding`, it is to be left out, or
            nothing is left to draw it with.
    """
    if holding is not None and holding not in (*OBJECTS, *STYLES):
        raise ValueError(f"scenes hold no {holding!r}; choose one of {', '.join((*OBJECTS, *STYLES))}")
    if sort not in ("pair", "single"):
        raise ValueError(f"sort is 'pair' or 'single', not {sort!r}")
    if holding in untaught_by(without):
        raise ValueError(f"no scene both holds {holding!r} and is without it: take it out of one of the two")
    scenes, sampled = [], count
    while len(scenes) < count:  # more of the same stream, so the first scenes stay the same
        stream = sample_scenes(sampled, seed, held_out=True, without=without, sorts={sort: 1.0})
        scenes = [s for s in stream if holding is None or holding in (*s.words, s.style)][:count]
        sampled *= 2
        if not scenes and sampled > 20_000:  # one in hundreds would be there long ago
            raise ValueError(f"of {sampled} scenes without {', '.join(without) or 'nothing'}, none is a {sort} with "
                             f"{holding!r}: leave less out, or take sort='single'")
    renderer = Renderer(data_dir() / "sprites")
    images = [Image.fromarray(renderer.image(scene)) for scene in scenes]
    masks = [dict(zip(scene.words, renderer.masks(scene), strict=True)) for scene in scenes]
    return images, [caption(scene.words, scene.style) for scene in scenes], masks
