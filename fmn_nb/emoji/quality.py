"""What the embedded models can do, measured: the figures of the model card, each with its bar and 95% interval."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline

from fmn_nb.emoji.captions import caption
from fmn_nb.emoji.judge import Judge, Verdict, load_judge
from fmn_nb.emoji.scenes import Renderer, sample_scenes
from fmn_nb.emoji.vae import through_vae
from fmn_nb.emoji.world import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES
from fmn_nb.generation import generate
from fmn_nb.grounding import ground_images, held_out_scenes
from fmn_nb.intervals import Z95, wilson
from fmn_nb.models import load

STEPS = 20
POINTING_TIMESTEP = 300
HELD_OUT_SEED = 1


@dataclass(frozen=True)
class Figure:
    """One measured figure. `bar` is (lowest, highest) that was aimed at."""

    name: str
    value: float
    low: float
    high: float
    count: int
    bar: tuple[float, float]

    @property
    def met(self) -> bool:
        return self.bar[0] <= self.value <= self.bar[1]

    @property
    def bar_text(self) -> str:
        low, high = self.bar
        if low == 0:
            return f"<= {high:g}"
        return f">= {low:g}" if high in (1.0, np.inf) else f"{low:g} to {high:g}"


def share(name: str, outcomes: Iterable[bool], low: float, high: float = 1.0) -> Figure:
    outcomes = list(outcomes)
    hits, count = sum(outcomes), len(outcomes)
    return Figure(name, hits / count, *wilson(hits, count), count, (low, high))


@dataclass
class Quality:
    """Measures the models in a data folder. `scale` divides the numbers of images; images take `steps` steps."""

    data: Path
    sprites: Path
    scale: int = 1
    steps: int = STEPS
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.pipe: StableDiffusionPipeline = load(str(self.data / "emoji-diffusion"))
        self.pipe.set_progress_bar_config(disable=True)
        self.judge: Judge = load_judge(self.data / "emoji-judge")
        self.renderer = Renderer(self.sprites)

    def measure(self) -> list[Figure]:
        """All figures, in the model card's order; each is logged as soon as it is known."""
        figures: list[Figure] = []
        parts = (self.scenes, self.generated, self.identities, self.pairs, self.ambiguous, self.pointing, self.speed)
        for part in parts:
            new = part()
            for figure in new:
                self.log(row(figure))
            figures += new
        return figures

    def scenes(self) -> list[Figure]:
        scenes = sample_scenes(2000 // self.scale, HELD_OUT_SEED, held_out=True)
        images = self.renderer.images(scenes)
        restored = through_vae(self.pipe.vae, images)
        figures = []
        for name, pixels, bars in (("held-out scenes", images, (0.99, 0.98)),
                                   ("held-out scenes through the VAE", restored, (0.98, 0.95))):
            verdicts = self.judge.verdicts(pixels)
            pairs = list(zip(scenes, verdicts, strict=True))
            figures.append(share(f"{name}: objects", (v.seen == set(s.labels) for s, v in pairs), bars[0]))
            figures.append(share(f"{name}: style", (v.style == s.style for s, v in pairs), bars[1]))
        return [*figures, _psnr_figure(images, restored)]

    def generated(self) -> list[Figure]:
        """Every object in every style, five seeds."""
        wanted = [(o, s) for o in OBJECTS for s in STYLES for _ in range(5)][::self.scale]
        verdicts = self._draw([caption([o], s) for o, s in wanted], "generated")
        return [share("generated: object", (v.label == o for v, (o, _) in zip(verdicts, wanted, strict=True)), 0.97),
                share("generated: style", (v.style == s for v, (_, s) in zip(verdicts, wanted, strict=True)), 0.93)]

    def identities(self) -> list[Figure]:
        names = [name for name in IDENTITIES for _ in range(20)][::self.scale]
        verdicts = self._draw([caption([name]) for name in names], "identities")
        return [share("generated: identities", (v.label == n for v, n in zip(verdicts, names, strict=True)), 0.9)]

    def pairs(self) -> list[Figure]:
        rng = random.Random("pairs")
        pairs = [(rng.sample(list(OBJECTS), 2), style) for style in STYLES for _ in range(50)][::self.scale]
        verdicts = self._draw([caption(names, style) for names, style in pairs], "pairs")
        both = [set(names) <= v.seen for v, (names, _) in zip(verdicts, pairs, strict=True)]
        return [share("generated: two objects, both seen", both, 0.85)]

    def ambiguous(self) -> list[Figure]:
        figures = []
        for word, (dominant, overshadowed) in AMBIGUOUS.items():
            prompts = [caption([word], style) for style in STYLES for _ in range(12)][::self.scale]
            labels = [v.label for v in self._draw(prompts, word)]
            figures.append(share(f"'{word}': dominant reading", (x == dominant.phrase for x in labels), 0.7, 0.95))
            rest = [x for x in labels if x != dominant.phrase]
            if rest:
                name = f"'{word}': overshadowed reading, of the rest"
                figures.append(share(name, (x == overshadowed.phrase for x in rest), 0.5))
        return figures

    def pointing(self) -> list[Figure]:
        """Pointing game: does the maximum of a word's attention map lie in the object's mask? Two-object scenes."""
        scores = ground_images(self.pipe, *held_out_scenes(200 // self.scale, HELD_OUT_SEED),
                               timesteps=(POINTING_TIMESTEP,))
        return [share("attention: pointing game", scores["pointing"], 0.9)]

    def speed(self) -> list[Figure]:
        prompts = [caption([o], s) for o in OBJECTS for s in STYLES][::self.scale]
        started = time.perf_counter()
        generate(self.pipe, prompts, range(len(prompts)), steps=20)
        seconds = time.perf_counter() - started
        name = f"seconds for {len(prompts)} images of 20 steps"
        return [Figure(name, seconds, seconds, seconds, len(prompts), (0.0, 60.0))]

    def _draw(self, prompts: list[str], purpose: str) -> list[Verdict]:
        offset = sum(purpose.encode()) * 1000
        images = generate(self.pipe, prompts, range(offset, offset + len(prompts)), steps=self.steps)
        return self.judge.verdicts(images)


def _psnr_figure(images: np.ndarray, restored: np.ndarray) -> Figure:
    errors = np.square(images.astype(np.float64) - restored).mean(axis=(1, 2, 3))
    decibels = 10 * np.log10(255**2 / errors)
    half = Z95 * decibels.std(ddof=1) / np.sqrt(len(decibels))
    mean = float(decibels.mean())
    return Figure("VAE: PSNR in dB, mean of the images", mean, mean - half, mean + half, len(decibels), (26.0, np.inf))


def row(figure: Figure) -> str:
    """One line of the table: name, value, interval, number of trials, bar, whether it is met."""
    interval = f"{figure.low:.3f} to {figure.high:.3f}"
    met = "met" if figure.met else "NOT MET"
    return f"{figure.name:<46} {figure.value:>7.3f}  {interval:<18} {figure.count:>5}  {figure.bar_text:<12} {met}"


def as_json(figures: list[Figure]) -> list[dict]:
    return [{**asdict(f), "bar": [f.bar[0], None if np.isinf(f.bar[1]) else f.bar[1]], "met": f.met} for f in figures]
