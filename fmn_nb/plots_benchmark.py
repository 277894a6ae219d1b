"""Forgetting against keeping: every concept a point, presets apart."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from fmn_nb.plots_figure import InlineFigure, new_figure

#: of Okabe and Ito's palette, which colour-blind readers tell apart; the marker says the same
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"), ("o", "^", "s", "D", "v")
NAMED = 5  # so many points of each preset are named: those furthest from the corner
CORNER = 0.12  # a point nearer than this to its ceiling needs no name


def forgetting_against_keeping(table: pd.DataFrame, title: str = "Forgetting against keeping") -> InlineFigure:
    """A point per concept and preset, the mean over its seeds: UA to the right, the mean of IRA and CRA upwards.

    The dashed line is the ceiling of keeping: the base model's own mean of IRA and CRA, over the same concepts; the
    aim is where it meets UA = 1. The points furthest from there are named.

    Args:
        table: columns preset, concept, ua, ira, cra, base_ira, base_cra, as `fmn-nb benchmark` writes them.

    Raises:
        ValueError: an empty table.
    """
    if not len(table):
        raise ValueError("no rows to draw")
    columns = ["ua", "ira", "cra", "base_ira", "base_cra"]
    means = table.groupby(["preset", "concept"], sort=False)[columns].mean().reset_index()
    means["kept"] = means[["ira", "cra"]].mean(axis=1)
    ceiling = float(means[["base_ira", "base_cra"]].to_numpy().mean())
    figure = new_figure(6.4, 5.0)
    axes = figure.subplots()
    axes.axhline(ceiling, color="0.35", linestyle="--", linewidth=1, label=f"ceiling: the base model, {ceiling:.2f}")
    axes.plot(1, ceiling, marker="*", markersize=16, color="0.35", linestyle="none", label="the aim", zorder=1)
    sentences = []
    for number, (preset, points) in enumerate(means.groupby("preset", sort=False)):
        colour, marker = look(number)
        axes.scatter(points["ua"], points["kept"], color=colour, marker=marker, alpha=0.75, label=preset, zorder=2)
        _name_the_furthest(axes, points, ceiling, colour)
        sentences.append(f"{preset}: {len(points)} concepts, UA {points['ua'].mean():.2f} on average, "
                         f"kept {points['kept'].mean():.2f}")
    axes.set(xlim=(-0.04, 1.06), ylim=(-0.04, 1.06), title=title, xlabel="forgotten: UA",
             ylabel="kept: mean of IRA and CRA")
    axes.legend(fontsize=8, loc="lower left")
    figure.words = f"The base model keeps {ceiling:.2f}. " + ". ".join(sentences) + "."
    return figure


def look(number: int) -> tuple[str, str]:
    """(colour, marker), another pair for each of the first 25 presets."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _name_the_furthest(axes: Axes, points: pd.DataFrame, ceiling: float, colour: str) -> None:
    distance = ((1 - points["ua"]) ** 2 + (ceiling - points["kept"]).clip(lower=0) ** 2) ** 0.5
    far = points.loc[distance[distance > CORNER].sort_values(ascending=False).head(NAMED).index]
    for ua, kept, concept in zip(far["ua"], far["kept"], far["concept"], strict=True):
        left = ua > 0.75
        axes.annotate(concept, (ua, kept), xytext=(-5 if left else 5, -3), textcoords="offset points", fontsize=7,
                      color=colour, ha="right" if left else "left")
