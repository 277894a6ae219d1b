"""Figures of images and of what the judge saw in them. Every function returns a Figure and shows nothing by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from fmn_nb.plots_figure import new_figure

PANEL = 1.25  # inches, width and height of one image


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
    """Accuracy before (hollow) and after (filled) of the objects that changed most (`Report.collateral`)."""
    rows = collateral.head(most).iloc[::-1]
    figure = new_figure(5.2, 0.8 + 0.26 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    axes.hlines(places, rows["after"], rows["before"], color="0.7")
    axes.scatter(rows["before"], places, facecolors="none", edgecolors="#00224e", label="before")
    axes.scatter(rows["after"], places, color="#00224e", label="after")
    axes.set_yticks(places, rows.index)
    axes.set(xlim=(-0.03, 1.03), xlabel="share of images in which the judge sees what was asked for",
             title="who suffered most")
    axes.legend(loc="lower left", fontsize=8)
    return figure
