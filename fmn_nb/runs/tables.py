"""What a benchmark makes of its results: the tables, the record of how they were made, and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.files import replacing, versions, write_json, write_text
from fmn_nb.forgetting.settings import FACTS, Settings
from fmn_nb.runs.earlier import DISTANCES_FILE, EXCESS_FILE, RESULTS_FILE, TABLE_FILE
from fmn_nb.runs.means import SHARES, TUNED_ON, distance_summary, excess_summary, summary

if TYPE_CHECKING:
    import pandas as pd

    from fmn_nb.runs.benchmark import Job

SCHEMA = 1


def write_results(out: Path, found: Mapping[Job, Mapping[str, Any]], made: Mapping[str, Any],
                   told: Mapping[str, Any]) -> Path:
    """Write the table of the done jobs as CSV, how it was made as JSON, and the figures."""
    from fmn_nb.plots.tradeoff import cost_of_presets, forgetting_against_keeping

    table = table_of(found, made.get(TUNED_ON, ()))
    means = summary(table)
    write_text(out / TABLE_FILE, table.to_csv(index=False, lineterminator="\n"))
    budgets = [result["attack"]["budget"] for result in found.values() if "attack" in result]
    attacks = {"attack": {"name": "concept inversion", "budget": budgets[0]}} if budgets else {}
    compared = [result["oracle"]["compared_with"] for result in found.values() if "oracle" in result]
    tuned = made.get(TUNED_ON, ())
    excess, distances = excess_of(found, tuned), distances_of(found, tuned)
    for name, beside in ((EXCESS_FILE, excess), (DISTANCES_FILE, distances)):
        if len(beside):
            write_text(out / name, beside.to_csv(index=False, lineterminator="\n"))
        else:
            (out / name).unlink(missing_ok=True)  # of other settings
    if compared:
        attacks["oracle"] = {**compared[0], "summary": excess_summary(excess) if len(excess) else [],
                             "distances": distance_summary(distances)}
    write_json(out / RESULTS_FILE, {
        "schema": SCHEMA, **made, "size": next(iter(found)).size, "seeds": sorted({job.seed for job in found}),
        "settings": {job.preset: job.settings.to_dict() for job in found}, "versions": versions(),
        "summary": means, **attacks, **told,
    })
    groups = groups_of({job.preset: job.settings for job in found})
    for name, figure in (("forgetting-against-keeping", forgetting_against_keeping(table, groups)),
                         ("cost", cost_of_presets(means, groups))):
        with replacing(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", metadata={"Description": figure.words})
    return out / TABLE_FILE


def groups_of(variants: Mapping[str, Settings]) -> dict[str, str] | None:
    """What shares a look in the figures if there are more variants than looks: the method, and what it trains if that
    differs between its variants. None if each can have its own.
    """
    from fmn_nb.plots.style import LOOKS

    if len(variants) <= LOOKS:
        return None
    trained: dict[str, set[str]] = {}
    for one in variants.values():
        trained.setdefault(one.method, set()).add(one.train if FACTS[one.method].trains else "")
    return {name: f"{one.method}, {one.train}" if len(trained[one.method]) > 1 else one.method
            for name, one in variants.items()}


def table_of(found: Mapping[Job, Mapping[str, Any]], tuned: Sequence[str] = ()) -> pd.DataFrame:
    """A row per job: concept, kind, preset, seed, figures with 95% intervals, costs, what the method needs; whether it
    drew all images itself, so that its seconds are complete, and whether settings were tuned on its concept.

    An empty cell means not measured.
    """
    import pandas as pd

    table = pd.DataFrame([result["row"] if "row" in result else _row(job, result) for job, result in found.items()])
    return table.assign(tuned_on=table["concept"].isin(list(tuned)))


def _row(job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
    before, after, cost = result["before"], result["after"], result["forgetting"]
    row: dict[str, Any] = {"concept": job.concept.name, "kind": job.group, "preset": job.preset, "seed": job.seed,
                           "images": after["images"]}
    for name in SHARES:
        row |= _with_bounds(name, after[name], *after["ci95"][name])
    row |= {"ceiling": after["ceiling"], "h_of_ceiling": _h_of_ceiling(result)}
    row |= {f"base_{name}": before[name] for name in ("ua", "ira", "cra")}
    row |= {name: cost.get(name) for name in ("steps", "seconds", "peak_memory_bytes", "patch_bytes",
                                              "trainable_parameters")}
    if overshadowed := result.get("overshadowed"):
        share = overshadowed["after"]
        row |= {"overshadowed_before": overshadowed["before"]["value"],
                **_with_bounds("overshadowed_after", share["value"], share["low"], share["high"]),
                "overshadowed_images": share["images"]}
    if attack := result.get("attack"):
        row |= {**_with_bounds("attack_success", attack["success"], attack["low"], attack["high"]),
                "attack_images": attack["count"]}
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
    return rounded | {"job_seconds": result.get("seconds"), "drew_all": result.get("draws"), **result.get("facts", {})}


def excess_of(found: Mapping[Job, Mapping[str, Any]], tuned: Sequence[str] = ()) -> pd.DataFrame:
    """A row for each job, attack and budget that was measured beside an oracle: success, floor, unchanged, excess with
    its 95% interval, residual knowledge, and the steps to revive of the forgetting model and the oracle; these are
    empty where the attack had no `whole_curve`, and where it ended before.
    """
    import pandas as pd

    rows = []
    for job, result in found.items():
        rows += [{**row, "tuned_on": job.concept.name in tuned} for row in result.get("oracle", {}).get("excess", ())]
        revive = result.get("oracle", {}).get("steps_to_revive", {})
        for attack in result.get("oracle", {}).get("attacks", ()):
            back = revive.get(attack["attack"], {})
            rows.append({"concept": job.concept.name, "kind": job.group, "preset": job.preset, "seed": job.seed,
                         "h_of_ceiling": _h_of_ceiling(result), **attack,
                         "steps_to_revive": back.get("forgetting model"), "oracle_steps": back.get("oracle"),
                         "whole_curve": attack["attack"] in revive,
                         "tuned_on": job.concept.name in tuned})
    return pd.DataFrame(rows).round(6)


def distances_of(found: Mapping[Job, Mapping[str, Any]], tuned: Sequence[str] = ()) -> pd.DataFrame:
    """A row for each job and distance that was measured beside an oracle: the value, the unchanged model's, that of a
    second oracle (0 without one), and the value on the scale from there to the unchanged model.
    """
    import pandas as pd

    rows = []
    for job, result in found.items():
        beside = result.get("oracle", {})
        own = {"concept": job.concept.name, "kind": job.group, "preset": job.preset, "seed": job.seed}
        new = [{**own, "distance": name, **values} for name, values in beside.get("distance", {}).items()]
        rows += [{**row, "tuned_on": job.concept.name in tuned} for row in (*beside.get("distances", ()), *new)]
    columns = ["concept", "kind", "preset", "seed", "distance", "value", "unchanged", "zero", "second", "scaled",
               TUNED_ON]
    return pd.DataFrame(rows, columns=columns).round(6)


def _h_of_ceiling(result: Mapping[str, Any]) -> float | None:
    after = result["after"]
    return after["h"] / after["ceiling"] if after["ceiling"] else None


def _with_bounds(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}
