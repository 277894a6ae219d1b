"""Forgetting against keeping in one figure, whether its points are a model's variants, concepts or a sweep's runs.

Further right is more forgotten, higher is more kept; the aim is the upper right corner. A group of points has a colour
and a marker. The sweep's two other figures, along a parameter and against a cost, show their points in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from fmn_nb.plots.style import InlineFigure, look, new_figure

NAMED = 5  # this many points of each preset are named: those furthest from the corner
CORNER = 0.12  # a point nearer than this to its ceiling needs no name
MOST_INSIDE, COLUMNS_BELOW = 12, 4  # entries of a legend inside the axes; columns of one below them, at most
FEW_DECADES = 200  # a logarithmic axis whose ends have a smaller ratio also has ticks at 2 and 5
NAMES = {"ua": "forgotten: UA", "ira": "kept nearby: IRA", "cra": "kept elsewhere: CRA", "h": "harmonic mean: H",
         "kept": "kept: mean of IRA and CRA"}


def tradeoff_figure(points: pd.DataFrame, title: str = "forgetting against keeping") -> InlineFigure:
    """Forgetting against keeping, a point for each row.

    Columns of `points`: ua, kept (each in [0, 1]), group (decides colour and marker), name (written beside the point,
    unless the legend says it as the group's).
    """
    figure, (axes,) = new_figure(5.6, 4.0)
    names = points["name"].where(points["name"] != points["group"], "")
    _points(axes, points.rename(columns={"ua": "x", "kept": "y"}).assign(name=names))
    axes.set(**_square(), title=title)
    _legend(axes, "lower left")
    _names_apart(axes)
    return figure


def forgetting_against_keeping(table: pd.DataFrame, groups: Mapping[str, str] | None = None) -> InlineFigure:
    """A point per concept and preset, the mean over its seeds: UA to the right, the mean of IRA and CRA upwards.

    The dashed line is the ceiling of keeping: the base model's own mean of IRA and CRA, over the same concepts; the
    aim is where it meets UA = 1. The points furthest from there are named, as far as there is room.

    Args:
        table: columns preset, concept, ua, ira, cra, base_ira, base_cra, as `fmn-nb benchmark` writes them.
        groups: preset -> a group that shares its look, if there are more presets than looks; then presets are named.

    Raises:
        ValueError: an empty table.
    """
    if not len(table):
        raise ValueError("no rows to show")
    columns = ["ua", "ira", "cra", "base_ira", "base_cra"]
    means = table.groupby(["preset", "concept"], sort=False)[columns].mean().reset_index()
    ceiling = float(means[["base_ira", "base_cra"]].to_numpy().mean())
    group = means["preset"].map(groups or (lambda preset: preset))
    points = pd.DataFrame({"group": group, "x": means["ua"], "y": means[["ira", "cra"]].mean(axis=1)})
    distance = ((1 - points["x"]) ** 2 + (ceiling - points["y"]).clip(lower=0) ** 2) ** 0.5
    rank = distance.groupby(points["group"]).rank(ascending=False, method="first")
    points["name"] = means["preset" if groups else "concept"].where((distance > CORNER) & (rank <= NAMED), "")
    figure, (axes,) = new_figure(6.4, 5.0)
    axes.axhline(ceiling, color="0.35", linestyle="--", linewidth=1, label=f"ceiling: the base model, {ceiling:.2f}")
    axes.plot(1, ceiling, marker="*", markersize=16, color="0.35", linestyle="none", label="the aim", zorder=1)
    _points(axes, points)
    axes.set(**_square(), title="Forgetting against keeping")
    _legend(axes, "lower left")
    _names_apart(axes)
    what = "points" if groups else "concepts"
    sentences = [f"{name}: {len(rows)} {what}, UA {rows['x'].mean():.2f} on average, kept {rows['y'].mean():.2f}"
                 for name, rows in points.groupby("group", sort=False)]
    figure.words = f"The base model keeps {ceiling:.2f}. " + ". ".join(sentences) + "."
    return figure


def cost_of_presets(summary: Sequence[Mapping[str, Any]], groups: Mapping[str, str] | None = None) -> InlineFigure:
    """What each preset costs and gives, one point each: H upwards with its 95% interval over concepts; to the right,
    the seconds of forgetting in one panel and the patch's bytes in the other.

    Args:
        summary: rows with preset, kind, h, seconds and patch_bytes, as results.json of `fmn-nb benchmark` has them.
        groups: preset -> a group that shares its look, if there are more presets than looks.

    Raises:
        ValueError: no row is of all kinds.
    """
    rows = [row for row in summary if row["kind"] == "all"]
    if not rows:
        raise ValueError("no rows to show")
    bounds = [row.get("h_ci95", (row["h"], row["h"])) for row in rows]
    shared = groups or {}
    points = pd.DataFrame({"group": [shared.get(row["preset"], row["preset"]) for row in rows], "name": "",
                           "y": [row["h"] for row in rows], "y_low": [low for low, _ in bounds],
                           "y_high": [high for _, high in bounds]})
    figure, panels = new_figure(9.0, 3.8, 2, sharey=True)
    costs = {"seconds": "seconds of forgetting", "patch_bytes": "bytes of the patch"}
    for axes, (cost, label) in zip(panels, costs.items(), strict=True):
        _points(axes, points.assign(x=[row.get(cost) for row in rows]))
        axes.set(ylim=(-0.04, 1.06), xlabel=label)
        _logarithmic(axes)
    panels[0].set(ylabel=NAMES["h"])
    _legend(panels[1], "lower right")
    figure.suptitle("What it costs, what it gives")
    figure.words = "; ".join(f"{row['preset']}: H {row['h']:.2f}"
                             + "".join(f", {row[cost]:,.0f} {label}" for cost, label in costs.items() if cost in row)
                             for row in rows) + "."
    return figure


def excess_against_keeping(excess: pd.DataFrame, groups: Mapping[str, str] | None = None) -> InlineFigure:
    """What attacks bring back beyond an oracle's floor, upwards with its 95% interval, against H as a share of what it
    could be, to the right; a panel for each attack. Below and to the right is better.

    Args:
        excess: rows with preset, attack, h_of_ceiling, excess, low, high, as excess.csv of `fmn-nb benchmark` has them.
        groups: preset -> a group that shares its look; its own name stands beside its point.

    Raises:
        ValueError: there is no row.
    """
    if excess.empty:
        raise ValueError("no attack was measured beside an oracle")
    shared, attacks = groups or {}, list(excess["attack"].unique())
    figure, panels = new_figure(1.0 + 4.2 * len(attacks), 4.0, len(attacks), sharex=True, sharey=True)
    said = []
    for axes, attack in zip(panels, attacks, strict=True):
        rows = excess[excess["attack"] == attack]
        axes.axhline(0, color="0.35", linestyle="--", linewidth=1)
        _points(axes, pd.DataFrame({
            "group": [shared.get(name, name) for name in rows["preset"]], "name": rows["preset"] if shared else "",
            "x": rows["h_of_ceiling"], "y": rows["excess"], "y_low": rows["low"], "y_high": rows["high"]}))
        axes.set(title=attack, ylim=(min(-0.2, 1.1 * excess["low"].min()), 1.06),
                 xlabel="H, as a share of what it could be")
        said.append(f"{attack}: " + ", ".join(f"{row.preset} {row.excess:.2f} at H {row.h_of_ceiling:.2f}"
                                              for row in rows.itertuples()))
    panels[0].set(ylabel="excess over the oracle's floor")
    _legend(panels[0], below=bool(shared))  # names stand beside the points, where a legend would be in their way
    for axes in panels:
        _names_apart(axes)
    figure.words = "; ".join(said) + "."
    return figure


def forgotten_and_kept(measures: pd.DataFrame, runs: pd.DataFrame, by: str | None = None,
                       along: str | None = None) -> InlineFigure:
    """Two panels with UA to the right: IRA upwards in one, CRA in the other. One point per run, with both intervals.

    Args:
        by: the column of `runs` whose values have a colour each.
        along: the column whose order joins the points of a colour.

    Raises:
        ValueError: no run has UA, IRA and CRA.
    """
    forgotten, *kept = (_axis(measures, name, axis) for name, axis in (("ua", "x"), ("ira", "y"), ("cra", "y")))
    values = pd.DataFrame({"UA": forgotten["x"], "IRA": kept[0]["y"], "CRA": kept[1]["y"]}).reindex(runs.index).dropna()
    if values.empty:
        raise ValueError("no finished run has UA, IRA and CRA; these come with notebook 04")
    lows = pd.concat([forgotten["x_low"], *(table["y_low"] for table in kept)]).loc[values.index]
    least = math.floor(10 * min(values.min().min(), lows.min())) / 10  # nothing below, and both axes alike
    points = _grouped(runs.loc[values.index], by, along).join(forgotten)
    points["name"] = runs.loc[points.index, along].map(_short) if along else ""
    figure, panels = new_figure(9.0, 4.2, 2, sharex=True, sharey=True)
    for axes, name, table in zip(panels, ("ira", "cra"), kept, strict=True):
        _points(axes, points.join(table), ":" if along else "none")
        axes.set(**_square(NAMES[name], least))
    _legend(panels[0], "lower left", by)
    figure.suptitle("Forgetting against keeping" + (f", numbers: {along}" if along else ""))
    spans = ", ".join(f"{name} from {of.min():.2f} to {of.max():.2f}" for name, of in values.items())
    best = values.min(axis=1).idxmax()
    named = ", ".join(f"{name} {_short(runs.loc[best, name])}" for name in (by, along) if name in runs) or best
    figure.words = f"{len(values)} runs. {spans}. The smallest of the three is largest for {named}."
    return figure


def _legend(axes: Axes, place: str = "best", title: str | None = None, below: bool = False) -> None:
    """A legend inside the axes, or below the figure if it would cover the points or if asked for."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= MOST_INSIDE and not below:
        axes.legend(fontsize=8, loc=place, title=title)
        return
    figure = axes.figure
    width, height = figure.get_size_inches()
    for columns in range(COLUMNS_BELOW, 0, -1):  # as many as long names leave room for
        legend = figure.legend(handles, labels, fontsize=7, ncols=columns, loc="outside lower center", title=title)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_size_inches(width, height + 0.2 * -(-len(labels) // columns))  # a row more for each row of the legend


def _names_apart(axes: Axes) -> None:
    """Leave out names that would cover a point or a name before them; call it when everything else is in place."""
    axes.figure.draw_without_rendering()  # or the texts have no extent yet
    dots = axes.transData.transform(np.concatenate([line.get_xydata() for line in axes.lines]))  # [points, 2]
    taken = [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in dots]
    for text in list(axes.texts):
        box = text.get_window_extent()
        if box.count_overlaps(taken):
            text.remove()
        else:
            taken.append(box)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis whose ticks have plain numbers (20, 500k), more of them where it spans little."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < FEW_DECADES else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _square(kept: str = NAMES["kept"], least: float = 0.0) -> dict[str, object]:
    """What the axes of the figures above have in common: a square from `least` to 1."""
    return {"xlim": (least - 0.04, 1.06), "ylim": (least - 0.04, 1.06), "xlabel": NAMES["ua"], "ylabel": kept}


def _points(axes: Axes, points: pd.DataFrame, line: str = "none") -> None:
    """Draw each group's points in its look, and their names in its colour.

    Columns: group, x, y, name and, if there are intervals, x_low, x_high and so on.
    """
    for number, (group, rows) in enumerate(points.groupby("group", sort=False)):
        colour, marker = look(number)
        whiskers = {}  # lengths below and above; 0 where a point has no interval
        for axis in [one for one in "xy" if f"{one}_low" in rows]:
            lengths = rows[axis] - rows[f"{axis}_low"], rows[f"{axis}_high"] - rows[axis]
            whiskers[f"{axis}err"] = [one.clip(lower=0).fillna(0) for one in lengths]
        axes.errorbar(rows["x"], rows["y"], color=colour, marker=marker, linestyle=line, linewidth=1, elinewidth=0.8,
                      capsize=2, alpha=0.8, label=group, **whiskers)
        for point in rows[rows["name"] != ""].itertuples():
            left = point.x > 0.75  # or a name would leave the figure
            axes.annotate(point.name, (point.x, point.y), xytext=(-5 if left else 5, 4), textcoords="offset points",
                          fontsize=7, color=colour, ha="right" if left else "left")


def measure_along(measures: pd.DataFrame, runs: pd.DataFrame, measure: str, along: str,
                  by: str | None = None) -> InlineFigure:
    """A measure after forgetting along a parameter, with each run's interval; a dashed line for the mean before.

    Raises:
        ValueError: no finished run has the measure, or the runs have no column `along`.
    """
    table = _axis(measures, measure, "y")
    runs = runs[runs.index.isin(table.index)]
    if runs.empty:
        known = ", ".join(sorted(measures.loc[measures["when"] == "after", "measure"].unique())) or "none"
        raise ValueError(f"no finished run has the measure '{measure}'; those there are: {known}")
    if along not in runs:
        raise ValueError(f"the runs have no column '{along}'; there are: {', '.join(map(str, runs.columns[:12]))} ...")
    points, values = _grouped(runs, by, along).join(table), runs[along].where(runs[along].notna(), "none")
    numbers = pd.api.types.is_numeric_dtype(values)  # stand at themselves, names at 0, 1, 2 and so on
    ordered = sorted(values.unique(), key=lambda value: (isinstance(value, str), value))
    places = {value: float(value if numbers else number) for number, value in enumerate(ordered)}
    points = points.assign(x=values.map(places), at=values.map(_short))
    figure, (axes,) = new_figure(6.0, 3.8)
    _points(axes, points, "-")
    mean = _axis(measures, measure, "before", "before")["before"].reindex(runs.index).mean()
    if pd.notna(mean):
        axes.axhline(mean, color="0.35", linestyle="--", linewidth=1, label=f"before, on average {mean:.2f}")
        if measure in NAMES:
            axes.set_ylim(-0.04, 1.06)
    axes.set_xticks(list(places.values()), [_short(value) for value in places])
    axes.set(xlabel=along, ylabel=NAMES.get(measure, measure), title=f"{measure.upper()} along {along}")
    _legend(axes, title=by)
    figure.words = "; ".join(f"{group}: " + ", ".join(f"{point.y:.2f} at {point.at}" for point in rows.itertuples())
                             for group, rows in points.groupby("group", sort=False)) + "."
    return figure


def cost_and_quality(measures: pd.DataFrame, runs: pd.DataFrame, cost: str = "forgetting.seconds", measure: str = "h",
                     by: str | None = None) -> InlineFigure:
    """A measure after forgetting against what a run cost; `cost` is a numeric column of the runs.

    Raises:
        ValueError: no finished run has both.
    """
    table = _axis(measures, measure, "y")
    table["x"] = pd.to_numeric(runs[cost], errors="coerce") if cost in runs else None
    runs = runs[runs.index.isin(table.dropna(subset="x").index)]
    if runs.empty:
        raise ValueError(f"no finished run has both {cost} and {measure}")
    points = _grouped(runs, by, None).join(table)
    figure, (axes,) = new_figure(6.0, 3.8)
    _points(axes, points)
    axes.set_xlim(left=0)
    names = cost.replace(".", ": "), NAMES.get(measure, measure)
    axes.set(xlabel=names[0], ylabel=names[1], title="What it cost, what it gave")
    _legend(axes, title=by)
    figure.words = f"{len(runs)} runs, each a point: {names[0]} to the right, {names[1]} upwards."
    return figure


def _axis(measures: pd.DataFrame, name: str, axis: str, when: str = "after") -> pd.DataFrame:
    """One measure by run as an axis of `_points`."""
    rows = measures[(measures["measure"] == name) & (measures["when"] == when)].set_index("run")
    return rows[["value", "low", "high"]].set_axis([axis, f"{axis}_low", f"{axis}_high"], axis=1)


def _grouped(runs: pd.DataFrame, by: str | None, along: str | None) -> pd.DataFrame:
    """Each run's group, its value of `by` in words; groups in order, and in each the runs in the order of `along`."""
    columns = [column for column in dict.fromkeys((by, along)) if column in runs]
    ordered = runs.sort_values(columns, kind="stable") if columns else runs
    groups = ordered[by].map(_short) if by in runs else pd.Series("all runs", ordered.index)
    return groups.to_frame("group").assign(name="")


def _short(value: object) -> str:
    if pd.isna(value):  # an empty setting, which a table holds as nothing
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
