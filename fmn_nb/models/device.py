"""How a model computes: temporary modes and gradients, mixed precision, and cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

# ---- for a while ----------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode (no dropout: attention is measured as it is used); restored afterwards."""
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_gradients(*parts: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; afterwards, those that did before do so again."""
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    try:
        for part in parts:
            part.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def gradient_checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing is switched on if wanted (and off so far), and off again afterwards."""
    switch = wanted and not model.is_gradient_checkpointing
    try:
        if switch:
            model.enable_gradient_checkpointing()
        yield
    finally:
        if switch:
            model.disable_gradient_checkpointing()


# ---- precision ------------------------------------------------------------------------------------------------------

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class MixedPrecision:
    """Training of float32 weights that compute in half precision (Micikevicius et al., arXiv 1710.03740).

    Args:
        name: "no", "bf16" or "fp16"; for "fp16" losses are scaled, so that small gradients don't vanish.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._device, self._dtype = device.type, HALVES.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Context in which the model computes in that precision."""
        return torch.autocast(self._device, self._dtype) if self._dtype else nullcontext()

    @classmethod
    def of(cls, model: nn.Module) -> MixedPrecision:
        """For weights beside a model that stays as it is: losses are scaled if it computes in float16."""
        first = next(model.parameters())
        return cls("fp16" if first.dtype == torch.float16 else "no", first.device)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        self.scaler.scale(loss).backward()

    def clip(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], norm: float) -> None:
        """Clip the gradients' common norm, before a step."""
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimiser take a step, and clear the gradients."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)


# ---- cost -----------------------------------------------------------------------------------------------------------


class Memory:
    """The most memory seen, in bytes: that of the device's tensors on a GPU, otherwise that of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self._process = device, 0, psutil.Process()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def note(self) -> None:
        """Note the memory in use now."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = max(self.peak, self._process.memory_info().rss)


@dataclass
class Cost:
    """Filled when the `measured_cost` block ends: seconds, and the most memory seen meanwhile in bytes."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


@contextmanager
def measured_cost(device: torch.device) -> Iterator[Cost]:
    """Measure a block; its memory is that of the device's tensors on a GPU, otherwise that of the whole process."""
    cost, memory, ended = Cost(), Memory(device), threading.Event()

    def look() -> None:
        while not ended.wait(0.05):  # seconds between two looks at the process's memory
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
