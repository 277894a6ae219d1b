"""The steps of a fine-tune: gradients of all terms, move the trained weights, measure, show, save, stop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from fmn_nb.forgetting_checkpoint import Checkpoint, State
from fmn_nb.forgetting_device import (
    Memory,
    accelerator_for,
    agreed,
    average_gradients,
    averaged,
    gradient_norm,
    tracking,
    training_modes,
)
from fmn_nb.forgetting_sets import TrainingSet
from fmn_nb.forgetting_settings import Settings
from fmn_nb.forgetting_terms import Terms
from fmn_nb.forgetting_weights import Trainable
from fmn_nb.models import denoiser
from fmn_nb.patches import Patch

_NO_CHECKPOINT = "there is no checkpoint (give forget a folder: checkpoint=...)"
_MASS_STEPS = 5  # the concept's mass jumps with the timestep; early stopping looks at a mean over so many steps


class ForgettingError(RuntimeError):
    """The fine-tune can't go on; the text says why and where the last good state is."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step.

    Attributes:
        step: steps done, from 1; of `steps`.
        loss: the re-steering loss of this step, before its weight.
        mass: the share of attention that the concept got in this step, in [0, 1].
        retain: the retain term before its weight, or None where there is none.
        make_patch: the patch as trained so far, complete: it can be saved and applied.
    """

    step: int
    steps: int
    loss: float
    mass: float
    retain: float | None
    make_patch: Callable[[], Patch]


Callback = Callable[[Progress], str | None]


class Finetune:
    """One fine-tune. `train` runs it; `report` says afterwards what happened.

    Args:
        sets: "forget", and where wanted "retain" and "towards".
        info: what the patch's `info` says beside the report.
        saved: where to keep the state, or None.
        started: `time.perf_counter()` when the work began.
    """

    def __init__(
        self, pipe: DiffusionPipeline, weights: Trainable, sets: Mapping[str, TrainingSet], settings: Settings,
        seed: int, info: Mapping[str, Any], saved: Checkpoint | None, started: float,
    ) -> None:
        if not weights.parameters:
            raise ForgettingError("there is nothing to train: no weight matches the settings")
        self.model, self.weights, self.settings, self.info = denoiser(pipe), weights, settings, info
        self.saved, self.started = saved, started
        name, first = next(self.model.named_parameters())
        own = weights.originals.get(name, first)  # a float32 copy may stand in its place, and tells no dtype
        self.accelerator = accelerator_for(settings, first.device, own.dtype)
        self.memory = Memory(first.device)
        self.terms = Terms(pipe, weights, sets, settings, seed, self.accelerator, self.memory)
        self.parameters = list(weights.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon, weight_decay=settings.weight_decay)
        self.schedule = get_scheduler(settings.schedule, self.optimizer, num_warmup_steps=settings.warmup,
                                      num_training_steps=settings.steps)
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.measured: dict[str, list[float]] = {"losses": [], "masses": [], "retain": []}
        self.step, self.stopped_because = 0, ""

    def train(self, callback: Callback | None = None) -> None:
        """All steps, or as many as are needed; from the checkpoint's state where there is one.

        A bar with loss and concept mass is shown where the error stream is a terminal.

        Raises:
            ForgettingError: the loss, a gradient or a weight became NaN or infinite.
        """
        self._resume()
        with ExitStack() as modes:
            modes.enter_context(torch.enable_grad())
            modes.enter_context(training_modes(self.model, self.settings.gradient_checkpointing))
            modes.enter_context(tracking(self.accelerator, self.settings))
            bar = modes.enter_context(tqdm(
                total=self.settings.steps, initial=self.step, desc="forgetting", leave=False,
                disable=None if self.accelerator.is_main_process else True))  # None: unless it is a terminal
            try:
                while self.step < self.settings.steps and not self.stopped_because:
                    self._one_step()
                    bar.set_postfix(loss=self.measured["losses"][-1], mass=self.measured["masses"][-1], refresh=False)
                    bar.update()
                    self._after_step(callback)
            except KeyboardInterrupt as interrupt:
                kept = self._last_good_state()
                interrupt.add_note(f"the pipeline is unchanged; {kept or _NO_CHECKPOINT}"
                                   f"{'; call forget again to go on from it' if kept else ''}")
                raise
        # A state may be further on than the steps that are asked for now.
        self.stopped_because = self.stopped_because or f"all {self.step} steps done"

    def patch(self) -> Patch:
        """What the training has changed up to now, at the settings' strength, with everything known about it."""
        kind, tensors = self.weights.change()
        size = sum(tensor.nbytes for tensor in tensors.values())
        patch = Patch(kind, tensors, {**self.info, "forgetting": self.report(size)})
        return patch if self.settings.strength == 1 else patch.scaled(self.settings.strength)

    def report(self, patch_bytes: int) -> dict[str, Any]:
        """What happened, as plain JSON values."""
        losses = self.measured["losses"]
        return {
            "steps": self.step, "seconds": round(perf_counter() - self.started, 3),
            "loss_first": losses[0], "loss_last": losses[-1], "stopped_because": self.stopped_because or "not stopped",
            "trainable_parameters": self.weights.count, "patch_bytes": patch_bytes,
            "peak_memory_bytes": self.memory.peak, **{name: list(values) for name, values in self.measured.items()},
        }

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        totals: dict[str, float] = {}
        for _ in range(self.settings.accumulate):
            for name, value in self.terms.add_gradients().items():
                totals[name] = totals.get(name, 0.0) + value / self.settings.accumulate
        totals = averaged(self.accelerator, totals)
        self._check_losses(totals)
        self._finish_gradients()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in totals.items():
            self.measured.setdefault(name, []).append(value)
        self.memory.note()
        self.step += 1

    def _finish_gradients(self) -> None:
        """Average over processes, check, and clip."""
        if all(parameter.grad is None for parameter in self.parameters):
            raise ForgettingError("no trained weight got a gradient: its layers don't influence the attention")
        average_gradients(self.accelerator, self.parameters)
        if self.settings.clip:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        else:
            norm = gradient_norm(self.parameters)
        if self.accelerator.scaler is None and not norm.isfinite():  # a scaler passes over such a step by itself
            raise self._broken(f"the gradient became {float(norm)} in step {self.step + 1}")

    def _check_losses(self, totals: Mapping[str, float]) -> None:
        if not all(math.isfinite(value) for value in totals.values()):
            found = ", ".join(f"{name} {value:g}" for name, value in totals.items())
            raise self._broken(f"the loss became {totals['losses']} in step {self.step + 1} ({found})")

    def _check_weights(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self._broken(f"a weight became NaN or infinite in step {self.step}")

    def _broken(self, what: str) -> ForgettingError:
        kept, folder = self._last_good_state(), ""
        if kept:  # the same settings lead to the same end, and others are another run
            kept += ", but to go on from it with the same settings would end here again"
            folder = " and another checkpoint folder, which starts anew"
        return ForgettingError(
            f"{what}. The pipeline is unchanged; {kept or _NO_CHECKPOINT}. Call forget with a lower learning_rate (or, "
            f"if this was half precision, with a float32 pipeline and precision='no'){folder}")

    # ---- around the steps -------------------------------------------------------------------------------------------

    def _after_step(self, callback: Callback | None) -> None:
        last = {name: values[-1] for name, values in self.measured.items() if values}
        if self.settings.tracker:
            self.accelerator.log({"loss": last["losses"], "mass": last["masses"], **{
                name: value for name, value in last.items() if name not in ("losses", "masses")}}, step=self.step)
        self._stop_when_forgotten()
        if callback is not None:
            said = callback(Progress(self.step, self.settings.steps, last["losses"], last["masses"],
                                     last.get("retain"), self.patch))
            self.stopped_because = self.stopped_because or agreed(self.accelerator, str(said or ""))
        at_end = self.step == self.settings.steps or bool(self.stopped_because)
        due = self.saved is not None and self.step % self.settings.checkpoint_every == 0
        if at_end or due:
            self._check_weights()
        if self.saved and (at_end or due) and self.accelerator.is_main_process:
            self.saved.save(self._state())

    def _stop_when_forgotten(self) -> None:
        masses, share = self.measured["masses"], self.settings.stop_mass
        if share and len(masses) > _MASS_STEPS:
            recent = sum(masses[-_MASS_STEPS:]) / _MASS_STEPS
            if recent < share * masses[0]:
                self.stopped_because = (
                    f"the concept's attention mass fell to {recent:.4f}, under {share:g} of {masses[0]:.4f}")

    def _last_good_state(self) -> str:
        """Where it is; empty where there is none."""
        state = self.saved.load() if self.saved else None
        return f"the last good state is step {state.step} in {self.saved.folder}" if state else ""

    # ---- state ------------------------------------------------------------------------------------------------------

    def _state(self) -> State:
        tensors = {f"weight.{name}": parameter for name, parameter in self.weights.parameters.items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        tensors |= {f"draws.{name}": tensor for name, tensor in self.terms.state()}
        if self.accelerator.scaler is not None:
            tensors |= {f"scaler.{name}": torch.tensor(value, dtype=torch.float64)
                        for name, value in self.accelerator.scaler.state_dict().items()}
        return State(self.step, self.measured, perf_counter() - self.started, tensors, self.stopped_because)

    def _resume(self) -> None:
        state = self.saved.load() if self.saved else None
        if state is None:
            return
        self.weights.load(_part(state.tensors, "weight."))
        whole = self.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(state.tensors, "adam.").items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict({**whole, "state": moments})
        self.terms.restore(_part(state.tensors, "draws."))
        if self.accelerator.scaler is not None:
            now = self.accelerator.scaler.state_dict()
            then = _part(state.tensors, "scaler.")
            self.accelerator.scaler.load_state_dict({name: type(now[name])(then[name].item()) for name in now})
        with warnings.catch_warnings():  # torch misses the optimiser's steps, which were done before
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(state.step):
                self.schedule.step()
        self.step, self.measured = state.step, {name: list(values) for name, values in state.measured.items()}
        self.stopped_because, self.started = state.stopped_because, self.started - state.seconds


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
