"""A sweep's runs on a Dask cluster (extra `dask`): this machine's, an existing scheduler, Slurm or Kubernetes.

Every worker takes one run at a time, and its kernels their own processes, so workers are started with one thread.
All workers must see the sweep's folder under the same path. A run whose worker dies is taken up by another one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from fmn_nb.plans import Plan
from fmn_nb.sweep_specs import SweepError

#: kind -> module that has its class; the remaining keys of the cluster block are that class's arguments
CLUSTERS = {
    "local": ("distributed", "LocalCluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}


def in_dask(
    todo: Iterable[Plan],
    attempt: Callable[[Plan], str | None],
    workers: int,
    scheduler: str | None,
    block: Mapping[str, Any] | None,
) -> Iterator[tuple[Plan, str | None]]:
    """Yield (plan, its error or None) as runs end on a Dask cluster.

    `scheduler` (an address) wins over the specification's `block`, whose keys are `kind` (see `CLUSTERS`, or
    "scheduler" with an `address`), `gpu: true` (a run takes its worker's one "GPU" resource, so that two runs
    never share a card) and whatever the cluster's class takes. Raises SweepError when Dask or the scheduler is
    not there.
    """
    distributed = _module("distributed")
    options = dict(block or {})
    gpu = bool(options.pop("gpu", False))
    with ExitStack() as stack:
        try:
            target = _target(stack, workers, scheduler, options, gpu)
            client = stack.enter_context(distributed.Client(target, timeout=20))
        except OSError as error:
            raise SweepError(f"the Dask scheduler cannot be reached: {error}") from error
        needs = {"GPU": 1} if gpu else None
        futures = {client.submit(attempt, plan, key=f"run-{plan.key}", resources=needs): plan for plan in todo}
        for future in distributed.as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else f"{type(error).__name__}: {error}"


def _target(stack: ExitStack, workers: int, scheduler: str | None, options: dict[str, Any], gpu: bool) -> Any:
    """What a Client connects to: an address, or a cluster started here that ends with `stack`."""
    kind = options.pop("kind", "scheduler")
    if scheduler or kind == "scheduler":
        return scheduler or options["address"]
    module, name = CLUSTERS[kind]
    if kind == "local":
        options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None} | options
        options |= {"resources": {"GPU": 1}} if gpu else {}
    elif gpu and kind == "slurm":
        options["worker_extra_args"] = [*options.get("worker_extra_args", []), "--resources", "GPU=1"]
    cluster = stack.enter_context(getattr(_module(module), name)(**options))
    if kind != "local":
        cluster.scale(workers)
    return cluster


def _module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0].replace("_", "-")
        raise SweepError(f'{package} is not installed: pip install -c constraints.txt ".[dask]" {package}') from None
