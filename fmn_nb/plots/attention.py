"""Attention in figures and in words: one map, a sheet of many, two compared, the matrices that they come from.

Every function returns a figure and shows nothing by itself. Its attribute `words` says what it shows, for those who
can't see it; `describe` and `comparison` describe maps without a figure.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from PIL import Image

from fmn_nb.attention import AttentionRecord, probabilities, scores, short_name
from fmn_nb.concepts import Concept, find_phrase
from fmn_nb.files import replacing
from fmn_nb.models import as_image
from fmn_nb.plots.style import MAP_COLOURS, MATRIX_COLOURS, InlineFigure, as_png, new_figure

MAX_SHEET = 8  # panels along a side; of more, a sheet shows evenly spaced ones
DOWN, ACROSS = ("upper", "middle", "lower"), ("left", "centre", "right")


def attention_map(values: np.ndarray, title: str = "attention", limit: float | None = None) -> InlineFigure:
    """One map [height, width] with its scale, from 0 to `limit` (by default its own maximum)."""
    figure, (axes,) = new_figure(3.4, 2.9)
    _show_map(axes, values, title, limit or float(values.max()))
    figure.words = describe(values, title)
    return figure


def overlay(image: Image.Image | np.ndarray | torch.Tensor, values: np.ndarray, title: str = "attention",
            opacity: float = 0.6) -> InlineFigure:
    """A generated image, the map [height, width] laid over it, and the map alone with its scale.

    Raises:
        ReferenceImageError: no image, or several.
        ValueError: no map.
    """
    image = image if isinstance(image, Image.Image) else as_image(image)
    if np.ndim(values) != 2 or not np.isfinite(values).all():
        raise ValueError(f"a map is [height, width] of finite numbers, not {np.shape(values)}: give attention.map(...)")
    figure, (plain, laid, alone) = new_figure(7.2, 2.5, 3)
    extent = (0, image.width, image.height, 0)
    for axes, name in ((plain, "the image"), (laid, f"{title} over the image")):
        axes.imshow(image, extent=extent)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    laid.imshow(values, cmap=MAP_COLOURS, alpha=opacity, extent=extent, interpolation="bilinear")
    _show_map(alone, values, title, float(values.max()))
    figure.words = describe(values, title)
    return figure


def map_picture(values: np.ndarray, image: Image.Image | None = None, side: int = 256) -> Image.Image:
    """A map in colours, from its lowest to its highest value; if an image is given, with the map over it on the left.

    It has no axes and needs no figure, so that an explorer answers at once.

    Args:
        values: [height, width].
        side: the width of each part, in pixels.
    """
    low, high = float(values.min()), float(values.max())
    shares = (values - low) / (high - low) if high > low else np.zeros_like(values)
    colours = Image.fromarray((colormaps[MAP_COLOURS](shares)[..., :3] * 255).astype(np.uint8))
    size = (side, round(side * values.shape[0] / values.shape[1]))
    alone = colours.resize(size, Image.Resampling.NEAREST)
    if image is None:
        return alone
    size = (side, round(side * image.height / image.width))
    plain = image.convert("RGB").resize(size, Image.Resampling.NEAREST if image.width < side else None)
    laid = Image.blend(plain, colours.resize(size, Image.Resampling.BILINEAR), 0.6)
    both = Image.new("RGB", (2 * side + 8, size[1]), "white")
    both.paste(laid, (0, 0))
    both.paste(alone.resize(size, Image.Resampling.NEAREST), (side + 8, 0))
    return both


def token_panel(attention: AttentionRecord, *, image: int = 0, branch: str = "cond", **choice: object) -> InlineFigure:
    """One map for each token of an image's text (begin, words, end, and all padding together), on one scale.

    The scale ends at the largest value of the words. A map that exceeds it, often the padding's, is drawn from its own
    lowest to its own highest value, and its title gives these.
    """
    text = attention.text(image, branch)
    shown = [(text.label(column), [column]) for column in sorted(text.begin + text.words + text.first_eot)]
    if text.padding:
        shown.append((f"padding ({len(text.padding)})", list(text.padding)))
    maps = [attention.select(columns=columns, image=image, branch=branch, **choice) for _, columns in shown]
    words = [m.max() for m, (_, columns) in zip(maps, shown, strict=True) if columns[0] in text.words]
    limit = float(max(words, default=max(m.max() for m in maps)))
    panels, titles = zip(*(_within(name, values, limit) for (name, _), values in zip(shown, maps, strict=True)),
                         strict=True)
    figure = sheet([panels[start : start + 6] for start in range(0, len(panels), 6)], titles=titles, limit=limit,
                   title=f"share of attention of each token; colours from 0 to {limit:.2g} where no others are named")
    masses = [(float(m.mean()), name) for (name, _), m in zip(shown, maps, strict=True)]
    most, name = max(masses, key=lambda one: one[0])
    figure.words = f"Of {len(masses)} tokens {name!r} gets most attention ({most:.1%})"
    named = {text.label(column) for column in text.words}
    if named and name not in named:
        most, name = max((one for one in masses if one[1] in named), key=lambda one: one[0])
        figure.words += f", of the words {name!r} ({most:.1%})"
    figure.words += "."
    return figure


def _within(name: str, values: np.ndarray, limit: float) -> tuple[np.ndarray, str]:
    """A map [height, width] and its title; beyond `limit`, the map stretched over the scale, and its range."""
    title, low, high = f"{name}\n{values.mean():.1%}", float(values.min()), float(values.max())
    if high <= limit:
        return values, title
    return (values - low) / ((high - low) or 1) * limit, f"{title} ({low:.2g} to {high:.2g})"


def step_layer_sheet(attention: AttentionRecord, phrase: str | Concept, *, image: int = 0,
                     branch: str = "cond") -> InlineFigure:
    """A phrase's map at each step (columns) in each layer (rows), each row on its own scale: layers differ in level.

    Raises:
        NotRecordedError: only the mean over steps was kept.
    """
    return _by_layer(attention, phrase, "step", attention.steps_of(image, branch) or attention.steps or [0],
                     image=image, branch=branch)


def head_sheet(attention: AttentionRecord, phrase: str | Concept, *, image: int = 0,
               branch: str = "cond") -> InlineFigure:
    """A phrase's map from each head (columns) of each layer (rows), mean over steps, each row on its own scale.

    Raises:
        ValueError: heads were averaged while recording.
    """
    heads = sorted({head for layer in _spread(attention.layers) for head in attention.heads[layer]})
    if not heads:
        raise ValueError("only the mean over heads was kept; record without heads='mean' to see heads")
    return _by_layer(attention, phrase, "head", heads, image=image, branch=branch)


def _by_layer(attention: AttentionRecord, phrase: str | Concept, axis: str, values: list[int],
              **choice: object) -> InlineFigure:
    """A sheet with a row for each layer and a column for each step or head; empty if a layer has no such head."""
    layers, values = _spread(attention.layers), _spread(values)
    rows = [[attention.select(phrase, layer=layer, **{axis: value}, **choice)
             if axis == "step" or value in attention.heads[layer] else None for value in values] for layer in layers]
    return sheet(rows, row_names=[short_name(layer) for layer in layers],
                 column_names=[f"{axis} {value}" for value in values],
                 title=f"attention to {_name(phrase)!r} by {axis} and layer")


def _spread(items: Sequence) -> list:
    """The items, or evenly spaced ones if there are more than a sheet holds."""
    if len(items) <= MAX_SHEET:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, MAX_SHEET).round().astype(int)]


def cond_uncond(attention: AttentionRecord, phrase: str | Concept, *, image: int = 0) -> InlineFigure:
    """A phrase's map in both branches on one scale, and their difference: what the words change at these columns.

    Both are of the columns that the phrase has in the prompt, also where a negative prompt has it elsewhere (unless
    only phrases were recorded: then the panel says so).
    """
    other, branches = "without (uncond)", ("cond", "uncond")
    if attention.phrases is None:
        columns = attention.text(image).find(_name(phrase)).columns
        cond, uncond = (attention.select(columns=columns, image=image, branch=branch) for branch in branches)
    else:  # their columns were added up while recording
        cond, uncond = (attention.map(phrase, image=image, branch=branch) for branch in branches)
        negative = attention.images[image].negative
        if negative is not None and find_phrase(negative.prompt, _name(phrase)):
            other = "its own in the negative prompt (uncond)"
    return compare(cond, uncond, ("with the prompt (cond)", other))


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
    figure, (*panels, last) = new_figure(7.2, 2.5, 3)
    limit = float(max(first.max(), second.max()))
    for axes, values, name in zip(panels, (first, second), names, strict=True):
        _show_map(axes, values, f"{name}\nmean {values.mean():.1%}", limit)
    bound = float(np.abs(first - second).max()) or 1.0
    _show(last, first - second, "difference", cmap="PuOr", vmin=-bound, vmax=bound)
    last.set_axis_off()
    difference = np.asarray(first, dtype=float) - second
    largest = difference.flat[np.abs(difference).argmax()]
    figure.words = (f"On average {first.mean():.1%} {names[0]} and {second.mean():.1%} {names[1]}; the largest "
                    f"difference is {largest:+.1%}, at the {_peak(np.abs(difference))}.")
    return figure


def qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: Sequence[str],
        rows: int = 24) -> InlineFigure:
    """One head of one layer as matrices: Q, K, the scores Q K^T / sqrt(d), A = softmax of each row, V and O = A V.

    Args:
        query: [pixels, d]; of more than `rows` pixels, evenly spaced ones are shown.
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
    figure, panels = new_figure(10.5, 6.4, 3, 2)
    matrices = ((query, "Q: what each pixel asks", "pixel", "channel"),
                (key, "K: what each token offers", "", "channel"),
                (scores(query, key), "scores: Q K$^T$ / $\\sqrt{d}$", "pixel", ""),
                (shares, "A = softmax: rows sum to 1", "pixel", ""),
                (value, "V: what each token gives", "", "channel"), (shares @ value, "O = A V", "pixel", "channel"))
    every = max(1, len(pixels) // 6)
    for axes, (matrix, title, down, across) in zip(panels, matrices, strict=True):
        _show(axes, matrix.numpy(), title, fontsize=10, cmap=MATRIX_COLOURS, aspect="auto")
        axes.set_xlabel(across or None, fontsize=8)
        axes.set_ylabel(down or None, fontsize=8)
        if down == "pixel":
            axes.set_yticks(range(0, len(pixels), every), pixels[::every], fontsize=7)
        if not across:  # an axis without a name is the tokens'
            axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        if not down:
            axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
    mass, winners = shares.numpy().mean(axis=0), shares.numpy().argmax(axis=1)
    most, often = int(mass.argmax()), int(np.bincount(winners, minlength=len(tokens)).argmax())
    figure.words = (f"Of {len(tokens)} tokens {tokens[most]!r} gets most attention ({mass[most]:.0%} on average); for "
                    f"{(winners == often).sum()} of the {len(shares)} pixels shown {tokens[often]!r} has the largest "
                    "share. Each row of A sums to 1.")
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
    figure, panels = new_figure(across * panel + left, down, across, len(rows))
    if title:
        figure.suptitle(title, fontsize=10)
    if row_names and column_names:
        figure.words = _rows_in_words(rows, row_names, column_names)
    elif titles:
        figure.words = f"{len(titles)} maps: " + ", ".join(name.replace("\n", " ") for name in titles) + "."
    named = iter(titles)
    for index, axes in enumerate(panels):
        row, column = divmod(index, across)
        axes.set(xticks=[], yticks=[])
        if row == 0 and column_names and not titles:
            axes.set_title(column_names[column], fontsize=8)
        values = rows[row][column] if column < len(rows[row]) else None
        if values is None:
            axes.set_axis_off()
            continue
        top = limit or max(float(m.max()) for m in rows[row] if m is not None)
        axes.imshow(values, cmap=MAP_COLOURS, vmin=0, vmax=top or 1)
        if titles:
            axes.set_title(next(named), fontsize=8)
        if column == 0 and row_names:
            axes.set_ylabel(f"{row_names[row]}\n(0 to {top:.2g})", fontsize=7, rotation=0, ha="right", va="center")
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
    steps = attention.steps_of(image, branch) or attention.steps
    maps = [attention.select(phrase, step=step, image=image, branch=branch) for step in steps]
    limit = float(max(m.max() for m in maps))
    figures = [attention_map(m, f"step {step}", limit) for step, m in zip(steps, maps, strict=True)]
    frames = [Image.open(io.BytesIO(as_png(figure))).convert("RGB") for figure in figures]
    with replacing(path) as file:
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0,
                       comment=_rows_in_words([maps], [_name(phrase)], [f"step {step}" for step in steps]))
    return path


