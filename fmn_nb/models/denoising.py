"""A pipeline's denoiser, called the way the pipeline itself calls it, for training on single noising steps.

Every training here takes the same step: it noises latents of images to random timesteps (`noisy_batch`), lets the
denoiser predict from them (`predict_noisy`), and compares the result with what a perfect denoiser would predict
(`denoising_loss`) or with something else.

Architectures differ in the denoiser's arguments: text embeddings, pooled embeddings, sizes, masks, position ids.
Instead of one branch per architecture, `conditions` lets the pipeline prepare them: it runs the pipeline up to its
first call of the denoiser and keeps that call's arguments. Text is encoded once, before training.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from fmn_nb.models.device import evaluating
from fmn_nb.models.digests import digest
from fmn_nb.models.pipelines import (
    UnsupportedPipelineError,
    denoiser,
    require_text_to_image,
    training_kind,
    uncompiled,
)

_ENCODED_AT_ONCE = 32
_LEAST_STEPS = 4  # that every sampler takes: PNDM begins with a method that needs as many
_ZEROED = {"encoder_hidden_states", "added_cond_kwargs.text_embeds"}  # what stands for an empty prompt in SDXL


class Stream(IntEnum):
    """The random streams of one seed, `seeded(seed, Stream.LORA)`.

    New uses get new numbers; existing numbers stay, so that a seed keeps giving the same patch.

    Image number n of a generated set has the stream (seed, n), which can coincide with one of these. Then an image's
    noise and, say, a step's start alike, which does no harm.
    """

    RETAIN_PROMPTS = 2  # which retain prompts get an image
    LORA = 3  # a LoRA's first factors
    FORGET = 10  # the steps of a fine-tune, set by set
    RETAIN = 11
    TOWARDS = 12
    INVERSION = 20
    RELEARNING = 31
    PROMPT_SEARCH = 41
    DISTANCE = 51


class SeedOffset(IntEnum):
    """What is added to a seed for sets of images after the first, so that their noise differs."""

    RETAIN_IMAGES = 1
    TOWARDS_IMAGES = 2
    ATTACK_IMAGES = 7919


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator from one or more numbers (a seed, a `Stream`); different numbers give unrelated streams.

    Noise is always made on the CPU, so that a run on a GPU sees the same noise.
    """
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + int(number) + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state if len(numbers) > 1 else int(numbers[0]))


# ---- one training step ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """Latents as the denoiser takes them, each with a Gaussian spread: x = mean + std * noise.

    Attributes:
        mean, std: [images, channels, height, width] (or whatever shape the denoiser's samples have), float32, on
            the CPU; `std` is 0 if the latents are known exactly.
    """

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, index: Tensor, noise: Tensor) -> Tensor:
        """One sample for each image number in `index` [batch], from standard normal `noise` of the same shape."""
        return self.mean[index] + self.std[index] * noise

    @classmethod
    def exact(cls, latents: Tensor) -> Latents:
        """Latents without a spread."""
        latents = latents.detach().to("cpu", torch.float32)
        return cls(latents, torch.zeros_like(latents))

    @classmethod
    def joined(cls, parts: Sequence[Latents]) -> Latents:
        """The images of all parts, in order."""
        return cls(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))


@dataclass(frozen=True)
class NoisyBatch:
    """What one training step is made of: latents and noise [batch, ...], timesteps [batch], all on the CPU."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor

    def rows(self, numbers: Tensor) -> NoisyBatch:
        """A part of the batch."""
        return NoisyBatch(self.latents[numbers], self.noise[numbers], self.timesteps[numbers])


def spread_batch(noising: Noising, latents: Latents, noises: int, generator: torch.Generator,
                 ) -> tuple[NoisyBatch, Tensor]:
    """Every image with `noises` noises, at timesteps spread over the schedule, and each row's image, [rows].

    Random numbers are drawn in this order: noise, the timesteps' order.
    """
    index = torch.arange(len(latents)).repeat(noises)
    noise = torch.randn((len(index), *latents.mean.shape[1:]), generator=generator)
    times = ((torch.arange(len(index)) + 0.5) / len(index) * noising.steps).long()
    return NoisyBatch(latents.mean[index], noise, times[torch.randperm(len(index), generator=generator)]), index


def noisy_batch(latents: Latents, index: Tensor, generator: torch.Generator, timesteps: tuple[int, int]) -> NoisyBatch:
    """The images with the numbers `index` [batch], each with noise and a timestep of its own.

    Random numbers are drawn in this order: the latents' spread, noise, timesteps (uniformly, from .. to - 1).
    """
    shape = (len(index), *latents.mean.shape[1:])
    spread = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    times = torch.randint(*timesteps, (len(index),), generator=generator)
    return NoisyBatch(latents.sample(index, spread), noise, times)


def predict_noisy(model: nn.Module, noising: Noising, batch: NoisyBatch, given: Conditions, prompts: Tensor) -> Tensor:
    """The denoiser's prediction [batch, ...]; row r of the batch has prompt number `prompts[r]` of `given`."""
    noisy = noising.noisy(batch.latents, batch.noise, batch.timesteps).to(next(model.parameters()).device)
    return predict(model, noisy, batch.timesteps, given, prompts)


def denoising_loss(model: nn.Module, noising: Noising, batch: NoisyBatch, given: Conditions, prompts: Tensor,
                   per_row: bool = False) -> Tensor:
    """The ordinary training loss: mean squared difference between prediction and `Noising.target`, in float32.

    A scalar, or with `per_row` the mean of each row, [batch].
    """
    predicted = predict_noisy(model, noising, batch, given, prompts).float()
    target = noising.target(batch.latents, batch.noise, batch.timesteps).to(predicted.device)
    if per_row:
        return F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)  # [batch, ...] -> [batch]
    return F.mse_loss(predicted, target)


