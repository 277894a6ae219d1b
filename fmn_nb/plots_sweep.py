"""Figures of many runs: what is forgotten against what is kept, a measure along a parameter, cost against quality.

All take a sweep's long table of measures (`SweepResults.measures`) and its runs. A whisker is the 95% interval over one
run's images; it says nothing of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd
from PIL import Image

from fmn_nb.plots_benchmark import look
from fmn_nb.plots_figure import InlineFigure, new_figure

ALL = "all runs"
NAMES = {"ua": "forgotten: UA", "ira": "kept nearby: IRA", "cra": "kept elsewhere: CRA", "h": "harmonic mean: H"}


def forgotten_and_kept(measures: pd.DataFrame, runs: pd.DataFrame, by: str | None = None,
                       along: str | None = None) -> InlineFigure:
    """Two panels, UA to the right in both: IRA upwards in one, CRA in the other. A point a run, with both intervals.

    Args:
        by: the column of `runs` whose values have a colour each.
        along: the column in whose order the points of a colour are joined.

    Raises:
        ValueError: no run has UA, IRA and CRA.
    """
    tables = {name: of_measure(measures, name) for name in ("ua", "ira", "cra")}
    shown = [run for run in runs.index if all(run in table.index for table in tables.values())]
    if not shown:
        raise ValueError("no finished run has UA, IRA and CRA; these come with notebook 04")
    ends = pd.concat([table.loc[shown, ["value", "low"]].min(axis=1) for table in tables.values()])
    least = math.floor(10 * ends.min()) / 10  # nothing below, and both axes alike
    figure = new_figure(9.0, 4.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, kept in zip(panels, ("ira", "cra"), strict=True):
        for name, group, colour, marker in _groups(runs.loc[shown], by, along):
            x, y = tables["ua"].loc[group.index], tables[kept].loc[group.index]
            axes.errorbar(x["value"], y["value"], xerr=_whiskers(x), yerr=_whiskers(y), color=colour, marker=marker,
                          linestyle=":" if along else "none", linewidth=1, elinewidth=0.8, alpha=0.8, label=name)
            for run in group.index if along else ():
                axes.annotate(_short(group.loc[run, along]), (x.loc[run, "value"], y.loc[run, "value"]),
                              xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
        axes.set(xlim=(least - 0.04, 1.06), ylim=(least - 0.04, 1.06), xlabel=NAMES["ua"], ylabel=NAMES[kept])
    panels[0].legend(fontsize=8, loc="lower left", title=by)
    figure.suptitle("Forgetting against keeping" + (f", numbers: {along}" if along else ""))
    best = max(shown, key=lambda run: min(table.loc[run, "value"] for table in tables.values()))
    spans = ", ".join(f"{name.upper()} from {_span(table, shown)}" for name, table in tables.items())
    figure.words = (f"{len(shown)} runs. {spans}. The smallest of the three is largest for "
                    f"{_named(runs, best, by, along)}.")
    return figure


def measure_along(measures: pd.DataFrame, runs: pd.DataFrame, measure: str, along: str,
                  by: str | None = None) -> InlineFigure:
    """A measure after forgetting along a parameter, with each run's interval; a dashed line for the mean before.

    Raises:
        ValueError: no finished run has the measure, or `along` is no column of the runs.
    """
    table = of_measure(measures, measure)
    shown = [run for run in runs.index if run in table.index]
    if not shown:
        known = ", ".join(sorted(measures.loc[measures["when"] == "after", "measure"].unique())) or "none"
        raise ValueError(f"no finished run has the measure '{measure}'; those there are: {known}")
    if along not in runs:
        raise ValueError(f"the runs have no column '{along}'; there are: {', '.join(map(str, runs.columns[:12]))} ...")
    figure = new_figure(6.0, 3.8)
    axes = figure.subplots()
    places = _places(runs.loc[shown, along])
    sentences = []
    for name, group, colour, marker in _groups(runs.loc[shown], by, along):
        x, y = [places[value] for value in group[along]], table.loc[group.index]
        axes.errorbar(x, y["value"], yerr=_whiskers(y), color=colour, marker=marker, linewidth=1, capsize=3, label=name)
        sentences.append(f"{name}: " + ", ".join(f"{value:.2f} at {_short(there)}" for value, there in
                                                 zip(y["value"], group[along], strict=True)))
    before = of_measure(measures, measure, "before")
    before = before[before.index.isin(shown)]
    if len(before):
        mean = before["value"].mean()
        axes.axhline(mean, color="0.35", linestyle="--", linewidth=1, label=f"before, on average {mean:.2f}")
    axes.set_xticks(list(places.values()), [_short(value) for value in places])
    if len(before) and measure in NAMES:
        axes.set_ylim(-0.04, 1.06)
    axes.set(xlabel=along, ylabel=NAMES.get(measure, measure), title=f"{measure.upper()} along {along}")
    axes.legend(fontsize=8, title=by)
    figure.words = "; ".join(sentences) + "."
    return figure


def cost_and_quality(measures: pd.DataFrame, runs: pd.DataFrame, cost: str = "forgetting.seconds", measure: str = "h",
                     by: str | None = None) -> InlineFigure:
    """A measure after forgetting against what a run cost; `cost` is a numeric column of the runs.

    Raises:
        ValueError: no finished run has both.
    """
    table = of_measure(measures, measure)
    spent = pd.to_numeric(runs[cost], errors="coerce").dropna() if cost in runs else pd.Series(dtype=float)
    shown = [run for run in spent.index if run in table.index]
    if not shown:
        raise ValueError(f"no finished run has both {cost} and {measure}")
    figure = new_figure(6.0, 3.8)
    axes = figure.subplots()
    for name, group, colour, marker in _groups(runs.loc[shown], by, None):
        y = table.loc[group.index]
        axes.errorbar(spent[group.index], y["value"], yerr=_whiskers(y), color=colour, marker=marker, linestyle="none",
                      capsize=3, label=name)
    axes.set_xlim(left=0)
    axes.set(xlabel=cost.replace(".", ": "), ylabel=NAMES.get(measure, measure), title="What it cost, what it gave")
    axes.legend(fontsize=8, title=by)
    figure.words = (f"{len(shown)} runs, each a point: {cost.replace('.', ': ')} to the right, "
                    f"{NAMES.get(measure, measure)} upwards.")
    return figure


def pictures(images: Sequence[Image.Image], titles: Sequence[str]) -> InlineFigure:
    """Images one below the other, each under its title.

    Raises:
        ValueError: no images, or titles that are not one for each.
    """
    if not images or len(images) != len(titles):
        raise ValueError(f"{len(titles)} titles for {len(images)} images; give one for each, at least one")
    width = 6.4
    heights = [width * image.height / image.width for image in images]
    figure = new_figure(width, sum(heights) + 0.3 * len(images))
    panels = figure.subplots(len(images), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, image, title in zip(panels, images, titles, strict=True):
        axes.imshow(image.convert("RGB"))
        axes.set_axis_off()
        axes.set_title(title, fontsize=9)
    figure.words = "From top to bottom: " + "; ".join(titles) + "."
    return figure


def of_measure(measures: pd.DataFrame, name: str, when: str = "after") -> pd.DataFrame:
    """One measure by run: columns value, low, high."""
    rows = measures[(measures["measure"] == name) & (measures["when"] == when)]
    return rows.set_index("run")[["value", "low", "high"]]


def _named(runs: pd.DataFrame, run: str, *columns: str | None) -> str:
    """A run by its values in some columns, else by its folder's name."""
    return ", ".join(f"{name} {_short(runs.loc[run, name])}" for name in columns if name in runs) or run


