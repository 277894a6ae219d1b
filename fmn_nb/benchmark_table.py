"""Jobs' results as a table: a row a job, means over concepts with intervals, and how all of it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fmn_nb.benchmark_plan import Job
from fmn_nb.intervals import bootstrap
from fmn_nb.results import versions

SCHEMA = 1
#: of every row, with its 95% interval beside it
SHARES = ("ua", "ira", "cra", "h")
#: averaged over concepts; "h_of_ceiling" is h divided by its ceiling, the share reached of what could be reached
AVERAGED = ("ua", "ira", "cra", "h", "ceiling", "h_of_ceiling", "seconds", "patch_bytes", "peak_memory_bytes",
            "attack_success", "overshadowed_after")
#: what differs between two machines, or two runs on one
COSTS = ("seconds", "peak_memory_bytes")


def table_of(found: Mapping[Job, Mapping[str, Any]]) -> pd.DataFrame:
    """A row per job: concept, kind, preset, seed, figures with 95% intervals, costs. Empty cells: not measured."""
    return pd.DataFrame([_row(job, result) for job, result in found.items()])


def _row(job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
    before, after, cost = result["before"], result["after"], result["forgetting"]
    row: dict[str, Any] = {"concept": job.concept.name, "kind": job.group, "preset": job.preset, "seed": job.seed,
                           "images": after["images"]}
    for name in SHARES:
        row |= {name: after[name], f"{name}_low": after["ci95"][name][0], f"{name}_high": after["ci95"][name][1]}
    row |= {"ceiling": after["ceiling"], "h_of_ceiling": after["h"] / after["ceiling"] if after["ceiling"] else None}
    row |= {f"base_{name}": before[name] for name in ("ua", "ira", "cra")}
    row |= {name: cost.get(name) for name in ("steps", "seconds", "peak_memory_bytes", "patch_bytes",
                                              "trainable_parameters")}
    if overshadowed := result.get("overshadowed"):
        row["overshadowed_before"] = overshadowed["before"]["value"]
        share = overshadowed["after"]
        row |= {"overshadowed_after": share["value"], "overshadowed_after_low": share["low"],
                "overshadowed_after_high": share["high"], "overshadowed_images": share["images"]}
    if attack := result.get("attack"):
        row |= {"attack_success": attack["success"], "attack_success_low": attack["low"],
                "attack_success_high": attack["high"], "attack_images": attack["count"]}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}


def summary(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each preset, over all concepts and by kind: how many, each figure's mean over concepts, and which reached the
    smallest share of its ceiling.

    The 95% intervals are bootstrapped over concepts (a concept's seeds are averaged first): they say how much the mean
    depends on which concepts are forgotten, and are left out for a single concept.
    """
    rows = []
    for preset, of_preset in table.groupby("preset", sort=False):
        for kind, group in [("all", of_preset), *of_preset.groupby("kind", sort=False)]:
            columns = [name for name in AVERAGED if name in group]
            means = group.groupby("concept", sort=False)[columns].mean()
            row: dict[str, Any] = {"preset": preset, "kind": kind, "concepts": len(means)}
            for name in columns:
                values = means[name].dropna().to_numpy(float)
                row |= _mean(name, values) if len(values) else {}
            reached = means["h_of_ceiling"].dropna()
            if len(reached):
                row["lowest"] = {"concept": reached.idxmin(), "h_of_ceiling": round(float(reached.min()), 6)}
            rows.append(row)
    return rows


def _mean(name: str, values: np.ndarray) -> dict[str, Any]:
    mean = {name: round(float(values.mean()), 6)}
    if len(values) == 1 or name in COSTS:
        return mean
    return mean | {f"{name}_ci95": [round(bound, 6) for bound in bootstrap([values], lambda value: value)]}


def how_made(made: Mapping[str, Any], found: Mapping[Job, Mapping[str, Any]], table: pd.DataFrame,
             missing: Sequence[str], failures: Sequence[str]) -> dict[str, Any]:
    """What results.json holds: the command, model, settings and versions behind the table, and its summary."""
    settings = {job.preset: job.settings.to_dict() for job in found}
    first = next(iter(found))
    content = {"schema": SCHEMA, **made, "size": first.size, "seeds": sorted({job.seed for job in found}),
               "settings": settings, "versions": versions(), "summary": summary(table)}
    budgets = [result["attack"]["budget"] for result in found.values() if "attack" in result]
    content |= {"attack": {"name": "concept inversion", "budget": budgets[0]}} if budgets else {}
    content |= {"missing": list(missing)} if missing else {}
    return content | ({"failed": list(failures)} if failures else {})


def describe(job: Job, result: Mapping[str, Any]) -> str:
    """One line on a finished job."""
    after, cost = result["after"], result["forgetting"]
    text = (f"{job.name}: UA {after['ua']:.2f}  IRA {after['ira']:.2f}  CRA {after['cra']:.2f}  H {after['h']:.2f} "
            f"of {after['ceiling']:.2f}  {cost['seconds']:.0f} s")
    if overshadowed := result.get("overshadowed"):
        text += f"  '{job.towards}' {overshadowed['before']['value']:.2f} to {overshadowed['after']['value']:.2f}"
    return text + (f"  attack {result['attack']['success']:.2f}" if "attack" in result else "")
