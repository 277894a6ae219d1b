"""The terms of a fine-tune: each draws its batch, noises it, predicts, and adds its gradient to the trained weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor

from fmn_nb.attention import record_attention
from fmn_nb.denoising import Noising, predict, seeded
from fmn_nb.forgetting_device import Memory
from fmn_nb.forgetting_loss import concept_mass, resteering_loss, retain_attention_loss, retain_loss
from fmn_nb.forgetting_sets import Batch, TrainingSet
from fmn_nb.forgetting_settings import Settings
from fmn_nb.forgetting_weights import Trainable
from fmn_nb.models import denoiser

_STREAMS = {"forget": 10, "retain": 11, "towards": 12}


class Terms:
    """The re-steering loss with its anchor, the retain term and the pull to another reading, as far as there are sets
    for them and weights.

    Args:
        sets: "forget", and where wanted "retain" and "towards".
        memory: told each time a term's graph is whole, when most memory is taken.
    """

    def __init__(
        self, pipe: DiffusionPipeline, weights: Trainable, sets: Mapping[str, TrainingSet], settings: Settings,
        seed: int, accelerator: Accelerator, memory: Memory,
    ) -> None:
        self.model, self.weights, self.sets, self.settings = denoiser(pipe), weights, sets, settings
        self.accelerator, self.memory = accelerator, memory
        self.noising, self.device = Noising(pipe), next(self.model.parameters()).device
        self.draws = {name: found.draws(seeded(seed, _STREAMS[name])) for name, found in sets.items()}

    def add_gradients(self) -> dict[str, float]:
        """Draw once for each term and add its gradient; what was measured: losses, masses and, where they are, the
        anchor, retain and towards terms before their weights.

        Each term has its own backward pass, so that only one graph is alive at a time.
        """
        found = self._resteer()
        if "retain" in self.sets:
            found["retain"] = self._keep()
        if "towards" in self.sets:
            found["towards"] = self._pull()
        return found

    def _resteer(self) -> dict[str, float]:
        data = self.sets["forget"]
        batch = self._draw("forget", self.settings.batch_size)
        concept = data.concept[batch.prompts].to(self.device)
        region = None if data.regions is None else data.regions[data.latent_of[batch.pairs]].to(self.device)
        target = self._target(data, batch) if self.settings.anchor_weight else None
        with self.accelerator.autocast():
            attention, predicted = self._attention(data, batch, batch.prompts)
        loss = resteering_loss(attention, concept, self.settings.norm, region)
        found = {"losses": float(loss.detach()), "masses": concept_mass(attention, concept)}
        total = loss * self.settings.resteer_weight
        if target is not None:
            pull = retain_loss(predicted, target)
            found["anchor"] = float(pull.detach())
            total = total + pull * self.settings.anchor_weight
        del predicted  # without a pull nothing else holds this end of the graph
        self._backward(total)
        return found

    def _keep(self) -> float:
        """The retain term: as the frozen model does, for the same prompts and noisy latents."""
        data, compared = self.sets["retain"], self.settings.retain_on
        batch = self._draw("retain", self.settings.retain_batch)
        with self.weights.frozen(), self.accelerator.autocast():
            before = self._behaviour(data, batch, compared)
        with self.accelerator.autocast():
            now = self._behaviour(data, batch, compared)
        loss = retain_attention_loss(now, before) if compared == "attention" else retain_loss(now, before)
        self._backward(loss * self.settings.retain_weight)
        return float(loss.detach())

    def _pull(self) -> float:
        """The concept's prompts pulled to the reading that is to show, on images of it."""
        data = self.sets["towards"]
        batch = self._draw("towards", self.settings.retain_batch)
        target = self._target(data, batch)
        with self.accelerator.autocast():
            loss = retain_loss(self._predict(data, batch, batch.prompts), target)
        self._backward(loss * self.settings.towards_weight)
        return float(loss.detach())

    def _target(self, data: TrainingSet, batch: Batch) -> Tensor:
        """What the concept's predictions are pulled to, in float32: the frozen model's for the pairs' target prompts,
        and past them by `anchor_guidance` times their distance from those for the prompts that name the concept."""
        with self.weights.frozen(), self.accelerator.autocast():
            target = self._predict(data, batch, data.target_of[batch.pairs]).float()
            if self.settings.anchor_guidance:
                named = self._predict(data, batch, batch.prompts).float()
                target = target + self.settings.anchor_guidance * (target - named)
        return target

    def _behaviour(self, data: TrainingSet, batch: Batch, compared: str) -> Any:
        if compared == "noise":
            return self._predict(data, batch, batch.prompts)
        return self._attention(data, batch, batch.prompts)[0]

    def _attention(self, data: TrainingSet, batch: Batch, prompts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Layer -> attention probabilities [batch, heads, pixels, columns], with their graph; and the prediction."""
        with record_attention(self.model, differentiable=True) as recorder:
            predicted = self._predict(data, batch, prompts)
        return recorder.columns(), predicted  # after the block, which names layers that couldn't be heard

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
        self.memory.note()
        self.accelerator.backward(loss / self.settings.accumulate)

    # ---- where the draws stand -------------------------------------------------------------------------------------

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, tensor) of everything that the next draws depend on."""
        for name, draws in self.draws.items():
            for part, tensor in draws.state().items():
                yield f"{name}.{part}", tensor

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name, draws in self.draws.items():
            draws.restore({part: tensors[f"{name}.{part}"] for part in draws.state()})
