"""Many runs that survive: a pool of processes, resume after any kill, and one table at the end.

A run is finished when its `run.json` says "done" for the same parameters and notebooks and its `metrics.json` is
valid. Everything else is begun anew, so a killed sweep's table ends up equal to an unbroken one's.
"""

import multiprocessing
import multiprocessing.connection
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fmn_nb.files import read_json, replacing, without_slow_formats, write_json
from fmn_nb.plans import RUN_FILE, SHARED_CACHE, Plan
from fmn_nb.report import write_report
from fmn_nb.results import MEASURED, METRICS_FILE, flat, validate
from fmn_nb.runs import RunError, execute
from fmn_nb.storage import Local, Remote, Storage
from fmn_nb.sweep_specs import Sweep, SweepError, plan_sweep
from fmn_nb.sweep_table import Watch
from fmn_nb.sweep_threads import thread_variables, threads_each

__all__ = ["Sweep", "SweepError", "plan_sweep", "run_sweep"]

SWEEP_FILE = "sweep.json"
TABLES = ("results.csv", "results.parquet")
Outcome = tuple[Plan, str | None]  # a run and its error, None when it is finished
Attempt = Callable[[Plan], str | None]
ATTEMPTS = 3  # how often a run may take its worker down with it
KERNEL_LAG = 2.5  # seconds: a kernel whose worker died looks for it once a second, then ends


def run_sweep(
    sweep: Sweep,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    retry_failed: bool = False,
    watch: Watch | None = None,
) -> tuple[Path | str, list[dict[str, Any]]]:
    """Execute what is not finished yet; return the sweep's folder (or URL) and the rows of failed runs.

    Leaves `results.csv`, `results.parquet` (a row a run, in the order of the specification), `report.html` and a
    folder a run, also when interrupted. Runs that failed in an earlier attempt are repeated with `retry_failed`.
    `watch` is told of every run that ends. What the unchanged model draws for several runs is drawn once and kept in
    `.cache` until all runs are finished: about 5 KB an image of the emoji model, 0.5 MB one of Stable Diffusion, for
    the images of every run's own model as well, so that a killed run goes on.
    `scheduler` is the address of a Dask scheduler, used in place of processes on this machine.
    Raises SweepError when another sweep is working there, or when the storage cannot be used.
    """
    with ExitStack() as stack:
        if isinstance(sweep.storage, Remote):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="fmn-sweep-", ignore_cleanup_errors=True))
            sweep = sweep.moved(Path(scratch).resolve() / sweep.folder.name)
        sweep.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(sweep.storage.held(sweep.folder))
        watch = stack.enter_context(watch or Watch())
        return sweep.place, _run_all(sweep, workers or sweep.workers, scheduler, retry_failed, watch)


def _run_all(
    sweep: Sweep, workers: int, scheduler: str | None, retry_failed: bool, watch: Watch
) -> list[dict[str, Any]]:
    storage = sweep.storage
    listing = write_json(sweep.folder / SWEEP_FILE, {
        "runs": len(sweep.plans), "varied": sweep.varied, "notebooks": sweep.notebooks, "workers": workers,
        "specification": {name: value for name, value in sweep.content.items() if name != "cluster"},
    })
    storage.keep([listing])
    storage.fetch(plan.out for plan in sweep.plans)
    rows = {plan.key: row for plan in sweep.plans if (row := earlier_row(plan, retry_failed))}
    todo = [plan for plan in sweep.plans if plan.key not in rows]
    watch.start(len(sweep.plans), len(rows), workers)
    try:
        for plan, error in _executed(sweep, todo, workers, scheduler):
            if error is None:
                storage.fetch([plan.out])
            rows[plan.key] = row_of(plan) if error is None else failed_row(plan, error)
            watch.row(rows[plan.key])
    finally:
        ordered = [rows[plan.key] for plan in sweep.plans if plan.key in rows]
        write_table(sweep.folder, ordered)
        page = write_report(sweep.folder)
        storage.keep([sweep.folder / name for name in TABLES] + [page])
    unfinished = [row for row in ordered if row["status"] != "done"]
    if not unfinished:
        shutil.rmtree(sweep.folder / SHARED_CACHE, ignore_errors=True)
    return unfinished


def _executed(sweep: Sweep, todo: list[Plan], workers: int, scheduler: str | None) -> Iterator[Outcome]:
    if not todo:
        return iter(())
    one = partial(attempt, storage=sweep.storage)
    if scheduler or sweep.cluster:
        from fmn_nb.clusters import in_dask

        elsewhere = sweep.folder / SHARED_CACHE if isinstance(sweep.storage, Remote) else None
        return in_dask(todo, one, workers, scheduler, sweep.cluster, elsewhere)
    return in_processes(todo, workers, one)


