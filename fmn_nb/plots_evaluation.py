"""Figures of images and of what the judge saw in them. Every function returns a Figure and shows nothing by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from fmn_nb.plots_figure import new_figure

PANEL = 1.25  # inches, width and height of one image
DARK = "#00224e"
MARKERS = "os^Dvp*X"


def image_grid(images: Sequence[Image.Image], columns: int, titles: Sequence[str] = (),
               row_names: Sequence[str] = ()) -> Figure:
    """Images row by row, each under its title; `row_names` stand left of the rows.

    Raises ValueError for no images, or titles that are not one for each image.
    """
    if not images:
        raise ValueError("no images to show")
    if titles and len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images; give one for each")
    rows = -(-len(images) // columns)
    figure = new_figure(columns * PANEL, rows * (PANEL + (0.22 if titles else 0.0)))
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for index, (axes, image) in enumerate(zip(panels.flat, images, strict=False)):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(titles[index] if titles else "", fontsize=8)
    for axes, name in zip(panels[:, 0], row_names, strict=False):
        axes.text(-0.08, 0.5, name, rotation=90, ha="right", va="center", transform=axes.transAxes, fontsize=9)
    return figure


def confusion_figure(confusion: pd.DataFrame, title: str = "") -> Figure:
    """A confusion matrix (`Report.confusion`) as shares of each row, from 0 (dark) to 1 (bright)."""
    shares = confusion.div(confusion.sum(axis=1), axis=0)
    figure = new_figure(2.2 + 0.19 * len(shares.columns), 1.6 + 0.19 * len(shares))
    axes = figure.subplots()
    drawn = axes.imshow(shares.to_numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(shares.columns)), shares.columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(shares)), shares.index, fontsize=7)
    axes.set(title=title, xlabel="the judge saw", ylabel="the prompt asked for")
    figure.colorbar(drawn, ax=axes, label="share of the row's images")
    return figure


def collateral_figure(collateral: pd.DataFrame, most: int = 12) -> Figure:
    """Accuracy before (hollow) and after (filled) of the names that changed most (`Report.collateral`)."""
    rows = collateral.head(most).iloc[::-1]
    figure = new_figure(5.2, 0.8 + 0.26 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    axes.hlines(places, rows["after"], rows["before"], color="0.7")
    axes.scatter(rows["before"], places, facecolors="none", edgecolors=DARK, label="before")
    axes.scatter(rows["after"], places, color=DARK, label="after")
    axes.set_yticks(places, [_with_similarity(name, row) for name, row in rows.iterrows()])
    axes.set(xlim=(-0.05, 1.05), xlabel="accuracy on what was asked for", title="who suffered most")
    axes.legend(loc="lower left", fontsize=8)
    return figure


def _with_similarity(name: str, row: pd.Series) -> str:
    likeness = row.get("similarity")
    return name if likeness is None or pd.isna(likeness) else f"{name} (similarity {likeness:.2f})"


def similarity_figure(collateral: pd.DataFrame, concept: str) -> Figure:
    """Change of accuracy of each name of the concept's domain against its similarity to the concept.

    The up to four that lost most are named. Raises ValueError where no similarity is known.
    """
    rows = collateral.dropna(subset=["similarity"])
    if rows.empty or "change" not in rows:
        raise ValueError("no name has a similarity and a change; evaluate with a patch and a CLIP")
    figure = new_figure(5.2, 3.4)
    axes = figure.subplots()
    axes.axhline(0, color="0.8", linewidth=1)
    axes.scatter(rows["similarity"], rows["change"], color=DARK, s=18)
    for name, row in rows[rows["change"] < 0].sort_values("change").head(4).iterrows():
        axes.annotate(name, (row["similarity"], row["change"]), xytext=(4, -3), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"similarity to {concept} (cosine of CLIP features)", ylabel="change of accuracy",
             title=f"what resembles {concept}, and what it lost")
    return figure


def attention_figure(by_layer: pd.DataFrame) -> Figure:
    """Attention on the concept's words and on later positions in each layer, before (hollow) and after (filled).

    `by_layer` is `Report.attention_layers`; shares of all attention, in [0, 1].
    """
    figure = new_figure(8, 1.0 + 0.2 * len(by_layer))
    places = range(len(by_layer))[::-1]
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("words", "later"), strict=True):
        before, after = by_layer[f"{part}_before"], by_layer.get(f"{part}_after")
        axes.scatter(before, places, facecolors="none", edgecolors=DARK, label="before")
        if after is not None:
            axes.hlines(places, before, after, color="0.7", zorder=0)
            axes.scatter(after, places, color=DARK, s=18, label="after")
        axes.set_yticks(places, [_short(layer) for layer in by_layer.index], fontsize=7)
        axes.set(title=f"on {'its words' if part == 'words' else 'later positions'}", xlabel="share of the attention")
        axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    return figure


def _short(layer: str) -> str:
    return layer.replace("attentions", "a").replace("transformer_blocks", "b").replace("_blocks", "").replace(
        ".attn2", "")


def tradeoff_figure(points: pd.DataFrame, title: str = "forgetting against keeping") -> Figure:
    """Forgetting against keeping, a point for each row; the aim is the upper right corner.

    Columns of `points`: ua, kept (each in [0, 1]), group (decides marker and colour), name (written beside the point,
    unless the legend says it as the group's).
    """
    figure = new_figure(5.6, 4.0)
    axes = figure.subplots()
    groups = list(dict.fromkeys(points["group"]))
    for number, group in enumerate(groups):
        rows = points[points["group"] == group]
        shade = number / max(1, len(groups) - 1)
        axes.scatter(rows["ua"], rows["kept"], marker=MARKERS[number % len(MARKERS)], s=44, label=group,
                     color=colormaps["cividis"](0.9 * shade), edgecolors="0.3", linewidths=0.6)
        for _, row in rows[rows["name"] != group].iterrows():
            axes.annotate(row["name"], (row["ua"], row["kept"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlim=(-0.04, 1.08), ylim=(-0.04, 1.08), xlabel="forgotten: UA", ylabel="kept: mean of IRA and CRA",
             title=title)
    axes.legend(fontsize=8, loc="lower left")
    return figure