def _show_map(axes: Axes, values: np.ndarray, title: str, limit: float) -> None:
    _show(axes, values, title, "share of attention", cmap=MAP_COLOURS, vmin=0, vmax=limit or 1)
    axes.set_axis_off()


def _show(axes: Axes, values: np.ndarray, title: str, scale: str = "", fontsize: int = 9, **options: object) -> None:
    axes.figure.colorbar(axes.imshow(values, **options), ax=axes, shrink=0.8, label=scale)
    axes.set_title(title, fontsize=fontsize)


def _name(phrase: str | Concept) -> str:
    return phrase.phrase if isinstance(phrase, Concept) else phrase


# --- in words ---------------------------------------------------------------------------------------------------------

def describe(attention_map: np.ndarray, name: str = "the phrase") -> str:
    """A sentence on a map [height, width]: how much attention there is, where its peak is, how concentrated it is.

    Raises:
        ValueError: not a two-dimensional map.
    """
    values = np.asarray(attention_map, dtype=float)
    if values.ndim != 2:
        raise ValueError(f"an attention map is [height, width]; got shape {values.shape}")
    if values.max() <= 0:
        return f"{name!r} gets no attention anywhere."
    top = np.sort(values, axis=None)[::-1][: max(1, round(values.size / 10))].sum() / values.sum()
    return (f"{name!r} gets {values.mean():.1%} of the attention on average and {values.max():.1%} at its peak, at "
            f"the {_peak(values)}; the tenth of the image that looks at it most holds {top:.0%} of it.")


