"""The steps of a fine-tune: draw, noise, predict, weigh the losses, move the trained weights; measure and save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor

from fmn_nb.attention import record_attention
from fmn_nb.denoising import Noising, predict, seeded
from fmn_nb.forgetting_checkpoint import Checkpoint, State
from fmn_nb.forgetting_device import accelerator_for, training_modes
from fmn_nb.forgetting_loss import concept_mass, resteering_loss, retain_attention_loss, retain_loss
from fmn_nb.forgetting_sets import Batch, TrainingSet
from fmn_nb.forgetting_settings import Settings
from fmn_nb.forgetting_weights import Trainable
from fmn_nb.models import denoiser
from fmn_nb.patches import Patch

_MASS_STEPS = 5  # the concept's mass jumps with the timestep; early stopping looks at a mean over so many steps
_STREAMS = {"forget": 10, "retain": 11, "towards": 12}


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
        make_patch: the patch as trained so far.
    """

    step: int
    steps: int
    loss: float
    mass: float
    retain: float | None
    make_patch: Callable[[], Patch]


class Finetune:
    """One fine-tune. `train` runs it; `report` says afterwards what happened.

    Args:
        sets: "forget", and where wanted "retain" and "towards".
        saved: where to keep the state, or None.
        started: `time.perf_counter()` when the work began.
    """

    def __init__(
        self, pipe: DiffusionPipeline, weights: Trainable, sets: Mapping[str, TrainingSet], settings: Settings,
        seed: int, saved: Checkpoint | None, started: float,
    ) -> None:
        if not weights.parameters:
            raise ForgettingError("there is nothing to train: no weight matches the settings")
        self.model, self.weights, self.sets, self.settings, self.saved = denoiser(pipe), weights, sets, settings, saved
        self.noising, self.device = Noising(pipe), next(self.model.parameters()).device
        self.accelerator = accelerator_for(settings, self.device, next(iter(self.model.parameters())).dtype)
        self.draws = {name: found.draws(seeded(seed, _STREAMS[name])) for name, found in sets.items()}
        self.parameters = list(weights.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon, weight_decay=settings.weight_decay)
        self.schedule = get_scheduler(settings.schedule, self.optimizer, num_warmup_steps=settings.warmup,
                                      num_training_steps=settings.steps)
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.measured: dict[str, list[float]] = {"losses": [], "masses": [], "retain": []}
        self.step, self.stopped_because, self.peak_memory = 0, "", 0
        self.started = started

    def train(self, callback: Callable[[Progress], str | None] | None = None) -> None:
        """All steps, or as many as are needed; from the checkpoint's state where there is one.

        Raises:
            ForgettingError: the loss or a weight became NaN or infinite.
        """
        self._resume()
        with ExitStack() as modes:
            modes.enter_context(torch.enable_grad())
            modes.enter_context(training_modes(self.model, self.settings.gradient_checkpointing))
            modes.enter_context(self._tracking())
            try:
                while self.step < self.settings.steps and not self.stopped_because:
                    self._one_step()
                    self._after_step(callback)
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(f"the pipeline is unchanged; {self._last_good_state()}")
                raise
        self.stopped_because = self.stopped_because or f"all {self.settings.steps} steps done"

    def report(self, patch_bytes: int) -> dict[str, Any]:
        """What happened, as plain JSON values."""
        losses = self.measured["losses"]
        return {
            "steps": self.step, "seconds": round(perf_counter() - self.started, 3),
            "loss_first": losses[0], "loss_last": losses[-1], "stopped_because": self.stopped_because,
            "trainable_parameters": self.weights.count, "patch_bytes": patch_bytes,
            "peak_memory_bytes": self.peak_memory, **{name: list(values) for name, values in self.measured.items()},
        }

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        """One optimiser step. Each term has its own backward pass, so that only one graph is alive at a time."""
        totals: dict[str, float] = {"losses": 0.0, "masses": 0.0, "retain": 0.0}
        for _ in range(self.settings.accumulate):
            for name, value in self._terms():
                totals[name] += value / self.settings.accumulate
            self._note_memory()
        self._finish_gradients()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in totals.items():
            if name in self._reported():
                self.measured[name].append(value)
        self._check_finite(totals)
        self.step += 1

    def _terms(self) -> Iterator[tuple[str, float]]:
        """Add every term's gradient; yields what is measured (name, value)."""
        loss, mass = self._resteer()
        yield "losses", loss
        yield "masses", mass
        if "retain" in self.sets:
            yield "retain", self._keep("retain", self.settings.retain_weight, self.settings.retain_on)
        if "towards" in self.sets:
            self._keep("towards", self.settings.towards_weight, "noise")

    def _resteer(self) -> tuple[float, float]:
        data = self.sets["forget"]
        batch = self._draw("forget", self.settings.batch_size)
        concept = data.concept[batch.prompts].to(self.device)
        region = None if data.regions is None else data.regions[data.latent_of[batch.pairs]].to(self.device)
        with self.accelerator.autocast():
            attention = self._attention(data, batch, batch.prompts)
        loss = resteering_loss(attention, concept, self.settings.norm, region)
        mass = concept_mass(attention, concept)
        self._backward(loss * self.settings.resteer_weight)
        return float(loss.detach()), mass

    def _keep(self, name: str, weight: float, compared: str) -> float:
        """A term that holds the model to what the frozen model does, for the same noisy latents."""
        data = self.sets[name]
        batch = self._draw(name, self.settings.retain_batch)
        target = batch.prompts if data.target_of is None else data.target_of[batch.pairs]
        with self.weights.frozen(), self.accelerator.autocast():
            before = self._behaviour(data, batch, target, compared)
        with self.accelerator.autocast():
            now = self._behaviour(data, batch, batch.prompts, compared)
        loss = retain_attention_loss(now, before) if compared == "attention" else retain_loss(now, before)
        self._backward(loss * weight)
        return float(loss.detach())

    def _behaviour(self, data: TrainingSet, batch: Batch, prompts: Tensor, compared: str) -> Any:
        predicted = compared == "noise"
        return self._predict(data, batch, prompts) if predicted else self._attention(data, batch, prompts)

    def _attention(self, data: TrainingSet, batch: Batch, prompts: Tensor) -> dict[str, Tensor]:
        """Layer -> attention probabilities [batch, heads, pixels, columns], with their graph."""
        with record_attention(self.model, differentiable=True) as recorder:
            self._predict(data, batch, prompts)
        return recorder.columns()  # after the block, which names layers that couldn't be heard

    def _predict(self, data: TrainingSet, batch: Batch, prompts: Tensor) -> Tensor:
        noisy = self.noising.noisy(batch.latents, batch.noise, batch.timesteps).to(self.device)
        return predict(self.model, noisy, batch.timesteps, data.given, prompts)

    def _draw(self, name: str, count: int) -> Batch:
        """This process's part of one draw; all processes draw the same, so their number doesn't change the data."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        steps = self.noising.steps
        window = int(self.settings.time_from * steps), max(1, math.ceil(self.settings.time_to * steps))
        batch = self.sets[name].batch(self.draws[name], count * processes, window)
        own = slice(rank * count, (rank + 1) * count)
        return Batch(*(getattr(batch, field.name)[own] for field in fields(batch)))

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.settings.accumulate)

    def _finish_gradients(self) -> None:
        if all(parameter.grad is None for parameter in self.parameters):
            raise ForgettingError("no trained weight got a gradient: its layers don't influence the attention")
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if self.settings.clip:
            self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip)

    # ---- around the steps -------------------------------------------------------------------------------------------

    def _after_step(self, callback: Callable[[Progress], str | None] | None) -> None:
        retain = self.measured["retain"][-1] if self.measured["retain"] else None
        loss, mass = self.measured["losses"][-1], self.measured["masses"][-1]
        if self.settings.tracker:
            found = {"loss": loss, "mass": mass, **({} if retain is None else {"retain": retain})}
            self.accelerator.log(found, step=self.step)
        self._stop_when_forgotten()
        if callback is not None:
            said = callback(Progress(self.step, self.settings.steps, loss, mass, retain, self._patch))
            self.stopped_because = self.stopped_because or str(said or "")
        last = self.step == self.settings.steps or bool(self.stopped_because)
        due = last or self.step % self.settings.checkpoint_every == 0
        if self.saved and due and self.accelerator.is_main_process:
            self.saved.save(self._state())

    def _stop_when_forgotten(self) -> None:
        masses, share = self.measured["masses"], self.settings.stop_mass
        if share and len(masses) > _MASS_STEPS:
            recent = sum(masses[-_MASS_STEPS:]) / _MASS_STEPS
            if recent < share * masses[0]:
                self.stopped_because = (
                    f"the concept's attention mass fell to {recent:.4f}, under {share:g} of {masses[0]:.4f}")

    def _patch(self) -> Patch:
        return Patch(*self.weights.change())

    def _reported(self) -> list[str]:
        return ["losses", "masses", *(["retain"] if "retain" in self.sets else [])]

    def _check_finite(self, totals: Mapping[str, float]) -> None:
        if not all(math.isfinite(value) for value in totals.values()):
            raise ForgettingError(
                f"the loss became {totals['losses']} in step {self.step + 1} (retain term {totals['retain']}): lower "
                f"learning_rate or use precision='no'. The pipeline is unchanged; {self._last_good_state()}")

    def _last_good_state(self) -> str:
        state = self.saved.load() if self.saved else None
        if state is None:
            return "there is no checkpoint (give forget a folder: checkpoint=...)"
        return f"the last good state is step {state.step} in {self.saved.folder}; call forget again to go on from it"

    def _note_memory(self) -> None:
        if self.device.type == "cuda":
            self.peak_memory = max(self.peak_memory, torch.cuda.max_memory_allocated(self.device))
        else:
            self.peak_memory = max(self.peak_memory, psutil.Process().memory_info().rss)

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        if not self.settings.tracker:
            yield
            return
        config = {k: v for k, v in self.settings.to_dict().items() if not isinstance(v, list)}
        self.accelerator.init_trackers("forget-me-not", config, {"wandb": {"mode": "offline"}})
        try:
            yield
        finally:
            self.accelerator.end_training()

    # ---- state ------------------------------------------------------------------------------------------------------

    def _state(self) -> State:
        tensors = {f"weight.{name}": parameter for name, parameter in self.weights.parameters.items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        for name, draws in self.draws.items():
            tensors |= {f"draws.{name}.{part}": tensor for part, tensor in draws.state().items()}
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
        for name, draws in self.draws.items():
            draws.restore(_part(state.tensors, f"draws.{name}."))
        for _ in range(state.step):
            self.schedule.step()
        self.step, self.measured = state.step, {name: list(values) for name, values in state.measured.items()}
        self.stopped_because, self.started = state.stopped_because, self.started - state.seconds


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