def in_processes(todo: Iterable[Plan], workers: int, one: Attempt) -> Iterator[Outcome]:
    """Yield (plan, its error or None) as runs end, from a pool of processes.

    When a worker is killed the whole pool ends. The runs that were under way are then tried one at a time, so
    that only the one that takes its worker down with it is given up; the rest goes on in a new pool.
    """
    waiting, threads, barren = list(todo), threads_each(workers), 0
    while waiting:
        broken = yield from _in_one_pool(waiting, workers, threads, one)
        under_way = {plan.key for plan in broken if status_of(plan) == "running"}
        suspects = [plan for plan in broken if plan.key in under_way]
        waiting = [plan for plan in broken if plan.key not in under_way]
        for plan in suspects:
            yield from _alone(plan, threads, one)
        barren = barren + 1 if broken and not suspects else 0
        if barren == ATTEMPTS:
            raise SweepError("worker processes end before they take up a run; look at memory limits, then start again")


def _alone(plan: Plan, threads: int, one: Attempt) -> Iterator[Outcome]:
    for _ in range(ATTEMPTS - 1):  # it has had its first attempt
        if not (yield from _in_one_pool([plan], 1, threads, one)):
            return
    yield plan, f"its worker process was killed {ATTEMPTS} times (out of memory?)"


def _in_one_pool(
    plans: list[Plan], workers: int, threads: int, one: Attempt
) -> Generator[Outcome, None, list[Plan]]:
    """Yield outcomes until all plans are through or the pool breaks; return the plans without an outcome."""
    broken = set()
    pool = ProcessPoolExecutor(
        min(workers, len(plans)), multiprocessing.get_context("spawn"), _start_worker, (threads,)
    )
    try:
        futures = {pool.submit(one, plan): plan for plan in plans}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                broken.add(futures[future].key)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [plan for plan in plans if plan.key in broken]


def attempt(plan: Plan, storage: Storage = Local()) -> str | None:  # noqa: B008  it is frozen and holds nothing
    """Execute one run from a clean folder and store it; return its error's text, or None. Runs in a worker."""
    error = None
    try:
        if status_of(plan) == "running":
            time.sleep(KERNEL_LAG)  # an orphaned kernel of the killed attempt may still be writing
        if finished_row(plan) is None:
            execute(plan, fresh=True, patience=10)
    except (RunError, ValueError, OSError) as problem:
        error = storage.shown(str(problem), plan.out)
    try:
        storage.keep_run(plan.out)
    except SweepError as problem:
        return f"{error}\nand {problem}" if error else str(problem)
    return error


def _start_worker(threads: int) -> None:
    """Give this worker's kernels their share of the cores, and end it when the sweep's process dies."""
    without_slow_formats()
    os.environ.update(thread_variables(threads, os.environ))
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def status_of(plan: Plan) -> str | None:
    """What the run's own file says of it; None where there is none, or none that can be read."""
    try:
        return read_json(plan.out / RUN_FILE).get("status")
    except (OSError, ValueError, AttributeError):
        return None


def earlier_row(plan: Plan, retry_failed: bool) -> dict[str, Any] | None:
    """The row of a run that an earlier attempt finished, or saw fail and is not to retry; else None."""
    if status_of(plan) == "failed" and not retry_failed:
        return failed_row(plan, read_json(plan.out / RUN_FILE).get("error", "unknown"))
    return finished_row(plan)


def finished_row(plan: Plan) -> dict[str, Any] | None:
    """The run's row if it is finished and whole, else None."""
    try:
        state = read_json(plan.out / RUN_FILE)
        notebooks = [state["notebooks"][notebook.path.name]["status"] for notebook in plan.notebooks]
        whole = state["status"] == "done" and state["key"] == plan.key and set(notebooks) == {"done"}
        return row_of(plan) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def row_of(plan: Plan) -> dict[str, Any]:
    """A finished run as one flat row; ValueError if its metrics break the schema."""
    metrics = read_json(plan.out / METRICS_FILE)
    validate(metrics)
    seconds = sum(one["seconds"] for one in read_json(plan.out / RUN_FILE)["notebooks"].values())
    measured = {name: metrics[name] for name in MEASURED if name in metrics}
    return {**_identity(plan), "status": "done", "seconds": seconds, "error": "", **flat(measured)}


def failed_row(plan: Plan, error: str) -> dict[str, Any]:
    """A failed run as a row without figures."""
    return {**_identity(plan), "status": "failed", "seconds": None, "error": error}


def _identity(plan: Plan) -> dict[str, Any]:
    return {"folder": plan.out.name, **plan.settings, **flat(plan.parameters)}


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write `results.csv` and `results.parquet`; columns in the order in which rows first have them."""
    import pandas

    table = pandas.DataFrame(rows).convert_dtypes()  # whole numbers stay whole beside missing ones
    for name in table.select_dtypes("object"):
        table[name] = table[name].astype("string")  # a column of mixed types has no place in a parquet file
    csv, parquet = (folder / name for name in TABLES)
    with replacing(csv) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    with replacing(parquet) as temporary:
        table.to_parquet(temporary, index=False)
