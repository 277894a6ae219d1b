"""Many runs that survive: executed on Dask's workers, resumed after any kill, with one table at the end.

A run is finished if its `run.json` says "done" for the same parameters and notebooks and its `metrics.json` is valid.
If it says so for other notebooks, the run goes on from what they left. Everything else is started anew, so a killed
sweep's table ends up equal to an unbroken one's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from fmn_nb.files import read_json, write_json
from fmn_nb.runs.executors import Outcome, executed
from fmn_nb.runs.folder import SWEEP_FILE, TABLES, Row, RunFolder, failed_row, write_table
from fmn_nb.runs.notebook import RunError, without_slow_formats
from fmn_nb.runs.plan import SHARED_CACHE, Plan
from fmn_nb.runs.progress import SweepProgress
from fmn_nb.runs.report import write_report
from fmn_nb.runs.runner import execute
from fmn_nb.runs.spec import Sweep
from fmn_nb.runs.stopping import telling
from fmn_nb.runs.storage import Local, Remote, SweepError

KERNEL_LAG = 2.5  # seconds: a kernel checks once a second whether its worker is alive, and ends if not


def run_sweep(
    sweep: Sweep,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    retry_failed: bool = False,
    progress: SweepProgress | None = None,
    page: bool = True,
) -> tuple[Path | str, list[Row]]:
    """Execute what is not finished yet; return the sweep's folder (or URL) and the rows of failed runs.

    Leaves `results.csv`, `results.parquet` (a row per run, in the order of the specification) and a folder per run,
    even if interrupted; at the end also `report.html`, made by notebook 07, if `page` says so and a run was measured.
    Runs that failed in an earlier attempt are repeated with `retry_failed`. `progress` hears of every run that begins
    or ends. What the unchanged model draws for several runs is drawn once and kept in `.cache` until all runs are
    finished, and so are the images of every run's own model, so that a killed run continues: about 5 KB per image of
    the emoji model, 0.5 MB per image of Stable Diffusion. `scheduler` is the address of a Dask scheduler, used instead
    of processes on this machine.

    Raises:
        SweepError: another sweep is working there, a table there is no sweep's, or the storage can't be used.
        Stopped: a KeyboardInterrupt came; the message says what is finished.
    """
    with ExitStack() as stack:
        if isinstance(sweep.storage, Remote):
            stack.callback(shutil.rmtree, sweep.folder.parent, ignore_errors=True)
        sweep.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(sweep.storage.held(sweep.folder))
        _check_folder(sweep.folder)
        if not (sweep.folder / SWEEP_FILE).exists() and (there := [n for n in TABLES if (sweep.folder / n).exists()]):
            raise SweepError(f"{sweep.folder / there[0]} is no sweep's, and would be replaced: give another folder")
        progress = stack.enter_context(progress or SweepProgress())
        with telling(partial(_finished, sweep)):
            rows = _run_all(sweep, workers or sweep.workers, scheduler, retry_failed, progress)
            if page:
                _write_page(sweep, progress)
    unfinished = [row for row in rows if row["status"] != "done"]
    if not unfinished:
        shutil.rmtree(sweep.folder / SHARED_CACHE, ignore_errors=True)
    return sweep.place, unfinished


def _check_folder(folder: Path) -> None:
    """Raise a SweepError if the folder is a run's, or has a file that this sweep would write, of something else."""
    if RunFolder(folder).state_file.exists():
        raise SweepError(f"{folder} is the folder of a single run: give another folder")
    if (folder / SWEEP_FILE).is_file():
        try:
            is_listing = "runs" in read_json(folder / SWEEP_FILE)
        except (ValueError, OSError):
            return  # a damaged listing is written anew
        if not is_listing:
            raise SweepError(f"{folder / SWEEP_FILE} is no listing of a sweep's runs, and would be replaced: give "
                             "another folder, or give that file another name")


