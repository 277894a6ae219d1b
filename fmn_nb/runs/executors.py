"""The one executor: Dask. Workers on this machine, at an existing scheduler, or started through Slurm.

Every worker takes one run at a time, and its kernels their own processes, so workers are started with one thread.
All workers must see the sweep's folder under the same path, or its URL. A worker that dies is replaced, and its run is
tried again; only a run that takes its worker down each time is given up. Workers end with the process that started
them, and kernels with their workers, however these end. If the sweep is stopped, its runs are asked to stop.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.runs.plan import Plan
from fmn_nb.runs.stopping import (
    Stopped,
    ask_to_stop,
    keep_semaphores_tracked,
    leave_signals_to_parent,
    signals_held,
    stoppable,
)
from fmn_nb.runs.storage import SweepError

if TYPE_CHECKING:
    from distributed import Client, Future

Attempt = Callable[[Plan], str | None]
Outcome = tuple[Plan, str | None]  # a run and its error; None if it is finished
ATTEMPTS = 3  # how often a run may take its worker down with it
ASK_EVERY = 1.0  # seconds between two checks of how many workers there are
QUICK, HANDFUL = 5, 10  # a worker that finished more than QUICK runs in that time gets HANDFUL at once
WORKER_PATIENCE = 60  # seconds for an existing scheduler to get its first worker
STOP_PATIENCE = 3.0  # seconds that runs get to stop; they take about one
KILLED = f"its worker process was killed {ATTEMPTS} times (out of memory?); look at memory limits"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # with these, a user says how threads wait
SPINS = "300"  # fewer slow a process that is alone, more slow those that run together (tests/speed/bench_runs.py cores)


def executed(todo: Iterable[Plan], attempt: Attempt, workers: int, scheduler: str | None = None,
             block: Mapping[str, Any] | None = None, leftover: Path | None = None,
             begun: Callable[[Plan], Any] = lambda plan: None) -> Iterator[Outcome]:
    """Yield (plan, its error or None) as runs end; then remove `leftover` on the workers' machines.

    Args:
        attempt: executes one run and returns its error; it is called in a worker.
        workers: how many runs at a time, if workers are started here.
        scheduler: the address of an existing scheduler; it takes precedence over `block`.
        block: the specification's cluster: `kind` ("local" by default, "slurm", or "scheduler" with an `address`),
            `gpu: true` (a run takes its worker's one "GPU" resource, so that two runs never share a card), and whatever
            the cluster's class takes.
        begun: is called with every run that a worker gets.

    Raises:
        SweepError: the scheduler, the cluster's package, or workers that could take the runs are not there.
    """
    options = {"kind": "local", **(block or {})} if not scheduler else {"kind": "scheduler", "address": scheduler,
                                                                       "gpu": (block or {}).get("gpu", False)}
    kind, gpu = options.pop("kind"), bool(options.pop("gpu", False))
    with ExitStack() as stack:
        stack.enter_context(_environment_kept())
        cards = None
        try:
            if kind == "scheduler":
                client = stack.enter_context(_client(options["address"]))
                _check_workers(client, options["address"], gpu)
            elif kind == "local":
                slots = options.get("n_workers", workers) * options.get("threads_per_worker", 1)
                cards = _cards(slots) if gpu else None
                client = stack.enter_context(_client(stack.enter_context(_local(options, workers, slots, gpu))))
            else:
                cluster = stack.enter_context(_slurm(options, gpu))
                cluster.scale(workers)
                client = stack.enter_context(_client(cluster))
        except (OSError, RuntimeError) as error:
            raise SweepError(f"the Dask scheduler cannot be reached: {error}") from error
        work = partial(_on_worker, attempt, cards, kind != "local")
        tries = ATTEMPTS - 1 if kind == "local" else 1  # elsewhere the scheduler's own settings say how often
        submit = partial(client.map, work, resources={"GPU": 1} if gpu else None)
        yield from _through(client, submit, todo, tries, begun)
        if leftover is not None:
            client.run(shutil.rmtree, str(leftover), ignore_errors=True, on_error="ignore")


def _through(client: Client, submit: Callable[..., Any], todo: Iterable[Plan], tries: int,
             begun: Callable[[Plan], Any]) -> Iterator[Outcome]:
    """Submit a run for each worker, and more when some end; very quick ones go in handfuls.

    A worker that dies counts against every run it holds. So the runs that Dask gives up are tried again one at a time,
    `tries` times, and only the run that takes its worker down each time is given up.
    """
    from distributed import KilledWorker, as_completed, wait

    waiting, under_way, suspects = list(reversed(list(todo))), {}, []
    mine = secrets.token_hex(4)  # a scheduler takes two tasks of one key for one, also of two users
    ended = as_completed(with_results=True, raise_errors=False)
    slots, handful, asked, before = 1, 1, -math.inf, len(waiting)

    def fill() -> None:
        nonlocal slots, handful, asked, before
        now = time.monotonic()
        if now > asked + ASK_EVERY:
            handful = HANDFUL if before - len(waiting) > QUICK * slots else 1
            slots, asked, before = max(1, sum(client.nthreads().values())), now, len(waiting)
        taken = []
        while waiting and len(under_way) + len(taken) < slots:
            taken.append([waiting.pop() for _ in range(min(handful, len(waiting)))])
        futures = submit(taken, key=[f"run-{mine}-{plans[0].key}" for plans in taken]) if taken else []
        under_way.update(zip(futures, taken, strict=True))
        ended.update(futures)
        for plans in taken:
            for plan in plans:
                begun(plan)

    try:
        fill()
        for batch in ended.batches():
            for future, result in batch:
                plans, error = under_way.pop(future), future.exception() if _has_failed(future) else None
                if isinstance(error, KilledWorker):
                    suspects += plans
                else:
                    yield from zip(plans, result if error is None else [_said(error)] * len(plans), strict=True)
            fill()
        for plan in suspects:
            for number in range(tries):
                future, = submit([[plan]], key=[f"run-{mine}-{plan.key}-alone-{number}"])
                under_way = {future: [plan]}
                wait(future)
                error = future.exception() if _has_failed(future) else None
                if not isinstance(error, KilledWorker):
                    break
            yield plan, future.result()[0] if error is None else _said(error)
    except (KeyboardInterrupt, GeneratorExit):
        _stop(client, under_way)
        raise


def _has_failed(future: Future) -> bool:
    """Whether a run ended with an error; a SweepError if nobody will ever say how it ended."""
    if future.status in ("cancelled", "lost"):
        raise SweepError("the connection to the Dask scheduler was lost; what is finished is kept, and the same "
                         "command continues once the scheduler is back")
    return future.status == "error"


def _stop(client: Client, under_way: Mapping[Any, list[Plan]]) -> None:
    """Ask the runs that workers hold to stop, and give those that heed it the time they need."""
    from distributed import wait

    heeding = {future: [plan.out for plan in plans if getattr(plan, "heeds_stop", True)]
               for future, plans in under_way.items()}
    if folders := [folder for folders in heeding.values() for folder in folders]:
        client.run(ask_to_stop, folders, on_error="ignore")
        with suppress(TimeoutError):
            wait([future for future in heeding if heeding[future]], timeout=STOP_PATIENCE)
    if client.cluster is not None and not all(heeding.values()):
        client.cluster.busy = True


def _said(error: BaseException) -> str:
    from distributed import KilledWorker

    return KILLED if isinstance(error, KilledWorker) else f"{type(error).__name__}: {error}"


def _client(target: Any) -> Client:
    from distributed import Client

    return Client(target, timeout=20)


@contextmanager
def _local(options: Mapping[str, Any], workers: int, slots: int, gpu: bool) -> Iterator[Any]:
    """Workers on this machine: processes of one thread, whose kernels share its cores."""
    import dask
    from distributed import LocalCluster

    options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": 0,
               "silence_logs": logging.CRITICAL, "preload": [__name__],
               **({"resources": {"GPU": 1}} if gpu else {}), **options}
    settings = {
        "distributed.nanny.pre-spawn-environ": thread_variables(threads_each(slots), os.environ),
        "distributed.scheduler.allowed-failures": 0,  # a run whose worker died is tried again alone
        "distributed.worker.profile.enabled": False,
    }
    with tempfile.TemporaryDirectory(prefix="fmn-", ignore_cleanup_errors=True) as scratch:
        with dask.config.set(settings | {"temporary-directory": scratch}):
            keep_semaphores_tracked()
            with signals_held():  # workers that start would each end with a traceback of their own
                cluster = LocalCluster(**options)
            with cluster:
                try:
                    yield cluster
                except (KeyboardInterrupt, GeneratorExit):
                    if getattr(cluster, "busy", False):  # with what doesn't heed a stop
                        _end_workers(cluster)
                    raise


def _end_workers(cluster: Any) -> None:
    """End the cluster's processes at once, whatever they compute: if only asked, a busy one would go on for seconds."""
    for nanny in cluster.workers.values():
        nanny.auto_restart = False
        if nanny.pid:
            with suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def _slurm(options: dict[str, Any], gpu: bool) -> AbstractContextManager[Any]:
    """One worker per Slurm job, with one run at a time, which has all the job's cores."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise SweepError('dask-jobqueue is not installed: pip install -c constraints.txt ".[dask]"') from None
    extra = [*options.pop("worker_extra_args", []), "--nthreads", "1", *(["--resources", "GPU=1"] if gpu else [])]
    return SLURMCluster(**{"processes": 1, **options, "worker_extra_args": extra})


def _check_workers(client: Client, address: str, gpu: bool) -> None:
    """Check that an existing scheduler has workers that can take the runs; otherwise nothing would ever start."""
    start = f"dask worker {address} --nthreads 1" + (' --resources "GPU=1"' if gpu else "")
    try:
        client.wait_for_workers(1, timeout=WORKER_PATIENCE)
    except TimeoutError:
        raise SweepError(f"the scheduler {address} has no workers; start some with: {start}") from None
    if gpu and not any(one["resources"].get("GPU") for one in client.scheduler_info()["workers"].values()):
        raise SweepError(f"none of the workers of {address} has a GPU resource; start one for each card with: "
                         f"CUDA_VISIBLE_DEVICES=N {start}")


def _cards(workers: int) -> list[str] | None:
    """The cards of this machine, one for each worker; None if there are none. SweepError if there are too few."""
    import torch

    count = torch.cuda.device_count()
    if count and count < workers:
        raise SweepError(f"{workers} workers need a card each and this machine has {count}; set workers: {count}")
    named = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return (named or [str(number) for number in range(count)]) if count else None


def _on_worker(attempt: Attempt, cards: list[str] | None, sharing: bool, plans: list[Plan]) -> list[str | None]:
    """Execute runs in a Dask worker, whose kernels get the worker's share of the cores and its own card.

    `sharing`: somebody else started the worker, so its share must be found out.
    """
    from distributed import get_worker

    if sharing:
        os.environ.update(_own_share())
    if cards:
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[int(get_worker().name)]
    with stoppable(plan.out for plan in plans):
        try:
            return [attempt(plan) for plan in plans]
        except Stopped as stop:
            raise RuntimeError(str(stop)) from None  # a KeyboardInterrupt would end the worker


def dask_setup(worker: Any) -> None:
    """Dask calls this in each local worker at its start."""
    leave_signals_to_parent()
    atexit.register(gc.freeze)  # the last garbage collection takes long, and frees what the system frees anyway


def _own_share() -> dict[str, str]:
    """This worker's thread variables: for the cores it was given, or the machine's, shared with its neighbours."""
    from dask.system import CPU_COUNT
    from distributed import get_client, get_worker

    worker = get_worker()
    booked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    cores, slots = int(booked) if booked.isdigit() else CPU_COUNT, worker.state.nthreads
    if not booked and cores >= (os.cpu_count() or 1):
        everyone = get_client().scheduler_info()["workers"]
        host = everyone[worker.address]["host"]
        slots = sum(one["nthreads"] for one in everyone.values() if one["host"] == host)
    # Dask itself sets the variables to 1 where nothing was said; a higher number is somebody's wish.
    said = {name: value for name, value in os.environ.items() if value != "1"}
    return thread_variables(max(1, cores // slots), said)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what a local cluster does to this process: it sets its workers' thread variables here before they start."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def threads_each(workers: int) -> int:
    """Cores of this machine (those this process may use) for each of `workers`, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // workers)


def thread_variables(threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that numeric libraries read, at most `threads` each; lower values in the environment stay."""
    given = {name: environment.get(name, "") for name in THREADS}
    return {name: str(min(int(one), threads) if one.isdigit() and int(one) else threads) for name, one in given.items()}


def patient_threads(environment: Mapping[str, str]) -> dict[str, str]:
    """How long OpenMP's threads spin while they wait, unless the environment says how they should wait.

    By default they spin for a long time, which is ruinous if others use the cores: the spinning keeps away the thread
    that they wait for. This short spinning costs a process that is alone next to nothing, and two processes share the
    cores. The number of threads, and so every result, stays the same.
    """
    return {} if any(environment.get(name) for name in _WAITING) else {"GOMP_SPINCOUNT": SPINS}
