"""Notebooks as jobs: the course on one concept through papermill, leaving a folder that explains itself.

A run's folder holds the executed notebooks, `images/`, `patch/`, `metrics.json`, `report.html` and `run.json`
(settings, versions, state). Each appears whole or not at all; `run.json` says "done" only when all are there.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fmn_nb.files import read_json, replacing, write_json
from fmn_nb.plans import COURSE_RUN, RUN_FILE, Notebook, Plan, RequestError, measuring_notebook, plan_run
from fmn_nb.report import write_report
from fmn_nb.results import MEASURED, METRICS_FILE, record, validate, versions

Progress = Callable[[str], None]
_versions = cache(versions)  # read once a process: that takes 10 ms, and a sweep's worker does a thousand runs


class RunError(RuntimeError):
    """A notebook failed: which, in which cell, with what error, and where the executed notebook lies.

    It survives pickling (its fields are its arguments), so that a sweep's worker can hand it back.
    """

    def __init__(self, notebook: str, cell: int | None, error: str, executed: str | None) -> None:
        super().__init__(notebook, cell, error, executed)
        self.notebook, self.cell, self.error, self.executed = notebook, cell, error, executed

    def __str__(self) -> str:
        where = f"{self.notebook} failed" + (f" in cell [{self.cell}]" if self.cell is not None else "")
        return f"{where}: {self.error}" + (f"\n  executed notebook: {self.executed}" if self.executed else "")


def run(
    model: str = "emoji",
    concept: str = "cat",
    kind: str | None = None,
    preset: str = "balanced",
    steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    notebooks: str | Iterable[str] = COURSE_RUN,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Execute the course's notebooks on one concept and return the run's folder.

    Everything is checked before anything starts (see `plan_run`): ParameterError or RequestError. A failing
    notebook is a RunError. `steps=None` leaves the preset's number; `progress` gets a line a notebook.
    """
    parameters = dict(parameters or {}) | ({} if steps is None else {"steps": steps})
    plan = plan_run(
        model=model, concept=concept, kind=kind, preset=preset, seed=seed,
        out=out, notebooks=notebooks, parameters=parameters,
    )
    return execute(plan, progress)


def execute(plan: Plan, progress: Progress | None = None, *, fresh: bool = False, patience: float = 0) -> Path:
    """Execute a checked plan and return its folder.

    One process at a time works in a folder: after `patience` seconds in vain, RequestError. `fresh` first
    removes whatever an earlier attempt left there.
    """
    tell = progress or (lambda text: None)
    plan.out.mkdir(parents=True, exist_ok=True)
    with _alone_in(plan.out, patience):
        _sweep_up(plan.out, everything=fresh)
        state = _State(plan)
        record(plan.out, _header(plan))
        for number, notebook in enumerate(plan.notebooks, 1):
            tell(f"[{number}/{len(plan.notebooks)}] {notebook.path.stem} ")
            started = time.perf_counter()
            try:
                execute_notebook(notebook, plan.out)
            except RunError as error:
                tell("failed\n")
                state.failed(notebook, error)
                raise
            seconds = time.perf_counter() - started
            state.passed(notebook, seconds)
            tell(f"{seconds:.1f} s\n")
        _check_promises(plan, state)
        write_report(plan.out)
        state.done()
    return plan.out


