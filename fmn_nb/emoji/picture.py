"""The README's picture: one scene before and after a concept is forgotten, with the attention map of its word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image

from fmn_nb.attention import record_attention
from fmn_nb.emoji.captions import caption
from fmn_nb.files import replacing
from fmn_nb.forgetting import forget
from fmn_nb.generation import generate
from fmn_nb.plots_figure import new_figure

CONCEPT, NEIGHBOUR = "cat", "frog"
PROMPTS = ([CONCEPT, NEIGHBOUR], "noto"), ([CONCEPT], "twemoji"), ([NEIGHBOUR], "twemoji")


def draw_picture(pipe: StableDiffusionPipeline, sampling_steps: int, **settings: Any) -> Figure:
    """Above the base model, below the same model after forgetting "cat", from the same noise; `settings`: of `forget`.

    Columns: two objects, the map of "cat" on them, the concept alone, the neighbour alone.
    """
    patch = forget(pipe, CONCEPT, seed=0, **settings)
    before = _row(pipe, sampling_steps)
    with patch.applied(pipe):
        after = _row(pipe, sampling_steps)
    return _figure(before, after)


def _row(pipe: StableDiffusionPipeline, steps: int) -> tuple[list[Image.Image], np.ndarray]:
    texts = [caption(names, style) for names, style in PROMPTS]
    with record_attention(pipe, branch="cond", keep="mean") as attention:
        first = generate(pipe, texts[:1], [0], steps=steps)
    return first + generate(pipe, texts[1:], [1, 2], steps=steps), attention.map(CONCEPT)


def _figure(before: tuple[list[Image.Image], np.ndarray], after: tuple[list[Image.Image], np.ndarray]) -> Figure:
    figure = new_figure(8.4, 4.4)
    panels = figure.subplots(2, 4)
    titles = ("a cat and a frog", 'where "cat" is looked at', "a cat", "a frog")
    limit = float(before[1].max())
    for axes, name, (images, attention_map) in zip(panels, ("before", "after"), (before, after), strict=True):
        axes[0].imshow(images[0])
        axes[1].imshow(attention_map, cmap="viridis", vmin=0, vmax=limit)
        axes[2].imshow(images[1])
        axes[3].imshow(images[2])
        axes[0].set_ylabel(f"{name} forgetting", fontsize=11)
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    return figure


def write_picture(pipe: StableDiffusionPipeline, path: Path, sampling_steps: int, **settings: Any) -> Path:
    """Draw the picture and write it as PNG to `path`."""
    figure = draw_picture(pipe, sampling_steps, **settings)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
