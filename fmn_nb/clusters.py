"""A sweep's runs on a Dask cluster (extra `dask`): this machine's, an existing scheduler, Slurm or Kubernetes.

Every worker takes one run at a time, and its kernels their own processes, so workers are started with one thread.
All workers must see the sweep's folder under the same path, or its URL. A run whose worker dies is taken up by
another one.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fmn_nb.plans import Plan
from fmn_nb.storage import SweepError
from fmn_nb.sweep_threads import thread_variables, threads_each

Attempt = Callable[[Plan], str | None]
WORKER_PATIENCE = 60  # seconds for a scheduler that exists to have its first worker
KILLER = "its Dask worker died each time it was tried, also alone (out of memory?); look at the workers' memory limits"

#: kind -> module that has its class; the remaining keys of the cluster block are that class's arguments
CLUSTERS = {
    "local": ("distributed", "LocalCluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}


def in_dask(
    todo: Iterable[Plan],
    attempt: Attempt,
    workers: int,
    scheduler: str | None,
    block: Mapping[str, Any] | None,
    leftover: Path | None = None,
) -> Iterator[tuple[Plan, str | None]]:
    """Yield (plan, its error or None) as runs end on a Dask cluster; then remove `leftover` on its workers' machines.

    `scheduler` (an address) wins over the specification's `block`, whose keys are `kind` (see `CLUSTERS`, or
    "scheduler" with an `address`), `gpu: true` (a run takes its worker's one "GPU" resource, so that two runs
    never share a card) and whatever the cluster's class takes. Raises SweepError when Dask, the scheduler or
    workers that could take the runs are not there.
    """
    distributed = _module("distributed")
    options = dict(block or {})
    gpu = bool(options.pop("gpu", False))
    kind = "scheduler" if scheduler else options.pop("kind", "scheduler")
    with ExitStack() as stack:
        stack.enter_context(_environment_kept())
        slots = options.get("n_workers", workers) * options.get("threads_per_worker", 1)
        variables = thread_variables(threads_each(slots), os.environ) if kind == "local" else None
        cards = _cards(slots) if kind == "local" and gpu else None
        try:
            target = (scheduler or options["address"]) if kind == "scheduler" else _cluster(kind, options, workers, gpu)
            if kind != "scheduler":
                stack.enter_context(target)
            client = stack.enter_context(distributed.Client(target, timeout=20))
        except OSError as error:
            raise SweepError(f"the Dask scheduler cannot be reached: {error}") from error
        if kind == "scheduler":
            _check_workers(client, target, gpu)
        elif kind == "slurm":
            target.scale(workers)
        work = partial(_on_worker, attempt, variables, cards)
        yield from _through(client, partial(client.submit, work, resources={"GPU": 1} if gpu else None), todo, workers)
        if leftover is not None:
            client.run(shutil.rmtree, str(leftover), ignore_errors=True, on_error="ignore")


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what a local cluster does to this process: it sets the thread variables to 1 before it starts workers."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _through(
    client: Any, submit: Callable[..., Any], todo: Iterable[Plan], workers: int
) -> Iterator[tuple[Plan, str | None]]:
    """Submit as many runs as there are workers, and the next one when one ends.

    A worker that dies counts against every run it holds. So those that Dask gives up are tried again one at a
    time, and only the one that takes its worker down with it is given up.
    """
    from distributed import KilledWorker, as_completed

    waiting, under_way, suspects = list(reversed(list(todo))), {}, []
    ended = as_completed()

    def fill() -> None:
        while waiting and len(under_way) < max(workers, sum(client.nthreads().values())):
            plan = waiting.pop()
            future = submit(plan, key=f"run-{plan.key}")
            under_way[future] = plan
            ended.add(future)

    fill()
    for future in ended:
        plan, error = under_way.pop(future), future.exception()
        if isinstance(error, KilledWorker):
            suspects.append(plan)
        else:
            yield plan, _told(future, error)
        fill()
    for plan in suspects:
        future = submit(plan, key=f"run-{plan.key}-alone")
        error = future.exception()
        yield plan, KILLER if isinstance(error, KilledWorker) else _told(future, error)


def _told(future: Any, error: BaseException | None) -> str | None:
    return future.result() if error is None else f"{type(error).__name__}: {error}"


def _on_worker(
    attempt: Attempt, variables: dict[str, str] | None, cards: list[str] | None, plan: Plan
) -> str | None:
    """Execute one run in a Dask worker, whose kernel gets the worker's share of the cores, and its own card."""
    from distributed import get_worker

    os.environ.update(_own_share() if variables is None else variables)
    if cards:
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[int(get_worker().name)]
    return attempt(plan)


