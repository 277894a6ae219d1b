"""Whether a model's own weights can replace patched ones again exactly, whatever happened meanwhile.

At removal, a weight's current value is compared with what patches put there. If both are the same, the original comes
back. If they differ, we try on the patched value what people usually do to a pipeline (move it to another precision,
fuse adapters into it or take them out again): if that gives exactly the current value, the same is done to the
original. Anything else can't be undone exactly, and an error says so before a weight is touched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import product

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fmn_nb.models import Kept, digest

_NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


class ChangedWeightsError(ValueError):
    """Something else changed patched weights, so the model's own can't be restored exactly; nothing was touched."""


def check_reachable(module: nn.Module, own: Mapping[str, tuple[str, nn.Parameter]], names: Collection[str]) -> None:
    """Raise ChangedWeightsError unless all these weights are there, in memory, and what the model computes with."""
    if is_fused(module):
        raise ChangedWeightsError("projections are fused, so patched weights stand in copies as well: call "
                                  "unfuse_qkv_projections() first; nothing was touched")
    if gone := sorted(name for name in names if name not in own):
        raise ChangedWeightsError(f"{gone[0]} and {len(gone) - 1} other patched weights are no longer in the model: "
                                  "its layers were exchanged; put them back, or load the model anew")
    if away := sorted(name for name in names if own[name][1].is_meta):
        raise ChangedWeightsError(f"{away[0]} is offloaded; call pipe.remove_all_hooks() and pipe.to(device) first")


def is_fused(module: nn.Module) -> bool:
    """Whether a layer computes with fused copies of its projections; unfusing leaves some layers' own mark behind."""
    return any(getattr(part, "fused_projections", False)
               and ("Fused" in type(getattr(part, "processor", None)).__name__ or not isinstance(part, Attention))
               for part in module.modules())


def fused_adapters(module: nn.Module, present: str) -> tuple[str, ...]:
    """The adapters fused into the parameter whose current name is `present`."""
    return tuple(getattr(_layer(module, present), "merged_adapters", ()))


def value_before(module: nn.Module, present: str, now: nn.Parameter, kept: Kept, difference: Tensor) -> Tensor | None:
    """The original's values as they would be without a patch; None if the current value can't be explained.

    Args:
        difference: what the applied patches add to the original.
    """
    own = kept.original.detach()
    if digest([now]) == kept.put:
        return own
    put = patched(own, difference)
    if put.shape != now.shape or digest([put]) != kept.put:
        return None
    for steps in _histories(_layer(module, present), kept.fused, now.dtype):
        if torch.equal(_after(put, steps, now), now.detach()):
            return _after(own, steps, now)
    return None


def patched(original: Tensor, difference: Tensor) -> Tensor:
    """The original plus a difference, in the original's own precision."""
    return (original.float() + difference.to(original.device)).to(original.dtype)


def _layer(module: nn.Module, present: str) -> nn.Module | None:
    """The adapters' layer around a parameter, if there is one."""
    outer, inside, leaf = present.rpartition(".base_layer.")
    return module.get_submodule(outer) if inside and leaf == "weight" else None


def _histories(layer: nn.Module | None, fused: tuple[str, ...], dtype: torch.dtype) -> Iterator[list]:
    """What may have happened to a weight: lists of dtypes it was cast to and tensors added to it."""
    casts = [[dtype], *([narrow, dtype] for narrow in _NARROW if narrow != dtype)]
    yield from casts
    if layer is None or not hasattr(layer, "get_delta_weight"):
        return
    now = tuple(layer.merged_adapters)
    if len(now) < len(fused):
        came, runs = fused[len(now):], ((-1,), (-1, 1, -1))
    elif len(now) > len(fused):
        came, runs = now[len(fused):], ((1,), (1, -1, 1))
    else:
        came = tuple(name for name in layer.active_adapters if name not in now) or now
        runs = ((1, -1), (1, -1, 1, -1)) if came != now else ((-1, 1), (-1, 1, -1, 1))
    with torch.no_grad():
        added = [layer.get_delta_weight(name) for name in came]
    for cast, run in product(([], *casts), runs):
        fusing = [sign * one for sign in run for one in (added if sign > 0 else added[::-1])]
        yield [*cast, *fusing]
        yield [*fusing, *cast]


def _after(value: Tensor, steps: list, now: Tensor) -> Tensor:
    value = value.to(now.device, copy=True)
    for step in steps:
        value = value.to(step) if isinstance(step, torch.dtype) else value + step.to(value)
    return value.to(now.dtype)