def comparison(maps: Sequence[np.ndarray], names: Sequence[str]) -> pd.DataFrame:
    """Maps beside each other: mean, peak, where the peak is, and the correlation with the first map, in [-1, 1].

    Raises:
        ValueError: maps of different shapes, or not one name for each.
    """
    if len({np.shape(m) for m in maps}) != 1 or len(maps) != len(names):
        raise ValueError(f"{[np.shape(m) for m in maps]} and {len(names)} names: give maps of one shape, each a name")
    rows = []
    for values, name in zip(maps, names, strict=True):
        varied = np.ptp(values) > 0 and np.ptp(maps[0]) > 0
        rows.append({"map": name, "mean": float(values.mean()), "peak": float(values.max()), "where": _peak(values),
                     "correlation": float(np.corrcoef(maps[0].ravel(), values.ravel())[0, 1]) if varied else None})
    return pd.DataFrame(rows)


def _peak(values: np.ndarray) -> str:
    """The place of the largest value of a map [height, width]: "upper left", "centre"."""
    place = np.unravel_index(np.argmax(values), values.shape)
    down, across = (int((at + 0.5) / size * 3) for at, size in zip(place, values.shape, strict=True))
    return "centre" if down == across == 1 else f"{DOWN[down]} {ACROSS[across]}"


def _rows_in_words(rows: Sequence[Sequence[np.ndarray | None]], row_names: Sequence[str],
                   column_names: Sequence[str]) -> str:
    """A clause for each row of a sheet of maps: which column has the largest mean, and which the smallest."""
    clauses = []
    for name, row in zip(row_names, rows, strict=True):
        means = {column: float(values.mean()) for column, values in zip(column_names, row, strict=False)
                 if values is not None}
        most, least = max(means, key=means.get), min(means, key=means.get)
        rest = f", least at {least} ({means[least]:.1%})" if least != most else ""
        clauses.append(f"{name}: most at {most} ({means[most]:.1%}){rest}")
    return "Mean attention by row. " + "; ".join(clauses) + "."