def _own_share() -> dict[str, str]:
    """This worker's thread variables: of the cores it was given, or of the machine's, shared with its neighbours."""
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


def _check_workers(client: Any, address: str, gpu: bool) -> None:
    """An existing scheduler has workers that can take the runs; nothing would ever start otherwise."""
    start = f"dask worker {address} --nthreads 1" + (' --resources "GPU=1"' if gpu else "")
    try:
        client.wait_for_workers(1, timeout=WORKER_PATIENCE)
    except TimeoutError:
        raise SweepError(f"the scheduler {address} has no workers; start some with: {start}") from None
    if gpu and not any(one["resources"].get("GPU") for one in client.scheduler_info()["workers"].values()):
        raise SweepError(f"none of the workers of {address} has a GPU resource; start one for each card with: "
                         f"CUDA_VISIBLE_DEVICES=N {start}")


def _cards(workers: int) -> list[str] | None:
    """The cards of this machine, one for each worker; None where there is none. SweepError if there are too few."""
    import torch

    count = torch.cuda.device_count()
    if count and count < workers:
        raise SweepError(f"{workers} workers need a card each and this machine has {count}; set workers: {count}")
    named = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return (named or [str(number) for number in range(count)]) if count else None


def _cluster(kind: str, options: Mapping[str, Any], workers: int, gpu: bool) -> Any:
    """Start a cluster; each of its workers takes one run at a time."""
    module, name = _module(CLUSTERS[kind][0]), CLUSTERS[kind][1]
    return getattr(module, name)(**_ARGUMENTS[kind](dict(options), workers, gpu, module))


def _local(options: dict[str, Any], workers: int, gpu: bool, module: Any) -> dict[str, Any]:
    options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None} | options
    return options | ({"resources": {"GPU": 1}} if gpu else {})


def _slurm(options: dict[str, Any], workers: int, gpu: bool, module: Any) -> dict[str, Any]:
    """One worker a job, and one run at a time in it, which has all the job's cores."""
    extra = [*options.pop("worker_extra_args", []), "--nthreads", "1", *(["--resources", "GPU=1"] if gpu else [])]
    return {"processes": 1} | options | {"worker_extra_args": extra}


def _kubernetes(options: dict[str, Any], workers: int, gpu: bool, module: Any) -> dict[str, Any]:
    """KubeCluster gives `resources` to the scheduler as well, so a card is asked for in the workers' part alone."""
    command = ["dask", "worker", "--nthreads", "1", *(["--resources", "GPU=1"] if gpu else [])]
    options = {"name": f"fmn-nb-{secrets.token_hex(3)}", "n_workers": workers, "worker_command": command} | options
    if not gpu:
        return options
    described = ("name", "image", "n_workers", "resources", "env", "worker_command", "scheduler_service_type",
                 "idle_timeout", "jupyter")
    spec = module.make_cluster_spec(**{name: options.pop(name) for name in described if name in options})
    container = spec["spec"]["worker"]["spec"]["containers"][0]
    resources = container.get("resources") or {}
    limits = {"nvidia.com/gpu": 1} | resources.get("limits", {})
    container["resources"] = {**resources, "limits": limits}
    return options | {"custom_cluster_spec": spec}


_ARGUMENTS = {"local": _local, "slurm": _slurm, "kubernetes": _kubernetes}


def _module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0].replace("_", "-")
        raise SweepError(f'{package} is not installed: pip install -c constraints.txt ".[dask]" {package}') from None
