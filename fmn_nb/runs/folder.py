"""The folders of a run and of a sweep: the names of their files, what these say, and both as tables.

Reading takes what is there: failed and unfinished runs have their rows, and whatever can't be read is reported.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from fmn_nb.files import read_json, replacing, write_json
from fmn_nb.runs.metrics import (
    MEASURED,
    SECTIONS,
    Amount,
    Count,
    MetricsError,
    Section,
    Text,
    first_fault,
    flat,
    plain,
    validate,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from fmn_nb.runs.plan import Plan

SWEEP_FILE, TABLES = "sweep.json", ("results.csv", "results.parquet")
REPORT_FILE = "report.html"  # of a run and of a sweep
LOCK_FILE = ".lock"
Row = dict[str, Any]
_COLUMNS = ("status", "seconds", "error")
_NO_MEASURES = ("ci95", "skipped", "images", "features")


class StateError(ValueError):
    """A run.json can't be read, or isn't what a run leaves."""


class Executed(Section):
    """What run.json says about one notebook."""

    status: Text
    seconds: Amount = None
    error: Text = None


class RunSettings(Section):
    """What identifies a run."""

    model: Text
    concept: Text
    kind: Text
    preset: Text
    seed: Count


class State(Section):
    """All of run.json."""

    status: Text
    key: Text
    settings: RunSettings
    parameters: dict[str, Any]
    versions: dict[str, Text]
    started: Text
    notebooks: dict[str, Executed]
    model_files: str = None  # a print of them (`Plan.model_print`); absent in runs of earlier versions
    error: str = None


@contextmanager
def alone_in(folder: Path, busy: Exception, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock, which the system frees when its holder dies; raises `busy` if another still holds it after
    so many seconds. The folder is made if it isn't there; without patience it goes again if what is done in it fails
    before it leaves anything (with it, others may be waiting there)."""
    made = not folder.exists() and not patience
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK_FILE, timeout=patience):
            try:
                yield
            except BaseException:
                if made and [one.name for one in folder.iterdir()] == [LOCK_FILE]:
                    with suppress(OSError):  # where a file in use can't be removed, it stays
                        (folder / LOCK_FILE).unlink()
                        folder.rmdir()
                raise
    except Timeout:
        raise busy from None


