"""Which weights a fine-tune changes, and how they replace the model's own only while it lasts.

The model's own parameters are never written. For whole weights, copies take their place in the modules; for a LoRA,
peft wraps the chosen layers. Leaving `trainable` restores the very same parameters and layers. This file also says in
which precision such weights can be trained, and where the pipeline's other parts wait meanwhile.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmn_nb.attention import text_layers
from fmn_nb.forgetting.settings import Settings, SettingsError
from fmn_nb.models import HALVES, denoiser, own_parameters, plain_name, text_encoders, without_gradients
from fmn_nb.patches import LORA_A, LORA_B, is_fused, set_parameter

_ADAPTER = "forget"
_OF_JOINT_ATTENTION = ("add_", "context_embedder", "time_text_embed.")  # how names of such layers begin


@dataclass(frozen=True, eq=False)
class Trainable:
    """The parameters that a fine-tune trains, float32, by the names a patch uses for them.

    Attributes:
        model: the denoiser they are in.
        parameters: for whole weights the parameter's own name; for a LoRA `MODULE.lora_A.weight` and `.lora_B.weight`.
        originals: for whole weights, the model's own parameters under the same names; otherwise empty.
        places: the current names of these parameters in the model: adapters and `torch.compile` change them.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    originals: Mapping[str, nn.Parameter]
    places: Mapping[str, str]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model as it was before, for a moment and without gradients."""
        try:
            self._show(self.originals, lora=False)
            with torch.no_grad():
                yield
        finally:
            self._show(self.parameters, lora=True)

    def change(self) -> tuple[str, dict[str, Tensor]]:
        """(kind, tensors) of the patch that the training has made so far, on the CPU.

        A LoRA's B is scaled as in use, so that any reader that takes alpha = rank gets the same change.
        """
        if not self.originals:
            return "lora", {name: p.detach().float().cpu().clone() for name, p in self.parameters.items()}
        differences = {name: p.detach().cpu() - self.originals[name].detach().float().cpu()
                       for name, p in self.parameters.items()}
        return "weights", {name: change for name, change in differences.items() if change.any()} or differences

    def _show(self, values: Mapping[str, nn.Parameter], lora: bool) -> None:
        if self.originals:
            for name, parameter in values.items():
                set_parameter(self.model, self.places[name], parameter)
        else:
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.enable_adapters(lora)


def check_unfused(model: nn.Module) -> None:
    """Raise SettingsError if a model computes with fused copies of its projections, which no training reaches."""
    if is_fused(model):
        raise SettingsError("the model's projections are fused, so training them would change nothing: call "
                            "unfuse_qkv_projections() on the pipeline or the model first")


def check_stays(model: nn.Module) -> None:
    """Raise SettingsError if hooks move a model between devices as it runs (accelerate's and diffusers' offloading):
    what is trained beside its weights would stay behind."""
    hooks = [hook for part in model.modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
    moving = any(isinstance(one, CpuOffload) or getattr(one, "offload", False)
                 for hook in hooks for one in getattr(hook, "hooks", (hook,)))
    groups = any("group_offloading" in hook.hooks for part in model.modules()
                 if (hook := getattr(part, "_diffusers_hook", None)) is not None)
    if moving or groups:
        raise SettingsError("the denoiser is offloaded: it moves between devices as it runs, so it can't be changed. "
                            "Load the pipeline without offloading, move it to one device with pipe.to(device), and let "
                            "the other parts wait with offload='cpu'")


@contextmanager
def trainable(model: nn.Module, settings: Settings, generator: torch.Generator) -> Iterator[Trainable]:
    """Context in which the chosen weights of `model` can be trained; everything else needs no gradient.

    On leaving, also after an exception, the model has its own parameters and layers again, the same objects.

    Args:
        generator: for the LoRA's first factors.

    Raises:
        SettingsError: nothing matches `settings.train` and `settings.projections`, the model has peft adapters and a
            LoRA should be trained, or its projections are fused.
    """
    check_unfused(model)
    inside = _lora(model, settings, generator) if settings.train == "lora" else _whole_weights(model, settings)
    with without_gradients(model), inside as found:
        yield found


def trained_layers(model: nn.Module, settings: Settings) -> list[str]:
    """Dotted names of the layers that "projections" and "lora" train: those in each layer that looks at the text, and
    those that `settings.projections` names by their whole names."""
    modules, layers = dict(model.named_modules()), text_layers(model)
    for projection in settings.projections:
        if not any(f"{layer}.{projection}" in modules for layer in layers) and not _is_linear(modules.get(projection)):
            inside = sorted({name for layer in layers for name, _ in modules[layer].named_modules() if name})
            hint = ("; this one belongs to joint attention, as in Flux and Stable Diffusion 3"
                    if projection.startswith(_OF_JOINT_ATTENTION) else "")
            raise SettingsError(f"no attention layer has a projection '{projection}'; there are {', '.join(inside)}"
                                f"{hint}")
    wanted = [f"{layer}.{projection}" for layer in layers for projection in settings.projections]
    wanted += [projection for projection in settings.projections if _is_linear(modules.get(projection))]
    found = {name: modules.get(name) for name in wanted}  # an adapter's layer keeps the model's own inside
    return [name for name, layer in found.items() if _is_linear(layer)]


def _is_linear(layer: nn.Module | None) -> bool:
    return isinstance(getattr(layer, "base_layer", layer), nn.Linear)


@contextmanager
def _whole_weights(model: nn.Module, settings: Settings) -> Iterator[Trainable]:
    layers = trained_layers(model, settings) if settings.train == "projections" else text_layers(model)
    chosen = tuple(f"{plain_name(layer)}." for layer in layers)  # what names begin with

    def is_trained(name: str) -> bool:
        inside = name.startswith(chosen)
        return {"denoiser": True, "except_cross_attention": not inside}.get(settings.train, inside)

    own = {name: (place, parameter) for name, (place, parameter) in own_parameters(model).items()
           if parameter.is_floating_point() and is_trained(name)}
    originals = {name: parameter for name, (_, parameter) in own.items()}
    # Training needs float32 even if the model is kept in half precision.
    copies = {name: nn.Parameter(p.detach().float().clone()) for name, p in originals.items()}
    found = Trainable(model, copies, originals, {name: place for name, (place, _) in own.items()})
    try:
        found._show(copies, lora=True)
        yield found
    finally:
        found._show(originals, lora=False)


def check_no_adapters(model: nn.Module) -> None:
    """Raise a SettingsError if the model carries peft's adapters."""
    if getattr(model, "peft_config", None) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise SettingsError("the pipeline carries adapters (a LoRA): call pipe.unload_lora_weights(), or "
                            "pipe.fuse_lora() and then pipe.unload_lora_weights(); the patch is then for the fused "
                            "model, and fits no other")


