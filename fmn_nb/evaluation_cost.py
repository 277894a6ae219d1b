"""What forgetting and measuring cost: seconds, peak memory, bytes. Quality without its cost is half a result."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fmn_nb.forgetting_device import Memory
from fmn_nb.patches import Patch

LOOK_EVERY = 0.05  # seconds between two looks at the process's memory


@dataclass
class Cost:
    """Filled when the `measured_cost` block ends: seconds, and the most memory seen meanwhile in bytes."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


@contextmanager
def measured_cost(device: torch.device) -> Iterator[Cost]:
    """Measure a block: of the device's tensors on a GPU, else of the whole process."""
    cost, memory, ended = Cost(), Memory(device), threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_EVERY):
            memory.note()

    watcher = threading.Thread(target=look, daemon=True)
    started = time.perf_counter()
    watcher.start()
    try:
        yield cost
    finally:
        ended.set()
        watcher.join()
        memory.note()
        cost.seconds, cost.peak_memory_bytes = time.perf_counter() - started, memory.peak


def cost_of(patch: Patch | None, evaluation: Cost) -> dict[str, float | int]:
    """The cost section of metrics.json: what the patch's fine-tune reported, its bytes, and the evaluation's own."""
    found: dict[str, float | int] = {}
    if patch is not None:
        said = patch.info.get("forgetting", {})
        found = {f"forgetting_{name}": said[name] for name in ("seconds", "peak_memory_bytes") if name in said}
        found["patch_bytes"] = patch.nbytes
    return found | {"evaluation_seconds": round(evaluation.seconds, 3),
                    "evaluation_peak_memory_bytes": evaluation.peak_memory_bytes}