def _groups(runs: pd.DataFrame, by: str | None, along: str | None) -> Iterator[tuple[str, pd.DataFrame, str, str]]:
    """(name, its runs in the order of `along`, colour, marker) for each value of `by`."""
    ordered = runs.sort_values(along, kind="stable") if along in runs else runs
    groups = ordered.groupby(by, sort=True) if by in runs else [(ALL, ordered)]
    for number, (name, group) in enumerate(groups):
        yield _short(name), group, *look(number)


def _whiskers(table: pd.DataFrame) -> list[pd.Series]:
    """Lengths below and above; 0 where there is no interval."""
    lengths = table["value"] - table["low"], table["high"] - table["value"]
    return [one.clip(lower=0).fillna(0) for one in lengths]


def _places(values: pd.Series) -> dict[object, float]:
    """Where each value stands on the axis: numbers at themselves, names at 0, 1, 2 and so on."""
    ordered = sorted(values.unique(), key=lambda value: (isinstance(value, str), value))
    return {value: float(value) if pd.api.types.is_numeric_dtype(values) else float(number)
            for number, value in enumerate(ordered)}


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _span(table: pd.DataFrame, runs: list[str]) -> str:
    values = table.loc[runs, "value"]
    return f"{values.min():.2f} to {values.max():.2f}"
