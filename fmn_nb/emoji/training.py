"""A small training loop that survives being killed: AdamW, a trapezoid learning rate, averaged weights, checkpoints.

Randomness depends on (seed, step) alone, so a resumed run takes exactly the steps an unbroken one would.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fmn_nb.files import replacing

Losses = dict[str, Tensor]


@dataclass
class Plan:
    """How long and how fast to train; `seconds_between_checkpoints` bounds what a kill can lose."""

    steps: int
    learning_rate: float
    warmup: int = 100
    decay_share: float = 0.3  # of the steps, at the end, in which the learning rate falls to zero
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average: float = 0.999  # decay of the exponential moving average of the weights
    seed: int = 0
    seconds_between_checkpoints: float = 120.0
    report_every: int = 50


def trapezoid(step: int, plan: Plan) -> float:
    """The learning rate's share of its peak: linear warm-up, flat, linear decay to zero."""
    decay_steps = max(1, round(plan.steps * plan.decay_share))
    return min(1.0, (step + 1) / max(1, plan.warmup), (plan.steps - step) / decay_steps)


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A generator for one purpose, from a seed and what names the purpose (a step, a batch, an image)."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass
class Training:
    """One model in training.

    `loss` maps (step, generator) to named losses, of which "loss" is minimised. The weights' moving average is what
    a finished training leaves in the module.
    """

    name: str
    module: nn.Module
    loss: Callable[[int, torch.Generator], Losses]
    plan: Plan
    checkpoint: Path | None = None
    log: Callable[[str], None] = print
    step: int = 0
    seconds: float = 0.0
    _means: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
        self._optimiser = torch.optim.AdamW(self._weights.values(), lr=self.plan.learning_rate,
                                            weight_decay=self.plan.weight_decay, betas=(0.9, 0.99), fused=True)
        self._average = {k: p.detach().clone() for k, p in self._weights.items()}
        if self.checkpoint is not None and self.checkpoint.is_file():
            self._restore(self.checkpoint)
            self.log(f"{self.name}: resumed at step {self.step} of {self.plan.steps}")

    def run(self) -> None:
        """Train to the plan's last step, then put the averaged weights into the module."""
        self.module.train()
        started = saved = time.monotonic()
        before = self.seconds
        while self.step < self.plan.steps:
            self._train_step()
            now = time.monotonic()
            self.seconds = before + now - started
            if self.step % self.plan.report_every == 0 or self.step == self.plan.steps:
                self._report()
            if self.checkpoint is not None and now - saved > self.plan.seconds_between_checkpoints:
                self.save()
                saved = now
        if self.checkpoint is not None:
            self.save()
        self._load(self._average)
        self.module.eval()

    def _train_step(self) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self.plan.learning_rate * trapezoid(self.step, self.plan)
        losses = self.loss(self.step, generator(self.plan.seed, self.name, self.step))
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(f"{self.name}: the loss is {losses['loss'].item()} at step {self.step}")
        self._optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self._weights.values(), self.plan.clip_norm)
        self._optimiser.step()
        self.step += 1
        self._update_average()
        for key, value in losses.items():
            self._means[key] = 0.98 * self._means.get(key, value.item()) + 0.02 * value.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
        averages = list(self._average.values())
        torch._foreach_lerp_(averages, [p.detach() for p in self._weights.values()], 1 - decay)

    def _report(self) -> None:
        values = "  ".join(f"{key} {value:.4f}" for key, value in self._means.items())
        self.log(f"{self.name}: step {self.step}/{self.plan.steps}  {values}  {self.seconds / 60:.1f} min")

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for key, parameter in self._weights.items():
            parameter.copy_(tensors[key])

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The module with its averaged weights, in evaluation mode, for a look in the middle of training."""
        current = {k: p.detach().clone() for k, p in self._weights.items()}
        training = self.module.training
        self._load(self._average)
        try:
            yield self.module.eval()
        finally:
            self._load(current)
            self.module.train(training)

    def save(self) -> None:
        """Write the checkpoint so that a kill at any moment leaves either the old or the new one whole."""
        tensors = {}
        for key, parameter in self._weights.items():
            tensors[f"weight.{key}"] = parameter.detach()
            tensors[f"average.{key}"] = self._average[key]
            for name, value in self._optimiser.state[parameter].items():
                tensors[f"{name}.{key}"] = value.detach().clone()
        with replacing(self.checkpoint) as temporary:
            save_file(tensors, temporary, metadata={"step": str(self.step), "seconds": str(self.seconds)})

    @torch.no_grad()
    def _restore(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            self.seconds = float(file.metadata()["seconds"])
            for key, parameter in self._weights.items():
                parameter.copy_(file.get_tensor(f"weight.{key}"))
                self._average[key] = file.get_tensor(f"average.{key}")
                self._optimiser.state[parameter] = {
                    name: file.get_tensor(f"{name}.{key}") for name in ("step", "exp_avg", "exp_avg_sq")
                }
