"""Notebooks as jobs: the course on one concept through papermill, leaving a folder that explains itself.

A run's folder holds the executed notebooks, `images/`, `patch/`, `metrics.json`, `report.html` and `run.json`
(settings, versions, state). Each appears whole or not at all; `run.json` says "done" only when all are there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fmn_nb.files import read_json, replacing, versions, write_json
from fmn_nb.runs.folder import RunFolder, alone_in, record
from fmn_nb.runs.metrics import MEASURED, validate
from fmn_nb.runs.notebook import RunError, execute_notebook
from fmn_nb.runs.plan import (
    COURSE_RUN,
    SHARED_CACHE,
    Notebook,
    Plan,
    RequestError,
    measuring_notebooks,
    plan_run,
    promises_of,
)
from fmn_nb.runs.progress import Position, Tell, Where, earlier_seconds
from fmn_nb.runs.report import write_report
from fmn_nb.runs.stopping import Stopped, stoppable

PLACES = ("out", "cache")  # parameters that say where a run works, not what it does
_versions = cache(versions)  # read once a process: that takes 10 ms, and a sweep's worker does a thousand runs


def run(
    model: str = "emoji",
    concept: str = "cat",
    *,
    out: str | Path | None = None,
    notebooks: str | Iterable[str] = COURSE_RUN,
    parameters: Mapping[str, Any] | None = None,
    again: bool = False,
    progress: Tell | None = None,
    **settings: Any,
) -> Path:
    """Execute the course's notebooks on one concept and return the run's folder.

    Everything is checked before anything starts (see `plan_run`); a ValueError says what is wrong. A failing notebook
    raises RunError. What an earlier call finished in the same folder stays and isn't repeated, unless `again`. Ten
    times a second, `progress` hears where the run is (a `Where`, whose text is a line); `settings` are kind (by default
    the concept's own), preset ("balanced"), seed (0) and steps (None leaves the preset's number).
    """
    steps = settings.pop("steps", None)
    parameters = dict(parameters or {}) | ({} if steps is None else {"steps": steps})
    plan = plan_run(model=model, concept=concept, out=out, notebooks=notebooks, parameters=parameters, **settings)
    return execute(plan, progress, again=again)


def execute(plan: Plan, progress: Tell | None = None, *, again: bool = False, fresh: bool = False,
            patience: float = 0) -> Path:
    """Execute what is not finished of a checked plan and return its folder.

    One process at a time works in a folder: another waits `patience` seconds, then raises RequestError. `again` repeats
    finished notebooks; `fresh` first removes whatever an earlier attempt left there. A KeyboardInterrupt or
    `ask_to_stop` ends the run as Stopped: what was executed is kept, and run.json says "stopped".
    """
    busy = RequestError(f"another run is working in {plan.out}; wait for it or give another --out")
    with stoppable([plan.out]), alone_in(plan.out, busy, patience):
        RunFolder(plan.out).tidy(everything=fresh)
        if not again and is_finished(plan):
            return plan.out
        kept = 0 if again else _finished_notebooks(plan)
        state = _State(plan, kept)
        try:
            state.drop_what_is_stale()
            record(plan.out, _header(plan, kept))
            for number in range(kept, len(plan.notebooks)):
                _execute(plan, number, state, progress)
            _check_promises(plan, state)
            write_report(plan.out)
            state.done()
        except KeyboardInterrupt:
            state.stopped()
            RunFolder(plan.out).tidy()
            command = "the same command without --again" if again and state.finished else "the same command"
            said = f"{state.finished} of {len(plan.notebooks)} notebooks finished; {command} continues"
            raise Stopped(said) from None
        except Exception as error:
            state.broken(error)
            raise
        shutil.rmtree(plan.out / SHARED_CACHE, ignore_errors=True)
    return plan.out


def is_finished(plan: Plan) -> bool:
    """Whether nothing of the plan is left to execute in its folder."""
    return RunFolder(plan.out).status == "done" and _finished_notebooks(plan) == len(plan.notebooks)


def _finished_notebooks(plan: Plan) -> int:
    """How many of the plan's notebooks, from the first on, are finished in its folder exactly as it asks for them."""
    folder = RunFolder(plan.out)
    state, metrics = folder.state, folder.metrics
    if not plan.is_of_model(state):
        return 0
    for number, notebook in enumerate(plan.notebooks):
        try:
            said = state["notebooks"][notebook.path.name]
            same = (state["key"], said["status"]) == (plan.key, "done") and _same(said, _print_of(notebook))
            known = {*metrics, *metrics.get("skipped", ())}
        except (KeyError, TypeError, AttributeError):
            return number
        there = all((plan.out / name).exists() for name in (notebook.path.name, *notebook.gives))
        if not (same and there and known.issuperset(notebook.metrics)):
            return number
    return len(plan.notebooks)


