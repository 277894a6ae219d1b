"""What a step's gradient is made of: the method's objective, with an anchor, the retain term, the pull to a reading.

Each term takes a batch of its own set and has its own backward pass, so that only one graph is alive at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.attention import Listener, attention_with_graph
from fmn_nb.forgetting.data import Batch, Shuffle, Task, TrainingSet
from fmn_nb.forgetting.methods import Seen, method_of
from fmn_nb.forgetting.methods.fmn import concept_mass
from fmn_nb.forgetting.weights import Trainable
from fmn_nb.models import Memory, MixedPrecision, Noising, Stream, denoiser, predict, predict_noisy, seeded

_STREAMS = {"forget": Stream.FORGET, "retain": Stream.RETAIN, "towards": Stream.TOWARDS}


class Terms:
    """The terms for which there are sets: "forget", and if wanted "retain" and "towards".

    `memory` takes note each time a term's graph is whole, when memory use is highest.
    """

    def __init__(self, task: Task, weights: Trainable, sets: Mapping[str, TrainingSet], precision: MixedPrecision,
                 memory: Memory) -> None:
        self.model, self.weights, self.sets, self.settings = denoiser(task.pipe), weights, sets, task.settings
        self.precision, self.memory, self.noising = precision, memory, Noising(task.pipe)
        method = method_of(task.settings.method)
        self.objective, self.through_the_run = method.objective, getattr(method, "THROUGH_THE_RUN", True)
        self.density = middle_times(self.noising.steps) if task.settings.time_density == "middle" else None
        self.device, self.listener = next(self.model.parameters()).device, Listener(self.model)
        self.shuffles = {name: Shuffle(seeded(task.seed, _STREAMS[name]), len(found.latent_of))
                         for name, found in sets.items()}

    def add_gradients(self) -> dict[str, float]:
        """Take one batch for each term and add its gradient. Returns what was measured: losses, masses and, if there
        are any, the anchor, retain and towards terms before their weights."""
        found = self._forget()
        for name, weight in (("retain", self.settings.retain_weight), ("towards", self.settings.towards_weight)):
            if name in self.sets:
                found[name] = self._pull(name, weight)
        return found

    def _forget(self) -> dict[str, float]:
        """The method's objective on prompts that name the concept, and from the same run the pull to the anchor."""
        data, batch = self.sets["forget"], self._batch("forget", self.settings.batch_size)
        concept = data.concept[batch.prompts].to(self.device)  # [batch, columns]
        region = None if data.regions is None else data.regions[data.latent_of[batch.pairs]].to(self.device)
        target = None if data.target_of is None else self._target(data, batch)
        with (torch.set_grad_enabled(self.through_the_run or target is not None), self.precision.autocast(),
              attention_with_graph(self.listener) as attention):
            predicted = self._predict(data, batch, batch.prompts)
        seen = self._seen(data, batch, attention, predicted, concept, region)
        with self.precision.autocast():
            loss = self.objective(seen, self.settings)
        found = {"losses": float(loss.detach()), "masses": concept_mass(attention, concept)}
        total = loss * self.settings.resteer_weight
        if target is not None:
            pull = F.mse_loss(predicted.float(), target)
            found["anchor"] = float(pull.detach())
            total = total + pull * self.settings.anchor_weight
        del predicted  # without a pull nothing else holds this end of the graph
        self._backward(total)
        return found

    def _seen(self, data: TrainingSet, batch: Batch, *run: Any) -> Seen:
        """What an objective gets; `run` holds the attention, prediction, concept and region of the step's own run."""
        def present(prompt: str) -> Tensor:
            with self.precision.autocast():
                return self._predict(data, batch, self._prompts_for(data, batch, prompt)).float()

        def frozen(prompt: str) -> Tensor:
            with self.weights.frozen():
                return present(prompt)

        noisy = batch.noisy
        target = None if data.times is not None else self.noising.target(
            noisy.latents, noisy.noise, noisy.timesteps).to(self.device)
        return Seen(*run, frozen, present, target, self.weights)

    @staticmethod
    def _prompts_for(data: TrainingSet, batch: Batch, prompt: str) -> Tensor:
        return batch.prompts if prompt == "concept" else data.guide_of[batch.pairs]

    def _pull(self, name: str, weight: float) -> float:
        """Pull the set's prompts to their target: retain prompts to what the frozen model does with them, the concept's
        prompts to the reading to show, on images of it."""
        data, batch = self.sets[name], self._batch(name, self.settings.retain_batch)
        target = self._target(data, batch)
        with self.precision.autocast():
            loss = F.mse_loss(self._predict(data, batch, batch.prompts).float(), target)
        self._backward(loss * weight)
        return float(loss.detach())

    def _target(self, data: TrainingSet, batch: Batch) -> Tensor:
        """The target of predictions, in float32: the frozen model's for the same prompts or the pairs' target prompts,
        and beyond these by `anchor_guidance` times their distance from its predictions for the prompts that name the
        concept."""
        with self.weights.frozen(), self.precision.autocast():
            if data.target_of is None:
                return self._predict(data, batch, batch.prompts).float()
            target = self._predict(data, batch, data.target_of[batch.pairs]).float()
            if self.settings.anchor_guidance:
                named = self._predict(data, batch, batch.prompts).float()
                target = target + self.settings.anchor_guidance * (target - named)
        return target

    def _predict(self, data: TrainingSet, batch: Batch, prompts: Tensor) -> Tensor:
        if data.times is not None:  # noisy already
            noisy = batch.noisy.latents.to(self.device)
            return predict(self.model, noisy, batch.noisy.timesteps, data.given, prompts)
        return predict_noisy(self.model, self.noising, batch.noisy, data.given, prompts)

    def _batch(self, name: str, count: int) -> Batch:
        steps = self.noising.steps
        window = int(self.settings.time_from * steps), max(1, math.ceil(self.settings.time_to * steps))
        density = None if self.density is None or name != "forget" else self.density[slice(*window)]
        return self.sets[name].batch(self.shuffles[name], count, window, density)

    def _backward(self, loss: Tensor) -> None:
        self.memory.note()
        self.precision.backward(loss)


def middle_times(steps: int) -> Tensor:
    """The weight of each of a schedule's timesteps, [steps]: sigma(.05 (t - 200)) - sigma(.05 (t - 400)) of 1000."""
    times = torch.arange(steps) * 1000 / steps
    return torch.sigmoid(0.05 * (times - 200)) - torch.sigmoid(0.05 * (times - 400))