def execute_notebook(notebook: Notebook, out: Path) -> Path:
    """Execute one notebook with its values in a kernel of its own, whose working directory is `out`.

    The result is `out/NAME.ipynb`; after an error `out/NAME.failed.ipynb` instead, and a RunError.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    from fmn_nb.engine import register

    target = out / notebook.path.name
    failed = target.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    with replacing(target) as temporary, kernel_transport() as transport:
        try:
            papermill.execute_notebook(
                str(notebook.path), str(temporary), notebook.values, kernel_name="python3", progress_bar=False,
                engine_name=register(), config=Config(transport), resources={"metadata": {"path": str(out)}},
            )
        except PapermillExecutionError as error:
            os.replace(temporary, failed)
            raise RunError(target.name, error.exec_count, f"{error.ename}: {error.evalue}", str(failed)) from None
        except Exception as error:  # a dead kernel, a full disk: whatever stopped papermill itself
            executed = _keep(temporary, failed)
            raise RunError(target.name, None, f"{type(error).__name__}: {error}", executed) from error
    return target


def _keep(temporary: Path, failed: Path) -> str | None:
    """Save what was executed before papermill itself stopped, if it wrote anything."""
    if not temporary.exists() or temporary.stat().st_size == 0:
        return None
    os.replace(temporary, failed)
    return str(failed)


@contextmanager
def kernel_transport() -> Iterator[dict[str, Any]]:
    """Kernel manager settings: Unix sockets in a private folder, since TCP ports can be taken by another kernel."""
    if os.name != "posix":
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="fmn-") as folder:  # short: a socket's path has about 100 bytes
        yield {"KernelManager": {"transport": "ipc", "connection_file": os.path.join(folder, "kernel.json")}}


def ask_kernel(code: str, patience: float = 60) -> str:
    """What `code` prints in a new kernel that starts in an empty folder, as a run's does; it is always ended again.

    RuntimeError or TimeoutError when it does not start, or does not answer within `patience` seconds; RuntimeError
    when the code fails there.
    """
    from jupyter_client.manager import KernelManager
    from traitlets.config import Config

    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, kernel_transport() as transport:
        manager = KernelManager(kernel_name="python3", config=Config(transport))
        client = None
        try:
            manager.start_kernel(cwd=folder)
            client = manager.blocking_client()
            client.start_channels()
            client.wait_for_ready(timeout=patience)
            reply = client.execute_interactive(code, allow_stdin=False, timeout=patience, output_hook=hear)["content"]
        finally:
            if client is not None:
                client.stop_channels()
            if manager.has_kernel:
                manager.shutdown_kernel(now=True)
    if reply["status"] != "ok":
        raise RuntimeError(f"{reply.get('ename')}: {reply.get('evalue')}")
    return "".join(said).strip()


@contextmanager
def _alone_in(out: Path, patience: float) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when its holder dies."""
    try:
        with FileLock(out / ".lock", timeout=patience):
            yield
    except Timeout:
        raise RequestError(f"another run is working in {out}; wait for it or give another --out") from None


def _sweep_up(out: Path, everything: bool) -> None:
    """Remove the temporary files of a run that was killed here, or all but the lock."""
    if everything:
        for entry in out.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()
    for leftover in out.rglob(".*.part*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


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
    metrics = read_json(plan.out / METRICS_FILE)
    absent = set(MEASURED) - set(_promised(plan)) - set(metrics) - set(metrics.get("skipped", {}))
    reasons = {}
    for name in MEASURED:
        if name in absent:
            notebook = measuring_notebook(name)
            reasons[name] = (f"{notebook.stem} measures it, which was not part of this run" if notebook
                             else "no notebook of this run measures it")
    record(plan.out, {"skipped": reasons})


def _check_promises(plan: Plan, state: "_State") -> None:
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
        validate(read_json(plan.out / METRICS_FILE), _promised(plan))
    except (ValueError, OSError) as problem:
        error = RunError(last.path.name, None, f"metrics.json is not as it should be: {problem}", None)
        state.failed(last, error)
        raise error from problem


class _State:
    """The run's `run.json`, written anew after every step."""

    def __init__(self, plan: Plan) -> None:
        self.path = plan.out / RUN_FILE
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

    def failed(self, notebook: Notebook, error: RunError) -> None:
        self.content["status"] = "failed"
        self.content["error"] = str(error)
        self._note(notebook, {"status": "failed", "cell": error.cell, "error": error.error})

    def done(self) -> None:
        self.content["status"] = "done"
        self._write()

    def _note(self, notebook: Notebook, entry: dict[str, Any]) -> None:
        digest = hashlib.sha256(notebook.path.read_bytes()).hexdigest()
        self.content["notebooks"][notebook.path.name] = {**entry, "sha256": digest, "values": notebook.values}
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)
