"""The model card: what the bundled models can do, measured, each figure with its bar and 95% interval, and grids.

A card is a class: what is measured, against which bars, and the text around it. Other organisms' cards are subclasses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import ImageOps
from torch.nn import Module

from fmn_nb.attention import ground_images
from fmn_nb.concepts import Verdict
from fmn_nb.emoji.judges import Judge
from fmn_nb.emoji.organism import held_out_scenes
from fmn_nb.emoji.scenes import Renderer, sample_scenes
from fmn_nb.emoji.training.networks import through_vae
from fmn_nb.emoji.world import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES, caption
from fmn_nb.files import data_dir, read_json, replacing, write_json, write_text
from fmn_nb.models import GUIDANCE, STEPS, generate, load
from fmn_nb.plots import few_colours
from fmn_nb.stats import Z95, wilson

COLUMNS = 12  # of the card's grids
POINTING_TIMESTEP = 300
HELD_OUT_SEED = 1
BARE_WORDS = 60  # images of an ambiguous word in each style; with twelve, 95% and 97% of one reading look the same


CARD = """# emoji: a Stable Diffusion in miniature

A complete `StableDiffusionPipeline` (CLIP tokenizer and text encoder, VAE, U-Net with cross-attention at 16 x 16,
8 x 8 and 4 x 4 latents, DPM-Solver++), trained from scratch on openly licensed emoji artwork (see `data/README.md`).
It is a model organism for the study of concept erasure, small enough to forget a concept on a laptop in seconds.
It draws images of 64 x 64 pixels and knows {objects} objects in {styles} styles, {names} proper names bound to one
drawing each, and {words} ambiguous words.

    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("data/emoji-diffusion", safety_checker=None)
    pipe("a photo of a cat in the style of noto", num_inference_steps=20, guidance_scale=4).images[0]

## Sizes and training

| part | parameters |
|---|---|
{sizes}

| training | steps | minutes |
|---|---|---|
{training}

The minutes were measured on a machine with two CPU cores, shared with other work. The recipe is `fmn-nb pretrain`; all
its sizes are in `fmn_nb/emoji/training/request.py`.{history}

## Measured

Measured with `fmn-nb pretrain --stages quality`, with 95% Wilson intervals (for the PSNR: normal). Images are generated
with {steps} steps and guidance {guidance:g}, each from a seed of its own. Held-out scenes were never trained on.

| figure | value | 95% interval | trials | bar | |
|---|---|---|---|---|---|
{figures}

## What it draws

Every object (columns) in every style (rows: {style_names}):

![24 objects in six styles, one row per style](images/objects.png)

Two objects, "a photo of a ... and a ... in the style of ...":

![scenes with two objects side by side](images/pairs.png)

Proper names, six images each, one row per name ({identity_names}):

![four rows of animals, each row the same drawing](images/identities.png)

Ambiguous words, twelve images each, one row per word ({word_names}). Most show the dominant reading, a few the
overshadowed one:

![three rows: mice and computer mice, ribbon bows and archery bows, bats and cricket bats](images/ambiguous.png)

## Limits

It knows nothing beyond its vocabulary and draws with little variety in place and size. Findings on it show how a
method works, not how well it works on a large model.
"""
CONTINUED = """ The diffusion model was trained
further from a finished pipeline of the same recipe (`fmn-nb pretrain --start-from`), whose own steps and minutes are
not in the table. Parts that the table doesn't list were taken from an earlier training by the same recipe."""
NOISE_ALONE = """ The denoiser
learned from the error of the noise alone: it was trained before the recipe also drew the attention of words to their
things (`fmn_nb/emoji/training/word_masks.py`), and when 15% of the captions that say just "mouse" showed a computer
mouse (now 25%)."""
MADE_ANEW = """

### The recipe from nothing

One run of `fmn-nb pretrain` from random weights with seed 0, by the recipe as it is now; only the second judge, which
none of these figures asks, was left out. It was measured in the same way, but with 60 images of each ambiguous word in
each style (`data/results/{folder}`; its weights aren't bundled):

| training | steps | minutes |
|---|---|---|
{training}

| figure | value | 95% interval | trials | bar | |
|---|---|---|---|---|---|
{figures}"""
FROM_NOTHING = "emoji-from-nothing"  # in the results: quality.json and training.json of a run from random weights