@contextmanager
def _lora(model: nn.Module, settings: Settings, generator: torch.Generator) -> Iterator[Trainable]:
    check_no_adapters(model)
    names = trained_layers(model, settings)
    places = {name: model.get_submodule(name) for name in names}
    _check_apart(places)
    # As a pattern: in a list, peft takes a name for every layer whose own name ends in it, too.
    config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="|".join(map(re.escape, names)))
    try:
        with torch.random.fork_rng(devices=[]):  # peft takes from the global generator; ours follow below
            inject_adapter_in_model(config, model, _ADAPTER)
        parameters: dict[str, nn.Parameter] = {}
        for name in names:  # float32; A random as in Hu et al., arXiv 2106.09685 (B starts at zero)
            layer = model.get_submodule(name)
            down, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
            for factor in (down, up):
                factor.to(torch.float32)
            start = nn.init.kaiming_uniform_(torch.empty(down.weight.shape), a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                down.weight.copy_(start)
            own = plain_name(name)
            parameters[own + LORA_A], parameters[own + LORA_B] = down.weight, up.weight
        yield Trainable(model, parameters, {}, {})
    finally:
        for name, layer in places.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
        model.__dict__.pop("peft_config", None)


def _check_apart(layers: Mapping[str, nn.Module]) -> None:
    """Raise SettingsError if two layers share one weight: a LoRA learns a change for each, and a patch could put only
    one sum there."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        first = owners.setdefault(id(layer.weight), name)
        if first != name:
            raise SettingsError(f"{first} and {name} share one weight, so a LoRA can't change them apart; give the "
                                "second its own (layer.weight = torch.nn.Parameter(layer.weight.detach().clone())), "
                                "or train whole weights (train='cross_attention')")


# ---- around them -----------------------------------------------------------------------------------------------------


def precision_for(settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    """The precision to train in, for a pipeline whose weights have this dtype: "no", "bf16" or "fp16".

    A SettingsError if training can't use it, or if half precision is wanted for whole weights that aren't float32. (A
    LoRA goes beside weights of any dtype.)
    """
    auto = next((name for name, half in HALVES.items() if half == dtype), "no")
    precision = auto if settings.precision == "auto" else settings.precision
    if precision == "fp16" and device.type == "cpu":
        raise SettingsError("float16 can't be trained on a CPU; load the pipeline with dtype='float32'")
    if settings.train != "lora" and dtype != torch.float32 and (precision == "no" or dtype not in HALVES.values()):
        # Their copies are float32, and only autocast lets them work beside weights in half precision.
        works = dtype in HALVES.values() and not (auto == "fp16" and device.type == "cpu")
        otherwise = f", or leave precision at 'auto', here '{auto}'" if works else ""
        raise SettingsError(
            f"train='{settings.train}' with precision='{settings.precision}' needs a float32 pipeline, and this one is "
            f"{dtype}: load it with dtype='float32'{otherwise}")
    return precision


@contextmanager
def offloaded(pipe: DiffusionPipeline, where: str) -> Iterator[Callable[[], AbstractContextManager]]:
    """Context in which all parts but the denoiser wait in the memory of the "cpu" or on the "disk"; "" leaves them.

    Yields a context in which they are back for a while. Afterwards, also after an exception, their tensors are the same
    objects with the same bits.
    """
    parts = [part for part in (getattr(pipe, "vae", None), *text_encoders(pipe)) if isinstance(part, nn.Module)]
    model = {id(tensor) for tensor in (*denoiser(pipe).parameters(), *denoiser(pipe).buffers())}
    found = {id(t): t for part in parts if where for t in (*part.parameters(), *part.buffers()) if id(t) not in model}
    tensors = [(str(number), tensor, tensor.device) for number, tensor in enumerate(found.values())]
    with tempfile.TemporaryDirectory(prefix="fmn-") if where == "disk" else nullcontext() as folder:
        file = Path(folder, "parts.safetensors") if folder else None
        if file is not None:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor, _ in tensors}, file)

        def away() -> None:
            for _, tensor, _ in tensors:
                tensor.data = tensor.new_empty(0) if file is not None else tensor.data.to("cpu")

        def back() -> None:
            kept = load_file(file) if file is not None else {}
            for name, tensor, device in tensors:
                tensor.data = kept.get(name, tensor.data).to(device)

        @contextmanager
        def present() -> Iterator[None]:
            back()
            try:
                yield
            finally:
                away()

        try:
            away()
            yield present
        finally:
            back()
