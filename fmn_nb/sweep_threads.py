"""How many threads a run's kernel may use, so that runs side by side don't fight for the cores."""

import os
from collections.abc import Mapping

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def threads_each(workers: int) -> int:
    """Cores of this machine (those this process may use) for each of `workers`, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // workers)


def thread_variables(threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that numeric libraries read, at most `threads` each; what the environment says is kept if lower."""
    given = {name: environment.get(name, "") for name in VARIABLES}
    return {name: str(min(int(one), threads) if one.isdigit() and int(one) else threads) for name, one in given.items()}