def _print_of(notebook: Notebook) -> dict[str, Any]:
    """What identifies a notebook in run.json: its content and its parameters' values."""
    return {"sha256": notebook.digest, "values": notebook.values}


def _same(said: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether two prints are of one notebook with one set of values, wherever the run's folder stood."""
    values = [{name: value for name, value in one["values"].items() if name not in PLACES} for one in (said, made)]
    return said["sha256"] == made["sha256"] and values[0] == values[1]


def _execute(plan: Plan, number: int, state: _State, tell: Tell | None) -> None:
    """Execute one notebook of the plan, note what became of it, and tell."""
    notebook, position, started = plan.notebooks[number], Position(), time.perf_counter()
    made = _print_of(notebook)  # now: the file may be edited while it runs
    earlier = earlier_seconds(plan.out, notebook.path.name) if tell else []

    def look(now: str = "running") -> None:
        if tell:
            tell(Where(number + 1, len(plan.notebooks), notebook.path.stem, time.perf_counter() - started, position,
                       position.seconds_left(earlier), now))

    try:
        execute_notebook(notebook, plan.out, position, look)
    except RunError as error:
        state.failed(notebook, error)
        look("failed")
        raise
    except KeyboardInterrupt:
        state.interrupted(notebook)
        look("stopped")
        raise
    state.passed(notebook, made, time.perf_counter() - started)
    look("done")


def _header(plan: Plan, kept: int) -> dict[str, Any]:
    settings = plan.settings
    return {
        "model": settings["model"],
        "concept": {"name": settings["concept"], "kind": settings["kind"]},
        "preset": settings["preset"],
        "seed": settings["seed"],
        "versions": _versions(),
        "skipped": dict.fromkeys(_promised(plan, kept)),  # earlier reasons are none for what is measured now
    }


def _promised(plan: Plan, kept: int = 0) -> tuple[str, ...]:
    """The sections of metrics.json that the plan's notebooks, without the first `kept`, say they record."""
    return tuple(name for one in plan.notebooks[kept:] for name in one.metrics)


def _explain_absent(plan: Plan) -> None:
    """Give a reason for each section that is absent because no notebook of this run measures it."""
    metrics = read_json(RunFolder(plan.out).metrics_file)
    absent = set(MEASURED) - set(_promised(plan)) - set(metrics) - set(metrics.get("skipped", {}))
    course = measuring_notebooks()
    reasons = {name: f"{course[name].stem} measures it, which was not part of this run" if name in course
               else "no notebook of this run measures it" for name in MEASURED if name in absent}
    record(plan.out, {"skipped": reasons})


def _check_promises(plan: Plan, state: _State) -> None:
    """Check that every file and metric that the notebooks promise is there, and that metrics.json fits its schema."""
    last = plan.notebooks[-1]
    for notebook in plan.notebooks:
        missing = [name for name in notebook.gives if not (plan.out / name).exists()]
        if missing:
            error = RunError(notebook.path.name, None, f"it left no '{missing[0]}' in {plan.out}", None)
            state.failed(notebook, error)
            raise error
    try:
        _explain_absent(plan)
        validate(read_json(RunFolder(plan.out).metrics_file), _promised(plan))
    except (ValueError, OSError) as problem:
        error = RunError(last.path.name, None, f"metrics.json is not as it should be: {problem}", None)
        state.failed(last, error)
        raise error from problem


def _valid(entries: Mapping[str, Any], new: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The entries of before that still hold, and the names of those that don't: whatever was executed after a notebook
    that is executed again may have read what that one left. Entries stand in the order of their execution."""
    names = list(entries)
    first = min((names.index(name) for name in new if name in entries), default=len(names))
    return ({name: said for name, said in entries.items() if names.index(name) < first},
            [name for name in names[first:] if name not in new])


class _State:
    """The run's `run.json`, written anew after every step; over a finished run's only once a new notebook has ended.

    Args:
        kept: how many of the plan's notebooks are finished, and stay.
    """

    def __init__(self, plan: Plan, kept: int) -> None:
        folder = RunFolder(plan.out)
        self.path, self.finished = folder.state_file, kept
        before = read_json(self.path) if self.path.exists() else {}
        new = {notebook.path.name for notebook in plan.notebooks[kept:]}
        valid, self._stale = _valid(before.get("notebooks", {}) if plan.is_of_model(before) else {}, new)
        self._stale += [name for name in before.get("notebooks", {}) if not plan.is_of_model(before)]
        self._out, self._made = plan.out, {name for one in plan.notebooks[kept:] for name in one.gives}
        self._began = time.time()
        self.content = {
            "status": "running",
            "key": plan.key,
            "model_files": plan.model_print,
            "settings": plan.settings,
            "parameters": plan.parameters,
            "versions": _versions(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "notebooks": valid,
        }
        self._metrics = folder.metrics_file
        #: a finished run's metrics.json: it is put back where this one is stopped before any notebook has ended
        self._whole = self._metrics.read_bytes() if before.get("status") == "done" and self._metrics.exists() else None
        if self._whole is None:
            self._write()

    def drop_what_is_stale(self) -> None:
        """Remove the figures of notebooks that ran after one that is executed again, or on a model of before."""
        sections = [name for one in self._stale if (self._out / one).is_file()
                    for name in promises_of(self._out / one)["metrics"]]
        if sections and self._metrics.exists():
            write_json(self._metrics, {name: section for name, section in read_json(self._metrics).items()
                                       if name not in sections})

    def passed(self, notebook: Notebook, made: Mapping[str, Any], seconds: float) -> None:
        """Note a notebook that has ended; `made` is its print from before, since files may be edited meanwhile."""
        self._note(notebook, {"status": "done", "seconds": round(seconds, 3), **made})
        self.finished += 1

    def failed(self, notebook: Notebook, error: RunError) -> None:
        self.content["status"] = "failed"
        self.content["error"] = str(error)
        self._note(notebook, {"status": "failed", "cell": error.cell, "error": error.error})

    def broken(self, error: Exception) -> None:
        """Whatever ended the run: a notebook's own error was noted with it."""
        self.content |= {"status": "failed", "error": self.content.get("error") or str(error) or type(error).__name__}
        self._write()

    def interrupted(self, notebook: Notebook) -> None:
        if self._whole is None:
            self._note(notebook, {"status": "stopped"})

    def stopped(self) -> None:
        if self._whole is not None and not self._has_begun_to_make():
            with replacing(self._metrics) as temporary:
                temporary.write_bytes(self._whole)
            return
        self.content["status"] = "stopped"
        self._write()

    def _has_begun_to_make(self) -> bool:
        """Whether a notebook that was stopped has already put something in the place of what was there."""
        made = [path for name in self._made for path in (self._out / name, *(self._out / name).rglob("*"))]
        return any(path.stat().st_mtime >= self._began for path in made if path.is_file())

    def done(self) -> None:
        self.content["status"] = "done"
        self._write()

    def _note(self, notebook: Notebook, entry: dict[str, Any]) -> None:
        self.content["notebooks"][notebook.path.name] = {**_print_of(notebook), **entry}
        self._whole = None
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)
