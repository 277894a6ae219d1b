"""Figures of attention. Every function returns a matplotlib Figure and shows nothing by itself.

Colours are viridis or cividis, which keep their order for every kind of colour vision and in grey. What each figure
shows is said in words by its attribute `words`, from the functions of `fmn_nb.attention_tables`, which also has tables.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

from fmn_nb.attention import AttentionRecord, probabilities, scores
from fmn_nb.attention_tables import describe, describe_pair, describe_qkv, describe_rows, describe_tokens
from fmn_nb.concepts import Concept
from fmn_nb.files import replacing
from fmn_nb.plots_figure import InlineFigure, as_png, new_figure

__all__ = [
    "as_image", "as_png", "attention_map", "before_after", "compare", "cond_uncond", "head_sheet", "overlay", "qkv",
    "sheet", "short_name", "step_gif", "step_layer_sheet", "token_panel",
]

MAP_COLOURS, MATRIX_COLOURS = "viridis", "cividis"
MAX_SHEET = 8  # panels along a side, beyond which a sheet shows evenly spaced ones


def attention_map(values: np.ndarray, title: str = "attention", limit: float | None = None) -> InlineFigure:
    """One map [height, width] with its scale, from 0 to `limit` (its own maximum where None)."""
    figure, (axes,) = _figure(1, 1, 3.4, 2.9)
    _draw_map(figure, axes, values, title, limit or float(values.max()), with_scale=True)
    figure.words = _in_words(values, title)
    return figure


def overlay(image: Image.Image, values: np.ndarray, title: str = "attention", opacity: float = 0.6) -> InlineFigure:
    """A generated image, the map [height, width] laid over it, and the map alone with its scale."""
    figure, (plain, laid, alone) = _figure(1, 3, 7.2, 2.5)
    extent = (0, image.width, image.height, 0)
    for axes, name in ((plain, "the image"), (laid, f"{title} over the image")):
        axes.imshow(image, extent=extent)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    laid.imshow(values, cmap=MAP_COLOURS, alpha=opacity, extent=extent, interpolation="bilinear")
    _draw_map(figure, alone, values, title, float(values.max()), with_scale=True)
    figure.words = _in_words(values, title)
    return figure


def token_panel(attention: AttentionRecord, *, image: int = 0, branch: str = "cond", **choice: object) -> InlineFigure:
    """One map for each token of an image's text (begin, words, end, and all padding together), on one scale.

    The scale ends at the largest value of the words: the begin token's map is often far above it.
    """
    text = attention.text(image, branch)
    shown = [(text.label(column), [column]) for column in sorted(text.begin + text.words + text.first_eot)]
    if text.padding:
        shown.append((f"padding ({len(text.padding)})", list(text.padding)))
    maps = [attention.select(columns=columns, image=image, branch=branch, **choice) for _, columns in shown]
    words = [m.max() for m, (_, columns) in zip(maps, shown, strict=True) if columns[0] in text.words]
    titles = [f"{name}\n{values.mean():.1%}" for (name, _), values in zip(shown, maps, strict=True)]
    limit = float(max(words, default=max(m.max() for m in maps)))
    figure = sheet([maps[start : start + 6] for start in range(0, len(maps), 6)], titles=titles, limit=limit,
                   title=f"share of attention of each token, colours from 0 to {limit:.2g}")
    named = {text.label(column) for column in text.words}
    figure.words = describe_tokens([(name, float(m.mean())) for (name, _), m in zip(shown, maps, strict=True)], named)
    return figure


def step_layer_sheet(attention: AttentionRecord, phrase: str | Concept, *, image: int = 0,
                     branch: str = "cond") -> InlineFigure:
    """A phrase's map at each step (columns) in each layer (rows), each row on its own scale: layers differ in level.

    Raises:
        NotRecordedError: only the mean over steps was kept.
    """
    steps, layers = _spread(attention.steps or [0]), _spread(attention.layers)
    rows = [[attention.select(phrase, step=step, layer=layer, image=image, branch=branch) for step in steps]
            for layer in layers]
    return sheet(rows, row_names=[short_name(layer) for layer in layers],
                 column_names=[f"step {step}" for step in steps],
                 title=f"attention to {_name(phrase)!r} by step and layer")


def head_sheet(attention: AttentionRecord, phrase: str | Concept, *, image: int = 0,
               branch: str = "cond") -> InlineFigure:
    """A phrase's map from each head (columns) of each layer (rows), mean over steps, each row on its own scale.

    Raises:
        ValueError: heads were averaged while recording.
    """
    layers = _spread(attention.layers)
    heads = _spread(sorted({head for layer in layers for head in attention.heads[layer]}))
    if not heads:
        raise ValueError("only the mean over heads was kept; record without heads='mean' to see heads")
    rows = [[attention.select(phrase, head=head, layer=layer, image=image, branch=branch)
             if head in attention.heads[layer] else None for head in heads] for layer in layers]
    return sheet(rows, row_names=[short_name(layer) for layer in layers],
                 column_names=[f"head {head}" for head in heads],
                 title=f"attention to {_name(phrase)!r} by head and layer")


def cond_uncond(attention: AttentionRecord, phrase: str | Concept, *, image: int = 0) -> InlineFigure:
    """A phrase's map in both branches on one scale, and their difference: what the words change at these columns."""
    cond, uncond = (attention.map(phrase, image=image, branch=branch) for branch in ("cond", "uncond"))
    return compare(cond, uncond, ("with the prompt (cond)", "without (uncond)"))