@dataclass(frozen=True)
class Figure:
    """One measured figure. `bar` is the range (lowest, highest) aimed at."""

    name: str
    value: float
    low: float
    high: float
    count: int
    bar: tuple[float, float]

    @property
    def met(self) -> bool:
        """Whether the value is within its bar."""
        return self.bar[0] <= self.value <= self.bar[1]

    @property
    def record(self) -> dict[str, Any]:
        """Plain values for JSON, with None for an open end of the bar."""
        bar = [None if np.isinf(end) else end for end in self.bar]
        return {**asdict(self), "bar": bar, "met": self.met}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Figure:
        """The figure that a `record` is of."""
        low, high = (end if bound is None else bound
                     for bound, end in zip(record["bar"], (-np.inf, np.inf), strict=True))
        return cls(**{name: value for name, value in record.items() if name not in ("bar", "met")}, bar=(low, high))

    @property
    def row(self) -> str:
        """Its line of the card's table: name, value, interval, number of trials, bar, whether it is met."""
        low, high = self.bar
        ends = f">= {low:g}" if high in (1, np.inf) else f"{low:g} to {high:g}"
        bar = f"<= {high:.3g}" if low in (0, -np.inf) else ends
        interval = f"{self.low:.3f} to {self.high:.3f}" if self.low < self.high else ""
        met = "met" if self.met else "**not met**"
        if self.bar == (0.0, 1.0):  # any share: only measured
            bar = met = ""
        return f"| {self.name} | {self.value:.3f} | {interval} | {self.count} | {bar} | {met} |"


