"""A sweep's folder as tables: a row a run, and a row for each of a run's measures with its interval.

What a sweep left is read as it is: failed and unfinished runs have their rows, and whatever can't be read is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmn_nb.files import read_json
from fmn_nb.results import MEASURED, METRICS_FILE, flat, validate

SWEEP_FILE, TABLE, RUN_FILE = "sweep.json", "results.csv", "run.json"
FRACTIONS = ("ua", "ira", "cra", "h")
_COLUMNS = ("status", "seconds", "error")
_NO_MEASURES = ("ci95", "skipped", "images", "features")


class SweepReadingError(ValueError):
    """The folder holds no sweep, or none that can be read; the text says what was looked for."""


@dataclass(frozen=True)
class SweepResults:
    """What a sweep left.

    Attributes:
        folder: where it lies.
        planned: how many runs its specification has.
        varied: names of the settings and parameters that differ between its runs.
        notebooks: what one run executes.
        runs: a row a run, by the name of its folder: status (done, failed, unfinished), seconds, error, settings,
            parameters, and every figure of its `metrics.json` under its flat name ("after.ua", "forgetting.seconds").
        specification: what was asked for, as it stood in the sweep's file, but for the cluster.
        notes: what couldn't be read, and how it was made up for.
    """

    folder: Path
    planned: int
    varied: tuple[str, ...]
    notebooks: tuple[str, ...]
    runs: pd.DataFrame
    specification: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> pd.DataFrame:
        """The rows of finished runs."""
        return self.runs[self.runs["status"] == "done"]

    def measures(self) -> pd.DataFrame:
        """The finished runs' measures: columns run, when ("before" or "after"), measure, value, low, high.

        `low` and `high` are the 95% interval over a run's images; NaN where the run has none.
        """
        done, parts = self.done, []
        for column in done.columns:
            when, _, name = column.partition(".")
            if when in ("before", "after") and name.split(".")[0] not in _NO_MEASURES:
                columns = {"value": column, "low": f"{when}.ci95.{name}.0", "high": f"{when}.ci95.{name}.1"}
                numbers = {end: pd.to_numeric(done[there], errors="coerce").to_numpy() if there in done else np.nan
                           for end, there in columns.items()}
                parts.append(pd.DataFrame({"run": done.index, "when": when, "measure": name, **numbers}))
        table = pd.concat(parts) if parts else pd.DataFrame(columns=["run", "when", "measure", "value", "low", "high"])
        return table.dropna(subset=["value"]).reset_index(drop=True)

    def label(self, run: str) -> str:
        """A run by what sets it apart: "concept cat, steps 5"; its folder's name where nothing does."""
        row = self.runs.loc[run]
        return ", ".join(f"{name} {readable(row.get(name))}" for name in self.varied) or run

    def images(self, run: str) -> dict[str, Path]:
        """The run's images by name, in alphabetical order; none where they weren't kept."""
        return {path.stem: path for path in sorted((self.folder / run / "images").glob("[!.]*.png"))}


def read_sweep(folder: str | Path) -> SweepResults:
    """Read the folder that `fmn-nb sweep` wrote, whatever became of it.

    Raises:
        SweepReadingError: no such folder, or no readable `sweep.json` in it.
    """
    folder = Path(folder).expanduser()
    if not (folder / SWEEP_FILE).is_file():
        raise SweepReadingError(f"{folder.absolute()} holds no {SWEEP_FILE}; give the folder that `fmn-nb sweep` wrote")
    try:
        sweep = read_json(folder / SWEEP_FILE)
        planned, varied, notebooks = int(sweep["runs"]), tuple(sweep["varied"]), tuple(sweep["notebooks"])
    except (ValueError, KeyError, TypeError) as error:
        raise SweepReadingError(f"{folder / SWEEP_FILE} can't be read ({error}); the sweep's command writes it anew "
                                "and keeps what is finished") from None
    listed, notes = _listed(folder)
    found, damaged = _found(folder, set(listed.index))
    runs = pd.concat([table for table in (listed, found) if len(table)]) if len(listed) or len(found) else listed
    runs["error"] = runs["error"].fillna("").astype(str)
    varied = tuple(name for name in varied if name in runs)
    return SweepResults(folder, planned, varied, notebooks, runs, sweep.get("specification", {}), (*notes, *damaged))


def readable(value: Any) -> str:
    """A setting as a person writes it: 5, not 5.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _listed(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The runs of `results.csv`."""
    empty = pd.DataFrame(columns=[*_COLUMNS], index=pd.Index([], name="folder"))
    if not (folder / TABLE).is_file():
        return empty, [f"{TABLE} is not there yet: read from the runs' own folders"]
    try:
        table = pd.read_csv(folder / TABLE, dtype={"folder": str, "concept": str, "error": str}).set_index("folder")
    except (ValueError, KeyError, OSError) as error:  # pandas' parser errors are ValueErrors
        return empty, [f"{TABLE} can't be read ({error}): read from the runs' own folders"]
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        return empty, [f"{TABLE} has no column {missing[0]}: read from the runs' own folders"]
    return table, []


def _found(folder: Path, known: set[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs that have a folder and no row, and what couldn't be read of them."""
    rows, notes = {}, []
    for mark in sorted(folder.glob(f"*/{RUN_FILE}")):
        if mark.parent.name in known:
            continue
        try:
            rows[mark.parent.name] = _row(mark.parent)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{mark.parent.name} can't be read ({error})")
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis("folder"), notes


def _row(run: Path) -> dict[str, Any]:
    state = read_json(run / RUN_FILE)
    status = state["status"] if state["status"] in ("done", "failed") else "unfinished"
    row = {**state["settings"], **flat(state["parameters"]), "status": status, "seconds": None,
           "error": str(state.get("error", ""))}
    if status == "done":
        metrics = read_json(run / METRICS_FILE)
        validate(metrics)
        row["seconds"] = sum(one["seconds"] for one in state["notebooks"].values())
        row |= flat({name: metrics[name] for name in MEASURED if name in metrics})
    return row