def before_after(before: AttentionRecord, after: AttentionRecord, phrase: str | Concept, *,
                 image: int = 0) -> InlineFigure:
    """A phrase's map of two models on one scale, and their difference (before minus after)."""
    return compare(before.map(phrase, image=image), after.map(phrase, image=image), ("before", "after"))


def compare(first: np.ndarray, second: np.ndarray, names: tuple[str, str]) -> InlineFigure:
    """Two maps of one shape on one scale, and first minus second, on a scale that is 0 in the middle.

    Raises:
        ValueError: shapes that differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"maps of {first.shape} and {second.shape}: give both the same size=(height, width)")
    figure, axes = _figure(1, 3, 7.2, 2.5)
    limit = float(max(first.max(), second.max()))
    for place, values, name in zip(axes, (first, second), names, strict=False):
        _draw_map(figure, place, values, f"{name}\nmean {values.mean():.1%}", limit, with_scale=True)
    figure.words = describe_pair(first, second, names)
    difference = first - second
    bound = float(np.abs(difference).max()) or 1.0
    drawn = axes[2].imshow(difference, cmap="PuOr", vmin=-bound, vmax=bound)
    figure.colorbar(drawn, ax=axes[2], shrink=0.8)
    axes[2].set_title("difference", fontsize=9)
    axes[2].set_axis_off()
    return figure


def qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: Sequence[str],
        rows: int = 24) -> InlineFigure:
    """One head of one layer as matrices: Q, K, the scores Q K^T / sqrt(d), A = softmax of each row, V and O = A V.

    Args:
        query: [pixels, d]; evenly spaced pixels are drawn where there are more than `rows`.
        key, value: [tokens, d].
        tokens: a label for each key.

    Raises:
        ValueError: shapes that don't fit each other.
    """
    if query.ndim != 2 or key.shape != value.shape or query.shape[1] != key.shape[1] or len(tokens) != len(key):
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} and "
                         f"{len(tokens)} tokens: give [pixels, d], [tokens, d], [tokens, d] and a label for each token")
    pixels = np.linspace(0, len(query) - 1, min(rows, len(query))).round().astype(int)
    query = query.detach().float()[pixels]
    key, value = key.detach().float(), value.detach().float()
    shares = probabilities(query, key)
    figure, axes = _figure(2, 3, 10.5, 6.4)
    matrices = ((query, "Q: what each pixel asks", "pixel", "channel"),
                (key, "K: what each token offers", "", "channel"),
                (scores(query, key), "scores: Q K$^T$ / $\\sqrt{d}$", "pixel", ""),
                (shares, "A = softmax: rows sum to 1", "pixel", ""),
                (value, "V: what each token gives", "", "channel"), (shares @ value, "O = A V", "pixel", "channel"))
    for place, (matrix, title, down, across) in zip(axes, matrices, strict=True):
        drawn = place.imshow(matrix.numpy(), cmap=MATRIX_COLOURS, aspect="auto")
        figure.colorbar(drawn, ax=place, shrink=0.8)
        place.set_title(title, fontsize=10)
        _label_matrix(place, tokens, pixels, down, across)
    figure.words = describe_qkv(shares.numpy(), tokens)
    return figure


def sheet(rows: Sequence[Sequence[np.ndarray | None]], *, row_names: Sequence[str] = (),
          column_names: Sequence[str] = (), titles: Sequence[str] = (), limit: float | None = None,
          title: str = "") -> InlineFigure:
    """Maps in rows and columns. Each row has its own scale from 0 to its maximum, or all have `limit`.

    Args:
        titles: one for each map, in reading order, instead of names of rows and columns.
    """
    across = max(len(row) for row in rows)
    height, width = next(m for row in rows for m in row if m is not None).shape
    panel = 1.1
    left = 1.4 if row_names else 0.2
    down = len(rows) * (panel * height / width + (0.45 if titles else 0.15)) + (0.6 if title else 0.2)
    figure, places = _figure(len(rows), across, across * panel + left, down)
    if title:
        figure.suptitle(title, fontsize=10)
    if row_names and column_names:
        figure.words = describe_rows(rows, row_names, column_names)
    for index, place in enumerate(places):
        row, column = divmod(index, across)
        place.set_xticks([])
        place.set_yticks([])
        if row == 0 and column_names and not titles:
            place.set_title(column_names[column], fontsize=8)
        values = rows[row][column] if column < len(rows[row]) else None
        if values is None:
            place.set_axis_off()
            continue
        top = limit or max(float(m.max()) for m in rows[row] if m is not None)
        place.imshow(values, cmap=MAP_COLOURS, vmin=0, vmax=top or 1)
        if titles:
            place.set_title(titles[sum(len(r) for r in rows[:row]) + column], fontsize=8)
        if column == 0 and row_names:
            place.set_ylabel(f"{row_names[row]}\n(0 to {top:.2g})", fontsize=7, rotation=0, ha="right", va="center")
    return figure


def step_gif(attention: AttentionRecord, phrase: str | Concept, path: str | os.PathLike[str], *, image: int = 0,
             branch: str = "cond", seconds: float = 0.3) -> Path:
    """Write an animated GIF of a phrase's map, a frame for each recorded step on one scale; returns its path.

    The file's comment says in words at which steps the phrase gets most and least attention.

    Raises:
        ValueError: a name that doesn't end in .gif, or only the mean over steps was kept.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif" or not attention.steps:
        raise ValueError(f"{path.name}: give a name ending in .gif and a record with single steps (keep='steps')")
    maps = [attention.select(phrase, step=step, image=image, branch=branch) for step in attention.steps]
    limit = float(max(m.max() for m in maps))
    frames = [as_image(attention_map(m, f"step {step}", limit)) for step, m in zip(attention.steps, maps, strict=True)]
    with replacing(path) as file:
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0,
                       comment=describe_rows([maps], [_name(phrase)], [f"step {step}" for step in attention.steps]))
    return path