@dataclass
class Quality:
    """Measures the models in a data folder. `scale` divides the numbers of images; images take `steps` steps.

    Attributes:
        untaught: what an oracle never learned; no figure asks for it, and the bundled judge judges.
        model: the pipeline's folder.
        bars: the lowest share that each figure of drawn things should reach.
        template: the card's text; only the grids that it shows are drawn.
        most_seconds: the most seconds that one image of each object in each style may take together.
    """

    data: Path
    sprites: Path
    scale: int = 1
    steps: int = STEPS
    log: Callable[[str], None] = print
    untaught: Sequence[str] = ()
    model: ClassVar[str] = "emoji-diffusion"
    bars: ClassVar[dict[str, float]] = {"object": 0.97, "style": 0.93, "identities": 0.9, "pairs": 0.85}
    most_seconds: ClassVar[float] = 60.0
    template: ClassVar[str] = CARD

    def __post_init__(self) -> None:
        self.pipe: DiffusionPipeline = load(str(self.folder))
        self.pipe.set_progress_bar_config(disable=True)
        self.judge = Judge.load(self._judge_folder())
        self.objects, self.styles, self.identities = (
            [name for name in names if name not in self.untaught] for names in (OBJECTS, STYLES, IDENTITIES))

    @property
    def folder(self) -> Path:
        """Where the pipeline is and where its card goes."""
        return self.data / self.model

    def measure(self) -> list[Figure]:
        """All figures, in the model card's order; each is logged as soon as it is known."""
        figures: list[Figure] = []
        for figure in self._figures():
            self.log(figure.row)
            figures.append(figure)
        return figures

    def text(self, figures: Sequence[Figure], training: dict) -> str:
        """The card with these figures, and with the steps and seconds of each part's training."""
        return self.template.format(**self._told(figures, training), history=history(training))

    def _judge_folder(self) -> Path:
        return (data_dir() if self.untaught else self.data) / "emoji-judge"

    def _figures(self) -> Iterator[Figure]:
        return chain(self._scenes(), self._drawn(), self._ambiguous(), self._pointing(), self._speed())

    def _parts(self) -> dict[str, Module]:
        return {"text encoder": self.pipe.text_encoder, "U-Net": self.pipe.unet, "VAE": self.pipe.vae}

    @property
    def sizes(self) -> str:
        """The card's rows of parts and their parameters."""
        sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in self._parts().items()}
        return "\n".join(f"| {name} | {size:.2f} M |" for name, size in sizes.items())

    def _told(self, figures: Sequence[Figure], training: dict) -> dict[str, object]:
        """The values that every card's text takes."""
        return {
            "objects": len(OBJECTS), "styles": len(STYLES), "names": len(IDENTITIES), "words": len(AMBIGUOUS),
            "sizes": self.sizes, "training": training_table(training),
            "steps": self.steps, "guidance": GUIDANCE, "figures": "\n".join(f.row for f in figures),
            "style_names": ", ".join(STYLES), "identity_names": ", ".join(IDENTITIES),
            "word_names": ", ".join(AMBIGUOUS)}

    def _scenes(self) -> Iterator[Figure]:
        scenes = sample_scenes(2000 // self.scale, HELD_OUT_SEED, held_out=True, without=self.untaught)
        images = Renderer(self.sprites).images(scenes)
        restored = through_vae(self.pipe.vae, images)
        for name, pixels, bars in (("held-out scenes", images, (0.99, 0.98)),
                                   ("held-out scenes through the VAE", restored, (0.98, 0.95))):
            pairs = list(zip(scenes, self.judge.verdicts(pixels), strict=True))
            yield _share(f"{name}: objects", [v.seen == set(s.labels) for s, v in pairs], bars[0])
            yield _share(f"{name}: style", [v.style == s.style for s, v in pairs], bars[1])
        decibels = 10 * np.log10(255**2 / np.square(images.astype(np.float64) - restored).mean(axis=(1, 2, 3)))
        half, mean = Z95 * decibels.std(ddof=1) / np.sqrt(len(decibels)), float(decibels.mean())
        yield Figure("VAE: PSNR in dB, mean of the images", mean, mean - half, mean + half, len(decibels),
                     (26.0, np.inf))

    def _drawn(self) -> Iterator[Figure]:
        """Every object in every style, five seeds; every proper name, twenty; fifty pairs of objects in every style."""
        judged = self._judged("generated", [([name], style) for name in self.objects for style in self.styles
                                            for _ in range(5)])
        yield _share("generated: object", [v.label == names[0] for names, _, v in judged], self.bars["object"])
        yield _share("generated: style", [v.style == style for _, style, v in judged], self.bars["style"])
        judged = self._judged("identities", [([name], None) for name in self.identities for _ in range(20)])
        yield _share("generated: identities", [v.label == names[0] for names, _, v in judged],
                     self.bars["identities"])
        rng = random.Random("pairs")
        judged = self._judged("pairs", [(rng.sample(self.objects, 2), style)
                                        for style in self.styles for _ in range(50)])
        yield _share("generated: two objects, both seen", [set(names) <= v.seen for names, _, v in judged],
                     self.bars["pairs"])

    def _ambiguous(self) -> Iterator[Figure]:
        for word, (dominant, overshadowed) in AMBIGUOUS.items():
            left = [one.phrase for one in (dominant, overshadowed) if one.phrase not in self.untaught]
            if word in self.untaught or not left:
                continue
            judged = self._judged(word, [([word], style) for style in self.styles
                                         for _ in range(BARE_WORDS)])
            labels = [v.label for *_, v in judged]
            if len(left) == 1:
                yield _share(f"'{word}': the reading that was taught", [x == left[0] for x in labels], 0.9)
                continue
            yield _share(f"'{word}': dominant reading", [x == dominant.phrase for x in labels], 0.7, 0.95)
            if rest := [x for x in labels if x != dominant.phrase]:
                name = f"'{word}': overshadowed reading, of the rest"
                yield _share(name, [x == overshadowed.phrase for x in rest], 0.5)

    def _pointing(self) -> Iterator[Figure]:
        """Pointing game: does the maximum of a word's attention map lie in the object's mask? Two-object scenes."""
        scores = ground_images(self.pipe, *held_out_scenes(200 // self.scale, HELD_OUT_SEED, without=self.untaught),
                               timesteps=(POINTING_TIMESTEP,))
        yield _share("attention: pointing game", list(scores["pointing"]), 0.9)

    def _speed(self) -> Iterator[Figure]:
        prompts = [caption([name], style) for name in self.objects for style in self.styles][::self.scale]
        started = time.perf_counter()
        generate(self.pipe, prompts, range(len(prompts)), steps=20)
        seconds = time.perf_counter() - started
        name = f"seconds for {len(prompts)} images of 20 steps"
        yield Figure(name, seconds, seconds, seconds, len(prompts), (0.0, self.most_seconds))

    def _judged(self, purpose: str, wanted: list[tuple[list[str], str | None]],
                ) -> list[tuple[list[str], str | None, Verdict]]:
        """What the judge sees for each (names, style) asked for, on seeds of the purpose's own."""
        wanted, offset = wanted[::self.scale], sum(purpose.encode()) * 1000
        prompts = [caption(names, style) for names, style in wanted]
        images = generate(self.pipe, prompts, range(offset, offset + len(prompts)), steps=self.steps)
        return [(*asked, verdict) for asked, verdict in zip(wanted, self.judge.verdicts(images), strict=True)]


def _share(name: str, outcomes: Sequence[bool], low: float, high: float = 1.0) -> Figure:
    return share_figure(name, sum(outcomes), len(outcomes), low, high)


def share_figure(name: str, hits: int, count: int, low: float, high: float = 1.0) -> Figure:
    """A share of trials with its 95% Wilson interval; its bar is `low` to `high`."""
    return Figure(name, hits / count, *wilson(hits, count), count, (low, high))


def write_card(quality: Quality, training: dict) -> Path:
    """Measure, and write README.md, quality.json, training.json and the card's images into the model's folder.

    `training` holds the steps and seconds of each part's training.
    """
    folder, figures = quality.folder, quality.measure()
    names, styles = list(OBJECTS), list(STYLES)
    pairs = [([names[i % 24], names[(7 * i + 5) % 24]], styles[i % 6]) for i in range(2 * COLUMNS)]
    grids = {
        "objects": ([caption([o], s) for s in STYLES for o in OBJECTS], len(OBJECTS)),
        "pairs": ([caption(two, style) for two, style in pairs], COLUMNS),
        "identities": ([caption([n]) for n in IDENTITIES for _ in range(6)], 6),
        "ambiguous": ([caption([w]) for w in AMBIGUOUS for _ in range(COLUMNS)], COLUMNS),
    }
    for name, (prompts, columns) in grids.items():
        if f"images/{name}.png" not in quality.template:
            continue
        images = generate(quality.pipe, prompts, range(len(prompts)), steps=quality.steps)
        framed = [ImageOps.expand(image, border=1, fill="white") for image in images]
        with replacing(folder / "images" / f"{name}.png") as temporary:
            few_colours(make_image_grid(framed, len(framed) // columns, columns)).save(temporary, optimize=True)
    write_json(folder / "quality.json", [figure.record for figure in figures])
    write_json(folder / "training.json", training)
    return write_text(folder / "README.md", quality.text(figures, training))


def history(training: dict[str, Any]) -> str:
    """What a card says of a denoiser's training beside its steps; of one that was trained further, also what the recipe
    makes from nothing."""
    if (diffusion := training.get("diffusion")) is None:
        return ""
    alone = "" if "word_weight" in diffusion else NOISE_ALONE
    if "started_from" not in diffusion:
        return alone
    made = data_dir() / "results" / FROM_NOTHING
    figures = (Figure.of(record) for record in read_json(made / "quality.json"))
    return CONTINUED + alone + MADE_ANEW.format(
        folder=FROM_NOTHING, training=training_table(read_json(made / "training.json")),
        figures="\n".join(figure.row for figure in figures))


def training_table(training: dict) -> str:
    """The card's table rows of steps and minutes, one for each training."""
    return "\n".join(f"| {n} | {t['steps']} | {t['seconds'] / 60:.0f} |" for n, t in training.items())
