"""A network's own weights by their plain names, whatever is currently wrapped around its layers.

Adapters (peft's LoRA and its relatives) take a layer's place and keep it inside, so its weight gets another name and
foreign weights stand beside it. `torch.compile`, for a whole network or a part of it, and IP-Adapters do the same. A
plain name is the name without all that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

ORIGINALS = "_fmn_originals"
"""Attribute of a denoiser with applied patches: plain name -> `Kept`."""
_INSIDE = frozenset({"base_layer", "original_module", "_orig_mod"})  # what wrappers call the thing they wrap


class Kept(NamedTuple):
    """A parameter as it was before patches, a sum over what replaced it, and the adapters fused at that time."""

    original: nn.Parameter
    put: str
    fused: tuple[str, ...] = ()


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers on the way to it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside `torch.compile`'s wrapper, or the module itself; both share layers, weights and hooks."""
    while isinstance(inside := getattr(module, "_orig_mod", None), nn.Module):
        module = inside
    return module


def own_parameters(module: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Plain name -> (current name, parameter) of all parameters except the adapters'."""
    foreign = _foreign(module)
    return {plain_name(name): (name, parameter) for name, parameter in module.named_parameters()
            if not f"{name}.".startswith(foreign)}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Plain name -> tensor of the state, in the names' order; under an applied patch, the tensor before it."""
    foreign, originals = _foreign(module), getattr(module, ORIGINALS, {})
    named = {plain_name(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()
             if not f"{name}.".startswith(foreign)}
    return {name: originals[name].original if name in originals else named[name] for name in sorted(named)}


def _foreign(module: nn.Module) -> tuple[str, ...]:
    """How the names of foreign weights begin."""
    return tuple(_added(module))


def _added(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        if hasattr(part, "adapter_layer_names"):  # peft's, of any kind
            beside = {*part._modules, *part._parameters, *part._buffers} - _INSIDE
            yield from (f"{name}.{one}." for one in beside)
        elif getattr(part, "fused_projections", False):  # copies of the projections, which unfusing may leave behind
            yield from (f"{name}.{one}." for one in ("to_qkv", "to_kv", "to_added_qkv"))
        elif isinstance(part, MultiIPAdapterImageProjection) or name.endswith(".processor"):
            yield f"{name}."