def as_image(figure: InlineFigure) -> Image.Image:
    """A figure as a PIL image."""
    return Image.open(io.BytesIO(as_png(figure))).convert("RGB")


def short_name(layer: str) -> str:
    """A layer's dotted name without what most names share: "down 0.1", "mid", "up 2.0", "transformer_blocks.3"."""
    parts = [part for part in layer.split(".") if part not in ("attn2", "attn1", "attn", "attentions")]
    blocks = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid"}
    if parts[0] not in blocks:
        return ".".join(parts)
    numbers = [part for part in parts[1:] if part.isdigit()]
    return f"{blocks[parts[0]]} {'.'.join(numbers[:-1] if numbers[-1:] == ['0'] and len(numbers) > 1 else numbers)}"


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[InlineFigure, list[Axes]]:
    figure = new_figure(width, height)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _draw_map(figure: InlineFigure, axes: Axes, values: np.ndarray, title: str, limit: float, with_scale: bool) -> None:
    drawn = axes.imshow(values, cmap=MAP_COLOURS, vmin=0, vmax=limit or 1)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    if with_scale:
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of attention")


def _label_matrix(axes: Axes, tokens: Sequence[str], pixels: Sequence[int], down: str, across: str) -> None:
    """Name a matrix's axes; an axis without a name is the tokens'."""
    if down == "pixel":
        every = max(1, len(pixels) // 6)
        axes.set_yticks(range(0, len(pixels), every), pixels[::every], fontsize=7)
    axes.set_xlabel(across or None, fontsize=8)
    axes.set_ylabel(down or None, fontsize=8)
    if not across:
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
    if not down:
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7)


def _in_words(values: np.ndarray, title: str) -> str:
    """The sentence on one map; a map that is 0 everywhere has none but that."""
    return describe(values, title) if values.max() > 0 else f"{title!r} gets no attention anywhere."


def _name(phrase: str | Concept) -> str:
    return phrase.phrase if isinstance(phrase, Concept) else phrase


def _spread(items: Sequence) -> list:
    """The items, or evenly spaced ones where there are more than a sheet holds."""
    if len(items) <= MAX_SHEET:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, MAX_SHEET).round().astype(int)]