def _run_all(sweep: Sweep, workers: int, scheduler: str | None, retry_failed: bool,
             progress: SweepProgress) -> list[Row]:
    """The rows of all runs, in the order of the specification; the tables are written whatever happens."""
    import pandas  # noqa: F401  for the tables: loaded before the runs, so that a stopped sweep ends at once

    storage = sweep.storage
    listing = write_json(sweep.folder / SWEEP_FILE, {
        "runs": len(sweep.plans), "varied": sweep.varied, "notebooks": sweep.notebooks, "workers": workers,
        "folders": [plan.out.name for plan in sweep.plans],
        "digests": {one.path.name: one.digest for one in sweep.plans[0].notebooks},
        "model_files": {plan.out.name: plan.model_print for plan in sweep.plans},
        "texts": sorted({name for plan in sweep.plans for name, value in (plan.settings | plan.parameters).items()
                         if isinstance(value, str)}),
        "specification": {name: value for name, value in sweep.content.items() if name != "cluster"},
    })
    storage.keep([listing])
    storage.fetch(plan.out for plan in sweep.plans)
    rows = {plan.key: row for plan in sweep.plans if (row := RunFolder(plan.out).earlier_row(plan, retry_failed))}
    todo = [plan for plan in sweep.plans if plan.key not in rows]
    for name in (*TABLES, *(["report.html"] if todo else [])):  # they would tell of runs that are made anew now
        (sweep.folder / name).unlink(missing_ok=True)
    progress.start(len(sweep.plans), list(rows.values()), workers)
    try:
        with closing(_executed(sweep, todo, workers, scheduler, progress)) as ended:
            for plan, error in ended:
                if error is None:
                    storage.fetch([plan.out])
                rows[plan.key] = RunFolder(plan.out).row() if error is None else failed_row(plan, error)
                progress.ended(rows[plan.key])
    finally:
        ordered = [rows[plan.key] for plan in sweep.plans if plan.key in rows]
        storage.keep(write_table(sweep.folder, ordered))
    return ordered


def _finished(sweep: Sweep) -> str:
    done = sum(RunFolder(plan.out).earlier_row(plan, retry_failed=True) is not None for plan in sweep.plans)
    return f"{done} of {len(sweep.plans)} runs finished; the same command continues"


def _executed(sweep: Sweep, todo: list[Plan], workers: int, scheduler: str | None,
              progress: SweepProgress) -> Iterator[Outcome]:
    if not todo:
        return
    elsewhere = sweep.folder / SHARED_CACHE if isinstance(sweep.storage, Remote) else None
    workers = min(workers, len(todo))
    yield from executed(todo, partial(attempt, storage=sweep.storage), workers, scheduler, sweep.cluster, elsewhere,
                        lambda plan: progress.begun(plan.out.name))


def attempt(plan: Plan, storage: Local = Local()) -> str | None:  # noqa: B008  it is frozen and holds nothing
    """Execute one run, from a clean folder unless finished notebooks of it are there, and store it; return its error's
    text, or None. Runs in a worker."""
    without_slow_formats()
    error, run = None, RunFolder(plan.out)
    try:
        if run.status == "running":
            time.sleep(KERNEL_LAG)  # an orphaned kernel of the killed attempt may still be writing
        if run.earlier_row(plan, retry_failed=True) is None:
            execute(plan, fresh=not run.holds(plan), patience=10)
    except (RunError, ValueError, OSError) as problem:
        error = storage.shown(str(problem), plan.out)
    try:
        storage.keep_run(plan.out)
    except SweepError as problem:
        return f"{error}\nand {problem}" if error else str(problem)
    return error


def _write_page(sweep: Sweep, progress: SweepProgress) -> None:
    """Write the sweep's page, or a line that says why there can't be one; one of before would show other runs."""
    try:
        sweep.storage.keep([write_report(sweep.folder)])
    except Exception as error:  # noqa: BLE001  the tables are there, and whatever nbconvert lacks must not undo them
        (sweep.folder / "report.html").unlink(missing_ok=True)
        progress.say(f"no report.html: {' '.join(str(error).split())}")
