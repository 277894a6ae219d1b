"""Notebooks as jobs: the course on one concept through papermill, leaving a folder that explains itself.

A run's folder holds the executed notebooks, `images/`, `patch/`, `metrics.json`, `report.html` and `run.json`
(settings, versions, state). Each appears whole or not at all; `run.json` says "done" only when all are there.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fmn_nb.files import read_json, versions, write_json
from fmn_nb.runs.folder import LOCK_FILE, RunFolder, record
from fmn_nb.runs.metrics import MEASURED, validate
from fmn_nb.runs.notebook import RunError, execute_notebook
from fmn_nb.runs.plan import (
    COURSE_RUN,
    SHARED_CACHE,
    Notebook,
    Plan,
    RequestError,
    course_notebooks,
    measuring_notebooks,
    plan_run,
)
from fmn_nb.runs.report import write_report
from fmn_nb.runs.stopping import Stopped, stoppable

Progress = Callable[[str], None]
_versions = cache(versions)  # read once a process: that takes 10 ms, and a sweep's worker does a thousand runs


def run(
    model: str = "emoji",
    concept: str = "cat",
    *,
    steps: int | None = None,
    out: str | Path | None = None,
    notebooks: str | Iterable[str] = COURSE_RUN,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Path:
    """Execute the course's notebooks on one concept and return the run's folder.

    Everything is checked before anything starts (see `plan_run`): a ValueError that says what is wrong. A failing
    notebook is a RunError. `steps=None` leaves the preset's number; `progress` gets a line a notebook; `settings` are
    kind (by default the concept's own), preset ("balanced") and seed (0).
    """
    parameters = dict(parameters or {}) | ({} if steps is None else {"steps": steps})
    plan = plan_run(model=model, concept=concept, out=out, notebooks=notebooks, parameters=parameters, **settings)
    return execute(plan, progress)


def execute(plan: Plan, progress: Progress | None = None, *, fresh: bool = False, patience: float = 0) -> Path:
    """Execute a checked plan and return its folder.

    One process at a time works in a folder: after `patience` seconds in vain, RequestError. `fresh` first
    removes whatever an earlier attempt left there. A KeyboardInterrupt, or `ask_to_stop`, ends it as Stopped: what was
    executed is kept, and run.json says "stopped".
    """
    tell = progress or (lambda text: None)
    plan.out.mkdir(parents=True, exist_ok=True)
    with stoppable([plan.out]), _alone_in(plan.out, patience):
        RunFolder(plan.out).tidy(everything=fresh)
        state = _State(plan)
        try:
            record(plan.out, _header(plan))
            for number, notebook in enumerate(plan.notebooks, 1):
                tell(f"[{number}/{len(plan.notebooks)}] {notebook.path.stem} ")
                _execute(notebook, plan.out, state, tell)
            _check_promises(plan, state)
            write_report(plan.out)
            state.done()
        except KeyboardInterrupt:
            state.stopped()
            RunFolder(plan.out).tidy()
            raise Stopped(_how_to_go_on(plan, state.finished)) from None
        shutil.rmtree(plan.out / SHARED_CACHE, ignore_errors=True)
    return plan.out


def _execute(notebook: Notebook, out: Path, state: _State, tell: Progress) -> None:
    """Execute one notebook, note what became of it, and tell."""
    started = time.perf_counter()
    try:
        execute_notebook(notebook, out)
    except RunError as error:
        tell("failed\n")
        state.failed(notebook, error)
        raise
    except KeyboardInterrupt:
        tell("stopped\n")
        state.interrupted(notebook)
        raise
    seconds = time.perf_counter() - started
    state.passed(notebook, seconds)
    tell(f"{seconds:.1f} s\n")


def _how_to_go_on(plan: Plan, finished: int) -> str:
    """What is finished of a stopped run, and what to type next."""
    numbers = {path: number for number, path in course_notebooks().items()}
    rest = ",".join(numbers.get(one.path, str(one.path)) for one in plan.notebooks[finished:])
    todo = f"go on with --notebooks {rest}" if finished and rest else "the same command begins it again"
    return f"{finished} of {len(plan.notebooks)} notebooks finished; {todo}"


@contextmanager
def _alone_in(out: Path, patience: float) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when its holder dies."""
    try:
        with FileLock(out / LOCK_FILE, timeout=patience):
            yield
    except Timeout:
        raise RequestError(f"another run is working in {out}; wait for it or give another --out") from None


def _header(plan: Plan) -> dict[str, Any]:
    settings = plan.settings
    return {
        "model": settings["model"],
        "concept": {"name": settings["concept"], "kind": settings["kind"]},
        "preset": settings["preset"],
        "seed": settings["seed"],
        "versions": _versions(),
        "skipped": dict.fromkeys(_promised(plan)),  # an earlier run's reasons are none for what this one measures
    }


def _promised(plan: Plan) -> tuple[str, ...]:
    """The sections of metrics.json that the plan's notebooks say they record."""
    return tuple(name for one in plan.notebooks for name in one.metrics)


def _explain_absent(plan: Plan) -> None:
    """Give a reason for each section that is absent because no notebook of this run measures it."""
    metrics = read_json(RunFolder(plan.out).metrics_file)
    absent = set(MEASURED) - set(_promised(plan)) - set(metrics) - set(metrics.get("skipped", {}))
    course = measuring_notebooks()
    reasons = {name: f"{course[name].stem} measures it, which was not part of this run" if name in course
               else "no notebook of this run measures it" for name in MEASURED if name in absent}
    record(plan.out, {"skipped": reasons})


def _check_promises(plan: Plan, state: _State) -> None:
    """Every file and metric that the notebooks promise is there, and metrics.json follows its schema."""
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


class _State:
    """The run's `run.json`, written anew after every step."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.finished = RunFolder(plan.out).state_file, 0
        before = read_json(self.path) if self.path.exists() else {}
        self.content = {
            "status": "running",
            "key": plan.key,
            "settings": plan.settings,
            "parameters": plan.parameters,
            "versions": _versions(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "notebooks": before.get("notebooks", {}),
        }
        self._write()

    def passed(self, notebook: Notebook, seconds: float) -> None:
        self._note(notebook, {"status": "done", "seconds": round(seconds, 3)})
        self.finished += 1

    def failed(self, notebook: Notebook, error: RunError) -> None:
        self.content["status"] = "failed"
        self.content["error"] = str(error)
        self._note(notebook, {"status": "failed", "cell": error.cell, "error": error.error})

    def interrupted(self, notebook: Notebook) -> None:
        self._note(notebook, {"status": "stopped"})

    def stopped(self) -> None:
        self.content["status"] = "stopped"
        self._write()

    def done(self) -> None:
        self.content["status"] = "done"
        self._write()

    def _note(self, notebook: Notebook, entry: dict[str, Any]) -> None:
        digest = hashlib.sha256(notebook.path.read_bytes()).hexdigest()
        self.content["notebooks"][notebook.path.name] = {**entry, "sha256": digest, "values": notebook.values}
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)
