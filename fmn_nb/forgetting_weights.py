"""Which weights a fine-tune changes, and how they stand in for the model's own only while it lasts.

The model's own parameters are never written. For whole weights, copies take their place in the modules; for a LoRA,
peft wraps the chosen layers. Leaving `trainable` puts the very same parameters and layers back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fmn_nb.attention_layers import text_layers
from fmn_nb.forgetting_settings import Settings, SettingsError
from fmn_nb.patches import LORA_A, LORA_B, set_parameter

_ADAPTER = "forget"


@dataclass(frozen=True, eq=False)
class Trainable:
    """The parameters that a fine-tune trains, float32, by the names a patch uses for them.

    Attributes:
        model: the denoiser they are in.
        parameters: for whole weights the parameter's own name; for a LoRA `MODULE.lora_A.weight` and `.lora_B.weight`.
        originals: for whole weights the model's own parameters under the same names, else empty.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    originals: Mapping[str, nn.Parameter]

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model as it was before, for a moment and without gradients."""
        try:
            self._show(self.originals, lora=False)
            with torch.no_grad():
                yield
        finally:
            self._show(self.parameters, lora=True)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to earlier values (of a checkpoint)."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def change(self) -> tuple[str, dict[str, Tensor]]:
        """(kind, tensors) of the patch that the training has made up to now, on the CPU.

        A LoRA's B is given as scaled in use, so that any reader that takes alpha = rank gets the same change.
        """
        if not self.originals:
            return "lora", {name: p.detach().float().cpu().clone() for name, p in self.parameters.items()}
        differences = {name: p.detach().cpu() - self.originals[name].detach().float().cpu()
                       for name, p in self.parameters.items()}
        return "weights", {name: change for name, change in differences.items() if change.any()} or differences

    def _show(self, values: Mapping[str, nn.Parameter], lora: bool) -> None:
        if self.originals:
            for name, parameter in values.items():
                set_parameter(self.model, name, parameter)
        else:
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.enable_adapters(lora)


@contextmanager
def trainable(model: nn.Module, settings: Settings, generator: torch.Generator) -> Iterator[Trainable]:
    """Context in which the chosen weights of `model` can be trained; everything else needs no gradient.

    On leaving, also after an exception, the model has its own parameters and layers again, the same objects.

    Args:
        generator: draws the LoRA's first factors.

    Raises:
        SettingsError: nothing matches `settings.train` and `settings.projections`, or there are peft adapters
            where a LoRA is to be trained.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        inside = _lora(model, settings, generator) if settings.train == "lora" else _whole_weights(model, settings)
        with inside as found:
            yield found
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def trained_layers(model: nn.Module, settings: Settings) -> list[str]:
    """Dotted names of the projections that "projections" and "lora" train.

    Raises:
        SettingsError: a projection that none of the layers with text attention has.
    """
    modules, layers = dict(model.named_modules()), text_layers(model)
    for projection in settings.projections:
        if not any(f"{layer}.{projection}" in modules for layer in layers):
            inside = sorted({name for name, _ in modules[next(iter(layers))].named_modules() if name})
            raise SettingsError(f"no attention layer has a projection '{projection}'; there are {', '.join(inside)}")
    wanted = (f"{layer}.{projection}" for layer in layers for projection in settings.projections)
    return [name for name in wanted if isinstance(modules.get(name), nn.Linear)]


@contextmanager
def _whole_weights(model: nn.Module, settings: Settings) -> Iterator[Trainable]:
    originals = {n: p for n, p in model.named_parameters() if p.is_floating_point() and _chosen(model, settings)(n)}
    # Training needs float32 even where the model is kept in half precision.
    copies = {name: nn.Parameter(p.detach().float().clone()) for name, p in originals.items()}
    found = Trainable(model, copies, originals)
    try:
        found._show(copies, lora=True)
        yield found
    finally:
        found._show(originals, lora=False)


def _chosen(model: nn.Module, settings: Settings):
    """Whether a parameter's name is among those that `settings.train` asks for."""
    if settings.train == "denoiser":
        return lambda name: True
    layers = text_layers(model) if settings.train == "cross_attention" else trained_layers(model, settings)
    prefixes = tuple(f"{layer}." for layer in layers)
    return lambda name: name.startswith(prefixes)


@contextmanager
def _lora(model: nn.Module, settings: Settings, generator: torch.Generator) -> Iterator[Trainable]:
    if getattr(model, "peft_config", None) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise SettingsError("the pipeline carries peft adapters; fuse_lora() or unload_lora_weights() first")
    names = trained_layers(model, settings)
    places = {name: model.get_submodule(name) for name in names}
    config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=names)
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; we draw again below
            inject_adapter_in_model(config, model, _ADAPTER)
        yield Trainable(model, _lora_parameters(model, names, generator), {})
    finally:
        for name, layer in places.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
        model.__dict__.pop("peft_config", None)


def _lora_parameters(model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Parameter]:
    """peft's factors by name, in float32; A drawn as in Hu et al., arXiv 2106.09685 (B starts at zero)."""
    parameters: dict[str, nn.Parameter] = {}
    for name in names:
        layer = model.get_submodule(name)
        down, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        for factor in (down, up):
            factor.to(torch.float32)
        drawn = nn.init.kaiming_uniform_(torch.empty(down.weight.shape), a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.weight.copy_(drawn)
        parameters[name + LORA_A], parameters[name + LORA_B] = down.weight, up.weight
    return parameters