class RunFolder:
    """One run's folder: executed notebooks, `images/`, `metrics.json`, `report.html`, and `run.json` with its state.

    Reading takes what is there: state and metrics of a run that has not begun are empty.
    """

    STATE, METRICS, IMAGES = "run.json", "metrics.json", "images"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def state_file(self) -> Path:
        """run.json: status ("running", "stopped", "failed", "done"), key, model_files, settings, parameters, versions,
        notebooks, error."""
        return self.path / self.STATE

    @property
    def metrics_file(self) -> Path:
        """metrics.json, see `fmn_nb.runs.metrics`."""
        return self.path / self.METRICS

    @property
    def state(self) -> dict[str, Any]:
        """What run.json says; empty if it is missing or can't be read."""
        return _read_or_empty(self.state_file)

    def checked_state(self) -> dict[str, Any]:
        """What run.json says, checked against its schema (`State`). StateError names the place that breaks it."""
        try:
            State.model_validate(state := read_json(self.state_file))
            return state
        except ValidationError as error:
            raise StateError(f"{self.state_file} is not a run's state: {first_fault(error, self.STATE)}") from None
        except (OSError, ValueError) as error:
            raise StateError(str(error)) from None

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json says; empty if it is missing or can't be read."""
        return _read_or_empty(self.metrics_file)

    @property
    def status(self) -> str | None:
        """What the run's own file says about it."""
        return self.state.get("status")

    def images(self) -> dict[str, Path]:
        """The run's images by name, in alphabetical order."""
        return {path.stem: path for path in sorted((self.path / self.IMAGES).glob("[!.]*.png"))}

    def executed(self, notebook: str) -> str | None:
        """The file of an executed notebook, whole or failed, by the notebook's file name; None if there is neither."""
        names = (notebook, notebook.removesuffix(".ipynb") + ".failed.ipynb")
        return next((name for name in names if (self.path / name).exists()), None)

    def row(self, state: Mapping[str, Any] | None = None) -> Row:
        """The run as one flat row: folder, settings, parameters, status, seconds, error, and a finished run's figures.

        Args:
            state: what run.json says, if it was read already.

        Raises:
            ValueError, OSError, KeyError, TypeError: run.json or a finished run's metrics.json isn't whole.
        """
        state = read_json(self.state_file) if state is None else state
        status = state["status"] if state["status"] in ("done", "failed") else "unfinished"
        row = row_of(self.path.name, state["settings"], state["parameters"], status, str(state.get("error", "")))
        if status == "done":
            metrics = read_json(self.metrics_file)
            validate(metrics)
            row["seconds"] = sum(one["seconds"] for one in state["notebooks"].values())
            row |= flat({name: metrics[name] for name in MEASURED if name in metrics})
        return row

    def earlier_row(self, plan: Plan, retry_failed: bool) -> Row | None:
        """The row of a planned run that an earlier attempt finished with notebooks as they are now, or that failed and
        isn't retried; else None."""
        state = self.state
        try:
            if state.get("status") == "failed" and not retry_failed:
                return failed_row(plan, state.get("error", "unknown"))
            notebooks = [state["notebooks"][one.path.name] for one in plan.notebooks]
            executed = all(said["status"] == "done" and said["sha256"] == one.digest
                           for said, one in zip(notebooks, plan.notebooks, strict=True))
            return self.row(state) if state["status"] == "done" and state["key"] == plan.key and (
                executed and plan.is_of_model(state)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def holds(self, plan: Plan) -> bool:
        """Whether a run with the plan's settings and parameters, of the model as it is now, is done here, and whole."""
        state = self.state
        try:
            self.row(state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return state["status"] == "done" and state["key"] == plan.key and plan.is_of_model(state)

    def tidy(self, everything: bool = False) -> None:
        """Remove the temporary files of a run that was killed here, or all but the lock."""
        for entry in self.path.iterdir() if everything else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()
        for leftover in self.path.rglob(".*.part*"):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)


def _read_or_empty(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def record(out: str | os.PathLike[str], sections: dict[str, Any]) -> dict[str, Any]:
    """Merge `sections` into `out/metrics.json` and return the whole.

    A section given again replaces the earlier one, so that a rerun leaves no stale figure; only the reasons under
    "skipped" add up. A reason goes when its section comes, or when None is given for it. Numpy and torch scalars become
    plain numbers. The file is replaced in one step. Raises MetricsError, before anything is written, for an unknown
    section, a NaN or an infinity (leave out a metric that could not be computed, with its reason under "skipped") and
    for what JSON cannot hold.
    """
    unknown = sorted(set(sections) - set(SECTIONS))
    if unknown:
        raise MetricsError(f"metrics.json has no section {', '.join(map(repr, unknown))}; it has: "
                           + ", ".join(SECTIONS))
    file = RunFolder(out).metrics_file
    metrics = read_json(file) if file.exists() else {"schema": 1}
    new = {name: plain(section, name) for name, section in sections.items()}
    given = new.pop("skipped", {})
    reasons = {name: reason for name, reason in metrics.pop("skipped", {}).items() if name not in new} | given
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    metrics |= new | ({"skipped": reasons} if reasons else {})
    write_json(file, metrics)
    return metrics


def save_image(out: str | os.PathLike[str], name: str, image: Image | Figure, alt: str) -> Path:
    """Write `out/images/NAME.png` with its description inside (PNG text "Description") and return its path.

    The report groups images by the first word of their name: `before...`, `after...`, `attention...`, others.
    `image` is a PIL image or a matplotlib figure; `alt` says in words what it shows, for readers who cannot see it.
    Raises ValueError for an empty `alt` or a name that isn't a plain file name.
    """
    if not alt.strip():
        raise ValueError(f"image '{name}' needs a description: say in alt what it shows")
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise ValueError(f"'{name}' can't name an image: use only letters, digits, '-' and '_'")
    path = Path(out) / RunFolder.IMAGES / f"{name}.png"
    with replacing(path) as temporary:
        if hasattr(image, "savefig"):
            image.savefig(temporary, format="png", bbox_inches="tight", metadata={"Description": alt})
        else:
            image.save(temporary, format="PNG", pnginfo=_description(alt))
    return path


def _description(alt: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("Description", alt)  # iTXt holds any letter, tEXt only Latin-1
    return text


def row_of(folder: str, settings: Mapping[str, Any], parameters: dict[str, Any], status: str, error: str = "") -> Row:
    """A run's row without figures."""
    return {"folder": folder, **settings, **flat(parameters), "status": status, "seconds": None, "error": error}


def failed_row(plan: Plan, error: str) -> Row:
    """The row of a planned run that failed, whatever it left behind."""
    return row_of(plan.out.name, plan.settings, plan.parameters, "failed", error)


def write_table(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Write `results.csv` and `results.parquet`; columns in the order in which rows first have them."""
    import pandas as pd

    table = pd.DataFrame(rows).convert_dtypes()  # whole numbers stay whole beside missing ones
    for name in table.select_dtypes("object"):
        table[name] = table[name].astype("string")  # a column of mixed types has no place in a parquet file
    csv, parquet = (folder / name for name in TABLES)
    with replacing(csv) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    with replacing(parquet) as temporary:
        table.to_parquet(temporary, index=False)
    return [csv, parquet]


class SweepReadingError(ValueError):
    """The folder holds no sweep, or none that can be read; the message says what was expected."""


@dataclass(frozen=True)
class SweepResults:
    """What a sweep left.

    Attributes:
        folder: its folder.
        planned: how many runs its specification has.
        varied: names of the settings and parameters that differ between its runs.
        notebooks: what one run executes.
        runs: a row per run, by the name of its folder: status (done, failed, unfinished), seconds, error, settings,
            parameters, and every figure of its `metrics.json` under its flat name ("after.ua", "forgetting.seconds").
        specification: what was asked for, as in the sweep's file, without the cluster.
        notes: what couldn't be read, and what was read instead.
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
        import numpy as np
        import pandas as pd

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
        """What sets a run apart: "concept cat, steps 5"; its folder's name if nothing does."""
        row = self.runs.loc[run]
        return ", ".join(f"{name} {_readable(row.get(name))}" for name in self.varied) or run

    def images(self, run: str) -> dict[str, Path]:
        """The run's images by name, in alphabetical order; none if they weren't kept."""
        return RunFolder(self.folder / run).images()


def read_sweep(folder: str | Path) -> SweepResults:
    """Read the folder that `fmn-nb sweep` wrote, in whatever state it is.

    Raises:
        SweepReadingError: no such folder, or no readable `sweep.json` in it.
    """
    import pandas as pd

    folder = Path(folder).expanduser()
    if not (folder / SWEEP_FILE).is_file():
        raise SweepReadingError(f"{folder.absolute()} holds no {SWEEP_FILE}; give the folder that `fmn-nb sweep` wrote")
    try:
        sweep = read_json(folder / SWEEP_FILE)
        planned, varied, notebooks = int(sweep["runs"]), tuple(sweep["varied"]), tuple(sweep["notebooks"])
    except (ValueError, KeyError, TypeError) as error:
        raise SweepReadingError(f"{folder / SWEEP_FILE} can't be read ({error}); the sweep's command writes it anew "
                                "and keeps what is finished") from None
    listed, notes = _listed(folder, sweep.get("texts", ()))
    found, damaged = _found(folder, set(listed.index), sweep)
    if "folders" in sweep:  # earlier specifications may have left runs in the same folder
        listed, found = (table[table.index.isin(sweep["folders"])] for table in (listed, found))
    runs = pd.concat([table for table in (listed, found) if len(table)]) if len(listed) or len(found) else listed
    runs["error"] = runs["error"].fillna("").astype(str)
    varied = tuple(name for name in varied if name in runs)
    return SweepResults(folder, planned, varied, notebooks, runs, sweep.get("specification", {}), (*notes, *damaged))


def _readable(value: Any) -> str:
    """A setting as a person writes it: 5, not 5.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value) or "''"


def _listed(folder: Path, texts: Collection[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs of `results.csv`; values of the columns in `texts` stay as they were written ("", "None", "01")."""
    import pandas as pd

    empty, file = pd.DataFrame(columns=[*_COLUMNS], index=pd.Index([], name="folder")), folder / TABLES[0]
    if not file.is_file():
        return empty, [f"{file.name} is not there yet: read from the runs' own folders"]
    try:
        texts, columns = {"folder", "concept", "error", *texts}, pd.read_csv(file, nrows=0).columns
        table = pd.read_csv(file, dtype=dict.fromkeys(texts & {*columns}, str), keep_default_na=False, na_values={
            name: [""] for name in columns if name not in texts}).set_index("folder")
    except (ValueError, KeyError, OSError) as error:  # pandas' parser errors are ValueErrors
        return empty, [f"{file.name} can't be read ({error}): read from the runs' own folders"]
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        return empty, [f"{file.name} has no column {missing[0]}: read from the runs' own folders"]
    return table, []


def _found(folder: Path, known: set[str], sweep: Mapping[str, Any]) -> tuple[pd.DataFrame, list[str]]:
    """The runs that have a folder but no row, and what couldn't be read of them. One that was finished with notebooks
    or a model of before, as the sweep's listing tells, is unfinished."""
    import pandas as pd

    rows, notes = [], []
    for mark in sorted(folder.glob(f"*/{RunFolder.STATE}")):
        if mark.parent.name not in known:
            try:
                state = read_json(mark)
                made = {name: said.get("sha256") for name, said in state["notebooks"].items()}
                now = sweep.get("model_files", {}).get(mark.parent.name)
                if state["status"] == "done" and (not sweep.get("digests", {}).items() <= made.items()
                                                  or now not in (None, state.get("model_files", now))):
                    notes.append(f"{mark.parent.name} was finished with other notebooks or another model: left out")
                    state = {**state, "status": "stopped"}
                rows.append(RunFolder(mark.parent).row(state))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                notes.append(f"{mark.parent.name} can't be read ({error})")
    return pd.DataFrame(rows, columns=None if rows else ["folder", *_COLUMNS]).set_index("folder"), notes
