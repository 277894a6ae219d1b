"""A pipeline's denoiser, called the way the pipeline itself calls it, for training on single noising steps.

Every architecture hands its denoiser other arguments: text embeddings, pooled embeddings, sizes, masks, position
ids. Instead of one branch per architecture, `conditions` lets the pipeline prepare them: it runs the pipeline up to
its first call of the denoiser and keeps that call's arguments. Text is encoded once, before training.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from fmn_nb.models import denoiser

_ENCODED_AT_ONCE = 32


class _FirstCall(Exception):  # noqa: N818 - a signal, not an error
    """Carries the arguments of the denoiser's first call out of the pipeline."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator from one or more numbers; different numbers, unrelated streams.

    Noise is always drawn on the CPU, so that a run on a GPU sees the same noise.
    """
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + int(number) + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state if len(numbers) > 1 else int(numbers[0]))


@contextmanager
def borrowed(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The pipeline for our own use: silent, and with a copy of its scheduler, whose state changes in use."""
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    pipe.scheduler = copy.deepcopy(scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield pipe
    finally:
        pipe.scheduler = scheduler
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar


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
            value = value[index.to(value.device)] if name in self.rows else value
            _put(arguments, name, value)
        return arguments


def conditions(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    with_gradient: bool = False,
    like: Conditions | None = None,
) -> Conditions:
    """Encode prompts, without guidance, into the arguments that the pipeline gives its denoiser.

    Args:
        prompts: at least one.
        size: (height, width) in pixels; the pipeline's own default if None.
        with_gradient: keep the graph from the text encoder's parameters to the embeddings.
        like: an earlier result for the same pipeline and size, to find out about its arguments only once.
    """
    with borrowed(pipe):
        like = like or _layout(pipe, prompts[0], size)
        chunks = [prompts[i : i + _ENCODED_AT_ONCE] for i in range(0, len(prompts), _ENCODED_AT_ONCE)]
        calls = [_first_call(pipe, list(chunk), size, with_gradient) for chunk in chunks]
    return replace(like, rows={name: torch.cat([call[name] for call in calls]) for name in like.rows})


def _layout(pipe: DiffusionPipeline, prompt: str, size: tuple[int, int] | None) -> Conditions:
    """Which arguments there are: what doubles when there are two prompts belongs to them, all else is shared."""
    one, two = (_first_call(pipe, [prompt] * count, size) for count in (1, 2))
    sample, step = _names(denoiser(pipe))
    shape, time = tuple(one.pop(sample).shape[1:]), float(one.pop(step).flatten()[0])
    rows = {n: v for n, v in one.items() if isinstance(v, Tensor) and v.ndim and len(two[n]) == 2 * len(v)}
    shared = {name: value for name, value in one.items() if name not in rows}
    first = float(pipe.scheduler.timesteps[0])
    return Conditions(rows, shared, shape, time / first if first else 1.0)


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor, given: Conditions, index: Tensor) -> Tensor:
    """The denoiser's prediction for noisy latents [batch, ...] at timesteps [batch] of 0 to 999.

    `index` [batch] says which of the prompts belongs to each row. Same shape as the latents: a predicted variance
    (PixArt) is dropped.
    """
    sample, step = _names(model)
    times = timesteps.to(noisy.device) * given.time_scale if given.time_scale != 1.0 else timesteps.to(noisy.device)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    arguments = {**given.at(index), sample: noisy.to(dtype), step: times, "return_dict": False}
    output = model(**arguments)[0]
    return output[:, : noisy.shape[1]] if output.ndim == 4 else output


class Noising:
    """How a model's training noises latents: x_t = a_t x + s_t n, and what the network is to predict from x_t.

    Diffusion models (Ho et al., arXiv 2006.11239, eq. 4) use the scheduler's own betas, whatever sampler stands in
    the pipeline; flow-matching models (Lipman et al., arXiv 2210.02747) have a_t = 1 - t/T, s_t = t/T.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.is_flow = "FlowMatch" in type(pipe.scheduler).__name__
        self.steps = int(pipe.scheduler.config.num_train_timesteps)
        self.kind = "flow" if self.is_flow else pipe.scheduler.config.get("prediction_type", "epsilon")
        self._scheduler = None if self.is_flow else DDPMScheduler.from_config(pipe.scheduler.config)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t for latents and noise [batch, ...] and timesteps [batch]."""
        if self._scheduler is not None:
            return self._scheduler.add_noise(latents, noise, timesteps)
        share = self._share(timesteps, latents)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser predicts from x_t: the noise, the velocity, the sample or the flow."""
        if self.kind == "flow":
            return noise - latents
        if self.kind == "v_prediction":
            return self._scheduler.get_velocity(latents, noise, timesteps)
        return latents if self.kind == "sample" else noise

    def _share(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return (timesteps.to(like) / self.steps).reshape(-1, *(1,) * (like.ndim - 1))


def _names(model: nn.Module) -> tuple[str, str]:
    """What the denoiser calls its noisy latents (its first argument) and its timestep."""
    return next(iter(inspect.signature(model.forward).parameters)), "timestep"


def _first_call(
    pipe: DiffusionPipeline, prompts: list[str], size: tuple[int, int] | None, with_gradient: bool = False
) -> dict[str, Any]:
    """The arguments of the denoiser's first call in a generation of these prompts, flat, without empty ones."""
    model = denoiser(pipe)

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        raise _FirstCall(bound.arguments)

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        # Pipelines are decorated with torch.no_grad; the undecorated function lets a learned token have a gradient.
        call = type(pipe).__call__
        _generation(pipe, call.__wrapped__ if with_gradient else call, prompts, size)
    except _FirstCall as found:
        return dict(_flat({name: v for name, v in found.arguments.items() if name != "return_dict"}))
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} never called its denoiser, so its arguments can't be read")


def _generation(
    pipe: DiffusionPipeline, call: Callable[..., Any], prompts: list[str], size: tuple[int, int] | None
) -> None:
    noise = torch.Generator().manual_seed(0)  # its own, so that the global generator isn't touched
    call(pipe, prompt=prompts, num_inference_steps=1, guidance_scale=1.0, generator=noise, **size_options(pipe, size))


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


def _put(arguments: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        arguments = arguments.setdefault(parent, {})
    arguments[leaf] = value