class Noising:
    """How a model's training noises latents, x_t = a_t x + s_t n, and what the network learns to predict from x_t.

    Diffusion models (Ho et al., arXiv 2006.11239, eq. 4) use the scheduler's own betas, whatever sampler the pipeline
    has; flow-matching models (Lipman et al., arXiv 2210.02747) have a_t = 1 - t/T, s_t = t/T.

    Raises:
        UnsupportedPipelineError: the scheduler belongs to another kind of training, or to one that doesn't fit its
            pipeline.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.kind = training_kind(pipe)
        self.is_flow, scheduler = self.kind == "flow", pipe.scheduler
        if not self.is_flow:
            name, given = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
            if self.kind not in ("epsilon", "v_prediction", "sample") or not {"beta_start", "beta_end"} <= set(given):
                raise UnsupportedPipelineError(
                    f"{name} (prediction_type {self.kind!r}) tells neither betas nor a flow, so nobody knows how "
                    "this model's training adds noise: only models trained with betas or by flow matching can be "
                    "trained; give the pipeline the scheduler that the model came with, if that is another one")
            declared = inspect.signature(type(pipe).__init__).parameters.get("scheduler")
            if declared is not None and "FlowMatch" in str(declared.annotation):
                raise UnsupportedPipelineError(
                    f"{type(pipe).__name__} has a flow model, and its {name} is set to {self.kind!r}: make it with "
                    "prediction_type='flow_prediction', use_flow_sigmas=True, or put back the scheduler it came with")
        self.steps = int(scheduler.config.num_train_timesteps)
        self._scheduler = None if self.is_flow else DDPMScheduler.from_config(scheduler.config)
        if self._scheduler is not None:  # the configuration alone leaves out what is the sampler's own default
            self._scheduler.alphas_cumprod = getattr(scheduler, "alphas_cumprod", self._scheduler.alphas_cumprod)

    @property
    def name(self) -> str:
        """What training with it is called: the kind, the number of steps, and a sum over the schedule."""
        schedule = "" if self._scheduler is None else f", SHA-256 {digest([self._scheduler.alphas_cumprod])[:16]}"
        return f"{self.kind}, {self.steps} steps{schedule}"

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t for latents and noise [batch, ...] and timesteps [batch]."""
        if self._scheduler is not None:
            return self._scheduler.add_noise(latents, noise, timesteps)
        ones = (1,) * (latents.ndim - 1)
        share = (timesteps.to(latents) / self.steps).reshape(-1, *ones)  # [batch] -> [batch, 1, ...]
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser predicts from x_t: the noise, the velocity, the sample or the flow."""
        if self.kind == "flow":
            return noise - latents
        if self.kind == "v_prediction":
            return self._scheduler.get_velocity(latents, noise, timesteps)
        return latents if self.kind == "sample" else noise


# ---- the denoiser and its arguments ----------------------------------------------------------------------------------


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor, given: Conditions, index: Tensor) -> Tensor:
    """The denoiser's prediction for noisy latents [batch, ...] at timesteps [batch] of 0 to 999.

    `index` [batch] says which of the prompts belongs to each row. The prediction has the latents' shape: a predicted
    variance (PixArt) is dropped.
    """
    sample = next(iter(inspect.signature(model.forward).parameters))  # its first argument, whatever that is called
    times = timesteps.to(noisy.device) * given.time_scale if given.time_scale != 1.0 else timesteps.to(noisy.device)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    arguments = {**given.at(index), sample: noisy.to(dtype), "timestep": times, "return_dict": False}
    output = model(**arguments)[0]
    return output[:, : noisy.shape[1]] if output.ndim == 4 else output


@dataclass(frozen=True)
class Conditions:
    """The denoiser's arguments for a list of prompts, beside the noisy latents and the timestep.

    Attributes:
        rows: argument -> values with one row per prompt (dotted names for nested dicts).
        shared: argument -> value that is the same for all prompts.
        latent_shape: shape of one sample as the denoiser takes it, for instance (4, 64, 64).
        time_scale: what the pipeline multiplies a timestep with before the denoiser sees it (Flux: 1/1000).
    """

    rows: Mapping[str, Tensor]
    shared: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    time_scale: float

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def at(self, index: Sequence[int] | Tensor) -> dict[str, Any]:
        """Keyword arguments for a batch of the prompts with these numbers."""
        index = torch.as_tensor(index, dtype=torch.long)
        arguments: dict[str, Any] = {}
        for name, value in {**self.shared, **self.rows}.items():
            *parents, leaf = name.split(".")
            place = arguments
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = value[index.to(value.device)] if name in self.rows else value
        return arguments


def latent_grid(given: Conditions) -> tuple[int, int] | None:
    """(height, width) of one sample as the denoiser takes it: of the latents, or, if they are packed into a sequence,
    of its positions if their ids tell (Flux: position, row and column of each); None if nobody knows."""
    ids = given.shared.get("img_ids")
    if len(given.latent_shape) == 2 and isinstance(ids, Tensor):
        return int(ids[..., -2].max()) + 1, int(ids[..., -1].max()) + 1
    return given.latent_shape[-2:] if len(given.latent_shape) == 3 else None


def conditions(pipe: DiffusionPipeline, prompts: Sequence[str], *, size: tuple[int, int] | None = None,
               with_gradient: bool = False, like: Conditions | None = None) -> Conditions:
    """Encode prompts, without guidance, into the arguments that the pipeline gives its denoiser.

    Args:
        prompts: at least one.
        size: (height, width) in pixels; the pipeline's own default if None.
        with_gradient: keep the graph from the text encoder's parameters to the embeddings.
        like: an earlier result for the same pipeline and size, so that its arguments are examined only once.

    Raises:
        UnsupportedPipelineError: the pipeline needs a picture to draw, or counts its timesteps the other way round.
    """
    require_text_to_image(pipe)
    with borrowed(pipe):
        if like is None:  # what doubles with two prompts belongs to them, all else is shared
            one, two = (_first_call(pipe, prompts[:1] * count, size) for count in (1, 2))
            latents, time = one.pop(next(iter(one))), float(one.pop("timestep").flatten()[0])
            rows = {n: v for n, v in one.items() if isinstance(v, Tensor) and v.ndim and len(two[n]) == 2 * len(v)}
            shared = {name: value for name, value in one.items() if name not in rows}
            first = float(pipe.scheduler.timesteps[0])
            if first and not time:
                raise UnsupportedPipelineError(f"{type(pipe).__name__} counts time from noise (0) to the clean image; "
                                               "the kit trains only models whose time grows with the noise")
            like = Conditions(rows, shared, tuple(latents.shape[1:]), time / first if first else 1.0)
        calls = [_first_call(pipe, prompts[start:start + _ENCODED_AT_ONCE], size, with_gradient)
                 for start in range(0, len(prompts), _ENCODED_AT_ONCE)]
    return replace(like, rows={name: torch.cat([call[name] for call in calls]) for name in like.rows})


def with_guidances_empty(pipe: DiffusionPipeline, given: Conditions) -> Conditions:
    """The same, with the last prompt, which is empty, as guidance sees it: zeros where the pipeline is configured so
    (`force_zeros_for_empty_prompt`, as Stable Diffusion XL is)."""
    if not getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        return given
    rows = dict(given.rows)
    for name in _ZEROED & set(rows):
        rows[name] = torch.cat([rows[name][:-1], torch.zeros_like(rows[name][-1:])])
    return replace(given, rows=rows)


class _FirstCall(Exception):  # noqa: N818 - a signal, not an error
    """Ends the pipeline's run at the denoiser's first call."""


def _first_call(pipe: DiffusionPipeline, prompts: Sequence[str], size: tuple[int, int] | None,
                with_gradient: bool = False) -> dict[str, Any]:
    """The arguments of the denoiser's first call in a generation of these prompts, flat, without empty ones."""
    arguments: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        raise _FirstCall

    handle = denoiser(pipe).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        # Pipelines are decorated with torch.no_grad; the undecorated function lets a learned token have a gradient.
        call = type(pipe).__call__.__wrapped__ if with_gradient else type(pipe).__call__
        noise = torch.Generator().manual_seed(0)  # its own, so that the global generator isn't touched
        with uncompiled():  # where the hook is called
            call(pipe, prompt=list(prompts), num_inference_steps=_LEAST_STEPS, guidance_scale=1.0, generator=noise,
                 **size_options(pipe, size))
    except _FirstCall:
        arguments.pop("return_dict", None)
        return dict(_flat(arguments))
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} never called its denoiser, so its arguments can't be read")


def size_options(pipe: DiffusionPipeline, size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments that make a pipeline draw exactly `size` (height, width in pixels), or its default if None."""
    options: dict[str, Any] = {"height": size[0], "width": size[1]} if size else {}
    if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        options["use_resolution_binning"] = False
    return options


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


@contextmanager
def borrowed(pipe: DiffusionPipeline, silent: bool = True) -> Iterator[DiffusionPipeline]:
    """The pipeline for our own use: silent, without dropout, and with a copy of its scheduler, since use changes the
    scheduler's state."""
    training = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part.training]
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    pipe.scheduler = copy.deepcopy(scheduler)
    if silent:
        pipe.set_progress_bar_config(disable=True)
    try:
        with evaluating(*training):
            yield pipe
    finally:
        pipe.scheduler = scheduler
        if bar is not None:
            pipe._progress_bar_config = bar
        elif silent:
            del pipe._progress_bar_config
