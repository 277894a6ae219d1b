"""What a benchmark's tables say on average: means over concepts with their intervals, and paired differences.

The tables are `fmn_nb.runs.tables`'s. Concepts that settings were tuned on count in no mean, unless there are no
others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fmn_nb.stats import mean_difference_interval, mean_interval, mean_share_interval

if TYPE_CHECKING:
    import pandas as pd

#: in a settings file, the concepts that its settings were chosen on; in a table, whether a row's concept is one of them
TUNED_ON = "tuned_on"
#: every row's figures with a 95% interval beside them
SHARES = ("ua", "ira", "cra", "h")
#: what differs between two machines, or two runs on one
COSTS = ("seconds", "peak_memory_bytes")
#: averaged over concepts; "h_of_ceiling" is h divided by its ceiling, the share reached of what could be reached
AVERAGED = (*SHARES, "ceiling", "h_of_ceiling", "seconds", "patch_bytes", "peak_memory_bytes", "attack_success",
            "overshadowed_after")
#: shares
WITHIN = (*SHARES, "ceiling", "h_of_ceiling", "attack_success", "overshadowed_after")
PAIRED = 3  # the fewest concepts on which two presets' difference is given


def summary(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each preset, over all concepts and by kind: how many there are, each figure's mean over concepts, and which
    concept reached the smallest share of its ceiling; over all, how it differs from every other preset (`against`).

    Concepts that settings were tuned on count only if there are no others. Seconds are those of jobs that drew all
    images themselves, if there are any. The 95% intervals are Student's over concepts (a concept's seeds are
    averaged first), within what is possible: they say how much the mean depends on which concepts are forgotten. A
    bootstrap of three concepts would miss the mean of all in one case of four. A single concept has none, and equal
    values have none. The success of an attack, which is often 0, has an interval over concepts and images
    (`mean_share_interval`).
    """
    table = _headline(table)
    if "drew_all" in table and table["drew_all"].any():
        table = table.assign(seconds=table["seconds"].where(table["drew_all"].eq(True)))
    rows = []
    for preset, of_preset in table.groupby("preset", sort=False):
        for kind, group in [("all", of_preset), *of_preset.groupby("kind", sort=False)]:
            means = group.groupby("concept", sort=False)[[name for name in AVERAGED if name in group]].mean()
            row: dict[str, Any] = {"preset": preset, "kind": kind, "concepts": len(means)}
            for name, values in means.items():
                row |= _mean(name, values.dropna())
            if "attack_success" in row:
                attacked = _counts(group.dropna(subset="attack_success"), "attack_success", "attack_images")
                row["attack_success_ci95"] = _rounded(mean_share_interval(attacked))
            reached = means["h_of_ceiling"].dropna()
            if len(reached):
                row["lowest"] = {"concept": reached.idxmin(), "h_of_ceiling": round(float(reached.min()), 6)}
            rows.append(row | ({"against": against(table, preset)} if kind == "all" else {}))
    return rows


def against(table: pd.DataFrame, preset: str) -> dict[str, dict[str, Any]]:
    """Other preset -> this one's figures minus the other's, on the concepts and seeds that both have.

    It is the mean over concepts (each the mean of its seeds' differences), with Student's 95% interval over
    concepts. Fewer than `PAIRED` common concepts say too little: such a pair is left out.
    """
    pairs = table.set_index(["concept", "seed"])
    own, found = pairs[pairs["preset"] == preset], {}
    for other, theirs in pairs[pairs["preset"] != preset].groupby("preset", sort=False):
        difference = (own[list(SHARES)] - theirs[list(SHARES)]).dropna()
        means = difference.groupby("concept", sort=False).mean()
        if len(means) < PAIRED:
            continue
        found[other] = {"concepts": len(means), "pairs": len(difference)}
        for name, values in means.items():
            found[other] |= _mean(name, values, least=-1.0)
    return found


def excess_summary(excess: pd.DataFrame) -> list[dict[str, Any]]:
    """For each preset, attack and budget the means over concepts, with 95% intervals over concepts and images
    (`mean_difference_interval`); and, of the concepts on which the attack has a whole curve (`curves`), how many it
    revived, with the median of the steps over all of them, if it lies within the curve.

    Concepts that settings were tuned on count only where there are no others.
    """
    rows = []
    for (preset, attack, budget), group in _headline(excess).groupby(["preset", "attack", "budget"], sort=False):
        means = group.groupby("concept", sort=False)[["success", "floor", "unchanged", "excess"]].mean()
        row: dict[str, Any] = {"preset": preset, "attack": attack, "budget": budget, "concepts": len(means),
                               "steps": int(group["steps"].iloc[0])}
        row |= {name: round(float(values.mean()), 6) for name, values in means.items()}
        images = {"success": "images", "floor": "floor_images", "unchanged": "images"}
        counts = {name: _counts(group, name, of) for name, of in images.items()}
        bounds = {name: mean_share_interval(some) for name, some in counts.items()}
        bounds["excess"] = mean_difference_interval(counts["success"], counts["floor"])
        row |= {f"{name}_ci95": _rounded(some) for name, some in bounds.items()}
        rows.append(row | _revived(group))
    return rows


def _revived(group: pd.DataFrame) -> dict[str, Any]:
    curves = group[group["whole_curve"].eq(True)] if "whole_curve" in group else group[:0]
    if not len(curves):
        return {}
    steps = curves["steps_to_revive"]
    median = float(steps.fillna(math.inf).median())
    return {"curves": curves["concept"].nunique(), "revived": curves.loc[steps.notna(), "concept"].nunique(),
            **({"median_steps": median} if math.isfinite(median) else {})}


def distance_summary(distances: pd.DataFrame) -> list[dict[str, Any]]:
    """For each preset and distance the mean over concepts of the scaled value, with Student's 95% interval over
    them.

    Concepts that settings were tuned on count only where there are no others.
    """
    rows = []
    for (preset, distance), group in _headline(distances).groupby(["preset", "distance"], sort=False):
        means = group.groupby("concept", sort=False)["scaled"].mean().dropna()
        rows.append({"preset": preset, "distance": distance, "concepts": len(means), **_mean("scaled", means)})
    return rows


def _headline(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that means are made of: without concepts that settings were tuned on, unless there are no others."""
    return table[~table[TUNED_ON]] if TUNED_ON in table and not table[TUNED_ON].all() else table


def _counts(table: pd.DataFrame, share: str, images: str) -> list[list[tuple[int, int]]]:
    """For each concept, the successes and images of each of its rows, from the share and the number of images."""
    return [[(round(value * count), int(count)) for value, count in zip(rows[share], rows[images], strict=True)]
            for _, rows in table.groupby("concept", sort=False)]


def _mean(name: str, values: pd.Series, least: float = 0.0) -> dict[str, Any]:
    """A figure's mean over concepts and its interval; nothing for no values.

    Args:
        least: the smallest possible value of a share, -1 for a difference of two; the largest is 1.
    """
    if not len(values):
        return {}
    mean = {name: round(float(values.mean()), 6)}
    if name in COSTS or values.nunique() == 1:
        return mean  # equal values don't tell how far others would be from them
    low, high = mean_interval(values.to_numpy(float))
    if name in WITHIN:
        low, high = max(low, least), min(high, max(1.0, mean[name]))  # by chance, more than the ceiling is reached
    return mean | {f"{name}_ci95": _rounded((low, high))}


def _rounded(bounds: tuple[float, float]) -> list[float]:
    return [round(float(bound), 6) for bound in bounds]
