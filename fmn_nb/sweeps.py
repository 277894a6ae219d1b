"""Many runs that survive: a pool of processes, resume after any kill, and one table at the end.

A run is finished when its `run.json` says "done" for the same parameters and notebooks and its `metrics.json` is
valid. Everything else is begun anew, so a killed sweep's table ends up equal to an unbroken one's.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fmn_nb.files import read_json, replacing, write_json
from fmn_nb.plans import RUN_FILE, Plan
from fmn_nb.report import write_report
from fmn_nb.results import MEASURED, METRICS_FILE, validate
from fmn_nb.runs import RunError, execute
from fmn_nb.sweep_specs import Sweep, SweepError, plan_sweep
from fmn_nb.sweep_table import Watch

__all__ = ["Sweep", "SweepError", "plan_sweep", "run_sweep"]

SWEEP_FILE = "sweep.json"
Outcome = tuple[Plan, str | None]  # a run and its error, None when it is finished
ATTEMPTS = 3  # how often a run may take its worker down with it
KERNEL_LAG = 2.5  # seconds: a kernel whose worker died looks for it once a second, then ends
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def run_sweep(
    sweep: Sweep,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    retry_failed: bool = False,
    watch: Watch | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Execute what is not finished yet; return the sweep's folder and the rows of failed runs.

    Leaves `results.csv`, `results.parquet` (a row a run, in the order of the specification), `report.html` and a
    folder a run, also when interrupted. Runs that failed in an earlier attempt are repeated with `retry_failed`.
    `watch` is told of every run that ends.
    `scheduler` is the address of a Dask scheduler, used in place of processes on this machine.
    Raises SweepError when another sweep is working in the folder.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(sweep.folder / ".lock", timeout=0), watch or Watch() as watch:
            return sweep.folder, _run_all(sweep, workers or sweep.workers, scheduler, retry_failed, watch)
    except Timeout:
        raise SweepError(f"another sweep is working in {sweep.folder}; wait for it or give another --out") from None


def _run_all(
    sweep: Sweep, workers: int, scheduler: str | None, retry_failed: bool, watch: Watch
) -> list[dict[str, Any]]:
    write_json(sweep.folder / SWEEP_FILE, {
        "runs": len(sweep.plans), "varied": sweep.varied, "notebooks": sweep.notebooks, "workers": workers,
    })
    rows = {plan.key: row for plan in sweep.plans if (row := earlier_row(plan, retry_failed))}
    todo = [plan for plan in sweep.plans if plan.key not in rows]
    watch.start(len(sweep.plans), len(rows), workers)
    try:
        for plan, error in _executed(sweep, todo, workers, scheduler):
            rows[plan.key] = row_of(plan) if error is None else failed_row(plan, error)
            watch.row(rows[plan.key])
    finally:
        ordered = [rows[plan.key] for plan in sweep.plans if plan.key in rows]
        write_table(sweep.folder, ordered)
        write_report(sweep.folder)
    return [row for row in ordered if row["status"] != "done"]


def _executed(sweep: Sweep, todo: list[Plan], workers: int, scheduler: str | None) -> Iterator[Outcome]:
    if not todo:
        return iter(())
    if scheduler or sweep.cluster:
        from fmn_nb.clusters import in_dask

        return in_dask(todo, attempt, workers, scheduler, sweep.cluster)
    return in_processes(todo, workers)


def in_processes(todo: Iterable[Plan], workers: int) -> Iterator[Outcome]:
    """Yield (plan, its error or None) as runs end, from a pool of processes.

    When a worker is killed the whole pool ends. The runs that were under way are then tried one at a time, so
    that only the one that takes its worker down with it is given up; the rest goes on in a new pool.
    """
    waiting, threads, barren = list(todo), threads_each(workers), 0
    while waiting:
        broken = yield from _in_one_pool(waiting, workers, threads)
        under_way = {plan.key for plan in broken if status_of(plan) == "running"}
        suspects = [plan for plan in broken if plan.key in under_way]
        waiting = [plan for plan in broken if plan.key not in under_way]
        for plan in suspects:
            yield from _alone(plan, threads)
        barren = barren + 1 if broken and not suspects else 0
        if barren == ATTEMPTS:
            raise SweepError("worker processes end before they take up a run; look at memory limits, then start again")


def _alone(plan: Plan, threads: int) -> Iterator[Outcome]:
    for _ in range(ATTEMPTS - 1):  # it has had its first attempt
        if not (yield from _in_one_pool([plan], 1, threads)):
            return
    yield plan, f"its worker process was killed {ATTEMPTS} times (out of memory?)"


def _in_one_pool(plans: list[Plan], workers: int, threads: int) -> Generator[Outcome, None, list[Plan]]:
    """Yield outcomes until all plans are through or the pool breaks; return the plans without an outcome."""
    broken = set()
    pool = ProcessPoolExecutor(
        min(workers, len(plans)), multiprocessing.get_context("spawn"), _start_worker, (threads,)
    )
    try:
        futures = {pool.submit(attempt, plan): plan for plan in plans}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                broken.add(futures[future].key)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [plan for plan in plans if plan.key in broken]


def attempt(plan: Plan) -> str | None:
    """Execute one run from a clean folder; return its error's text, or None. Runs in a worker."""
    try:
        if status_of(plan) == "running":
            time.sleep(KERNEL_LAG)  # an orphaned kernel of the killed attempt may still be writing
        if finished_row(plan) is None:
            execute(plan, fresh=True, patience=10)
    except (RunError, ValueError, OSError) as error:
        return str(error)
    return None


def threads_each(workers: int) -> int:
    """Cores of this machine (those this process may use) for each of `workers`, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // workers)


def _start_worker(threads: int) -> None:
    """Give this worker's kernels their share of the cores, and end it when the sweep's process dies."""
    for name in _THREAD_VARIABLES:
        given = os.environ.get(name, "")
        os.environ[name] = str(min(int(given), threads) if given.isdigit() and int(given) else threads)
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
    return {**_identity(plan), "status": "done", "seconds": seconds, "error": "", **_flat(measured)}


def failed_row(plan: Plan, error: str) -> dict[str, Any]:
    """A failed run as a row without figures."""
    return {**_identity(plan), "status": "failed", "seconds": None, "error": error}


def _identity(plan: Plan) -> dict[str, Any]:
    return {"folder": plan.out.name, **plan.settings, **_flat(plan.parameters)}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"after": {"ua": 1, "ci95": {"ua": [0, 1]}}} as {"after.ua": 1, "after.ci95.ua.0": 0, ...}."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write `results.csv` and `results.parquet`; columns in the order in which rows first have them."""
    import pandas

    table = pandas.DataFrame(rows).convert_dtypes()  # whole numbers stay whole beside missing ones
    for name in table.select_dtypes("object"):
        table[name] = table[name].astype("string")  # a column of mixed types has no place in a parquet file
    with replacing(folder / "results.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    with replacing(folder / "results.parquet") as temporary:
        table.to_parquet(temporary, index=False)
