"""Patches that others made: whatever changes a model's weights, read as a `Patch`, so it can be measured like ours.

Recognised by what is inside, never by name, and read with safetensors alone:

    a LoRA                    in diffusers' names or kohya's, also of text encoders
    weights                   under the model's own names, all of them or only those that changed, as UCE and ESD export
    a whole model             a diffusers folder, or a checkpoint in one file
    a folder with fmn.json    a patch of this package
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fmn_nb.files import read_json
from fmn_nb.models import base_of, denoiser, denoiser_name, load, own_parameters, without_bars
from fmn_nb.models.arguments import finite_number
from fmn_nb.models.parameters import own_tensors, plain_name, unwrapped
from fmn_nb.patches.files import INFO_FILE, TENSOR_FILES, PatchFileError
from fmn_nb.patches.patch import LORA_A, LORA_B, LORA_BIAS, Patch, PatchMismatchError

TAKEN = ("taken are a patch's folder (with fmn.json), a LoRA in diffusers' or kohya's names, weights under the model's "
         "own names (all, or those that changed), and a diffusers folder, each as .safetensors")
_ADAPTER = "fmn_foreign"
_PICKLED = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
_UPS = ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight")  # one for each layer
_OTHER_ADAPTERS = ("dora_scale", "hada_w", "lokr_w", "oft_", "lora_magnitude_vector")  # no plain products
_CHECKPOINT = "model.diffusion_model."  # what the names in a checkpoint of one file begin with
_PEFT = "base_model.model."
_TEXT_MODEL = "text_model."  # what the names of a text encoder's weights begin with in older exports


def read_patch(place: str | Path, pipe: DiffusionPipeline, config: str | Path | None = None) -> Patch:
    """The content of `place` as a patch of `pipe`, which stays as it is.

    Args:
        place: a file or a folder. Of a whole model, only the weights count; scheduler and tokenizer stay those of
            `pipe`.
        config: of a whole model in a single file, a folder with its configuration and tokenizer; None for the hub's.

    Raises:
        PatchFileError: there is nothing, it can't be read, or it isn't recognised; the message says what is accepted.
        PatchMismatchError: it is for another architecture.
        ModelLoadError: a whole model can't be loaded.
    """
    place = Path(place).expanduser()
    if (place / INFO_FILE).is_file():
        return Patch.load(place)
    if (place / "model_index.json").is_file():
        return _of_model(place, pipe)
    file = _weights_file(place)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise PatchFileError(f"{file} can't be read as safetensors ({error}); {TAKEN}") from None
    if any(name.startswith(_CHECKPOINT) for name in tensors):
        return _of_model(file, pipe, config)
    try:
        if any("lora" in name or any(kind in name for kind in _OTHER_ADAPTERS) for name in tensors):
            return _of_lora(file, tensors, pipe)
        return _of_values(_placed(file, tensors, pipe), pipe, file)
    except ValueError as error:
        if isinstance(error, PatchFileError | PatchMismatchError):
            raise
        raise PatchFileError(f"{file}: {error}") from error


def _weights_file(place: Path) -> Path:
    """The one safetensors file that is meant."""
    if not place.exists():
        raise PatchFileError(f"there is no {place}; {TAKEN}")
    if place.is_dir() and (place / TENSOR_FILES["lora"]).is_file():
        return place / TENSOR_FILES["lora"]
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        few = ", ".join(file.name for file in files[:3])
        raise PatchFileError(f"{place} holds {f'several files ({few}); name one' if files else 'no .safetensors'}; "
                             f"{TAKEN}")
    if files[0].suffix in _PICKLED:
        raise PatchFileError(f"{files[0]} is pickled, which could run code, so it is not read; convert it to "
                             ".safetensors")
    if files[0].name == TENSOR_FILES["weights"]:
        raise PatchFileError(f"{files[0]} holds differences, which say nothing without the {INFO_FILE} that was beside "
                             "it; copy the patch's folder whole")
    return files[0]


# ---- a LoRA ---------------------------------------------------------------------------------------------------------


def _of_lora(file: Path, tensors: dict[str, Tensor], pipe: DiffusionPipeline) -> Patch:
    """A LoRA's factors as diffusers understands the file; B is scaled as in use (by alpha / rank)."""
    if other := [name for name in tensors if any(kind in name for kind in _OTHER_ADAPTERS)]:
        raise PatchFileError(f"{file} holds {other[0]}: an adapter that isn't a plain LoRA; merge it into the model "
                             "and give the merged model's folder")
    if not hasattr(pipe, "load_lora_weights"):
        raise PatchMismatchError(f"{file} is a LoRA, and {type(pipe).__name__} takes none")
    tensors, factors, beside = _scaled(file, _named(tensors, pipe), pipe), {}, {}
    with _loaded(file, tensors, pipe):
        found = [(part, plain_name(name), layer) for part, module in _modules(pipe).items()
                 for name, layer in module.named_modules() if isinstance(layer, LoraLayer) and _ADAPTER in layer.lora_A]
        if not found or len(found) != (held := _layers_of(tensors, pipe)):
            raise PatchMismatchError(f"{file} holds a LoRA of other layers than this model's: {len(found)} of {held} "
                                     "are here; give --model, or another file")
        for part, name, layer in found:
            own = _factors(name, layer)
            if part == denoiser_name(pipe):
                factors |= own
            else:
                beside.setdefault(part, {}).update(Patch("lora", own).differences())
    info = {"concepts": [], "source": file.name}
    return _patch("lora", factors, info, beside)


def _named(tensors: Mapping[str, Tensor], pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The names as diffusers knows them: a file that peft wrote names only the layers."""
    plain = {name.removeprefix(_PEFT).replace(".default.", "."): tensor for name, tensor in tensors.items()}
    parts = (*(f"{part}." for part in _modules(pipe)), "lora_", "text_encoder", "unet.", "transformer.")
    return {name if name.startswith(parts) else f"{denoiser_name(pipe)}.{name}": tensor
            for name, tensor in plain.items()}


def _scaled(file: Path, tensors: Mapping[str, Tensor], pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The factors with B times alpha / rank as the file's configuration has it: in the header that diffusers writes, or
    in peft's file beside it. Of bare tensors, diffusers takes alpha to be the rank."""
    configs, scaled = _configs(file, pipe), dict(tensors)
    for name in tensors:
        stem, found, _ = name.partition(".lora_B.")
        part, _, layer = stem.partition(".")
        if not found or part not in configs:
            continue
        config, rank = configs[part], len(tensors[f"{stem}.lora_A.weight"])
        alphas = (alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()
                  if re.fullmatch(rf"(.*\.)?({pattern})", layer))
        alpha = next(alphas, config.get("lora_alpha", rank))
        scaled[name] = tensors[name] * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return scaled


def _configs(file: Path, pipe: DiffusionPipeline) -> dict[str, dict[str, Any]]:
    """Part -> what a LoRA's file says of its training there, as peft's `LoraConfig` names it."""
    found: dict[str, dict[str, Any]] = {}
    with safe_open(file, framework="pt") as opened:
        header = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    for name, value in header.items():
        part, _, key = name.partition(".")
        found.setdefault(part, {})[key] = value
    beside = file.with_name("adapter_config.json")
    if not found and file.name == "adapter_model.safetensors" and beside.is_file():
        found[denoiser_name(pipe)] = read_json(beside)
    return found


def _layers_of(tensors: Mapping[str, Tensor], pipe: DiffusionPipeline) -> int:
    """How many of diffusers' layers a LoRA is on: kohya's names for Flux join several in one."""
    converted = pipe.lora_state_dict(dict(tensors))
    names = converted[0] if isinstance(converted, tuple) else converted
    return sum(name.endswith(_UPS) for name in names)


@contextmanager
def _loaded(file: Path, tensors: dict[str, Tensor], pipe: DiffusionPipeline) -> Iterator[None]:
    """Context in which the LoRA is beside the pipeline's layers; afterwards the pipeline is as it was."""
    carried = [part for part, module in _modules(pipe).items() if getattr(module, "peft_config", None)]
    if carried:
        raise PatchMismatchError(f"the pipeline's {carried[0]} carries adapters: call pipe.unload_lora_weights() first")
    said = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    flags = [(one, one.requires_grad) for module in _modules(pipe).values() for one in module.parameters()]
    try:
        with torch.random.fork_rng(devices=[]), without_bars():
            pipe.load_lora_weights(dict(tensors), adapter_name=_ADAPTER)
        yield
    except PatchMismatchError:
        raise
    except Exception as error:  # diffusers and peft have many for names and shapes that don't fit
        why = " ".join(str(error).split())[:200]
        raise PatchMismatchError(f"{file} holds a LoRA that doesn't fit this model ({why})") from error
    finally:
        pipe.unload_lora_weights()
        diffusers_logging.set_verbosity(said)
        for parameter, flag in flags:  # peft leaves only adapters to be trained
            parameter.requires_grad_(flag)


def _factors(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    """The layer's tensors as a patch of kind "lora" has them."""
    down, up, scale = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER], layer.scaling[_ADAPTER]
    found = {name + LORA_A: down.weight.detach().cpu().float().clone(),
             name + LORA_B: up.weight.detach().cpu().float() * scale}
    if up.bias is not None:
        found[name + LORA_BIAS] = up.bias.detach().cpu().float() * scale
    return found


# ---- whole weights ---------------------------------------------------------------------------------------------------


def _placed(file: Path, tensors: Mapping[str, Tensor], pipe: DiffusionPipeline) -> dict[str, dict[str, Tensor]]:
    """Part -> parameter -> its new value; a name may begin with its part's name ("unet.") or be used without it."""
    known = {part: own_parameters(module) for part, module in _modules(pipe).items()}
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        inside = rest if head in known else name
        ways = ((part, short) for part, own in known.items() if head == part or head not in known
                for short in (inside, inside.removeprefix(_TEXT_MODEL)) if short in own)
        if place := next(ways, None):
            found.setdefault(place[0], {})[place[1]] = value
        elif value.is_floating_point():  # no buffer of positions
            strange.append(name)
    if strange or not found:
        what = f"{strange[0]}, which isn't a weight of this model" if strange else "no weights"
        raise PatchFileError(f"{file} holds {what}; {TAKEN}")
    return found


def _of_model(place: Path, pipe: DiffusionPipeline, config: str | Path | None = None) -> Patch:
    """What differs in a whole model from `pipe`."""
    other = load(place, device="cpu", dtype=denoiser(pipe).dtype, config=config)
    here, there = _modules(pipe), _modules(other)
    if denoiser_name(other) != denoiser_name(pipe) or type(denoiser(other)) is not type(denoiser(pipe)):
        raise PatchMismatchError(f"{place} is another architecture ({type(denoiser(other)).__name__}) than the model "
                                 f"({type(denoiser(pipe)).__name__}); give the model that it was made from: --model")
    return _of_values({part: own_tensors(there[part]) for part in here if part in there}, pipe, place)


def _of_values(values: Mapping[str, Mapping[str, Tensor]], pipe: DiffusionPipeline, place: Path) -> Patch:
    """New values of weights as their differences to those of `pipe`, without those that are equal."""
    found: dict[str, dict[str, Tensor]] = {}
    for part, new in values.items():
        own = own_tensors(_modules(pipe)[part])
        for name, value in new.items():
            if name not in own or own[name].shape != value.shape:
                there = tuple(own[name].shape) if name in own else "nothing"
                raise PatchMismatchError(f"{place} doesn't fit this model: {part}.{name} {tuple(value.shape)}, here "
                                         f"{there}; give the model that it was made from: --model")
            if value.is_floating_point():
                found.setdefault(part, {})[name] = value.detach().cpu().float() - own[name].detach().cpu().float()
    changed = {part: own for part, all_of in found.items()
               if (own := {name: change for name, change in all_of.items() if change.any()})}
    own = changed.pop(denoiser_name(pipe), {})
    if not own and not changed:  # nothing at all is otherwise, which is to be measured as well
        own = found.get(denoiser_name(pipe)) or next(iter(found.values()))
    info = {"concepts": [], "base": base_of(pipe), "source": place.name}
    return _patch("weights", own, info, changed)


def _patch(kind: str, tensors: Mapping[str, Tensor], info: dict[str, Any],
           beside: Mapping[str, Mapping[str, Tensor]]) -> Patch:
    """The patch, a `WiderPatch` if parts beside the denoiser change: part -> parameter -> difference."""
    others = {part: Patch("weights", changes, info) for part, changes in beside.items()}
    return WiderPatch(kind, tensors, info, beside=others) if others else Patch(kind, tensors, info)


def _modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's networks by the names of its parts, the denoiser first."""
    parts = {name: unwrapped(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    first = denoiser_name(pipe)
    return {first: parts.pop(first), **parts}


@dataclass(frozen=True, eq=False, repr=False)
class WiderPatch(Patch):
    """A patch that also changes other parts than the denoiser. It can be applied and measured, and nothing else.

    Attributes:
        tensors: the denoiser's, as in `Patch`; may be empty.
        beside: part ("text_encoder") -> the patch of its weights.
    """

    beside: Mapping[str, Patch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tensors:
            super().__post_init__()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return super().nbytes + sum(patch.nbytes for patch in self.beside.values())

    def apply(self, pipe: DiffusionPipeline, scale: float = 1.0, *, force: bool = False) -> None:
        """Apply until `remove`. Raises what `Patch.apply` raises; the pipeline is then left as it was."""
        scale, places = finite_number("scale", scale), self._places(pipe)
        for part, patch in self.beside.items():
            patch.check_shapes(places[patch], f"{part}.")
        if self.tensors:
            self.check_fits(pipe, force)
        with ExitStack() as undo:
            for patch, module in places.items():
                patch.put_on(module, scale)
                undo.callback(patch.take_off, module)
            undo.pop_all()

    @contextmanager
    def applied(self, pipe: DiffusionPipeline, scale: float = 1.0, *, force: bool = False) -> Iterator[None]:
        """Context in which `pipe` carries the patch, even if its parts are exchanged inside. Raises as `apply`."""
        self.apply(pipe, scale, force=force)
        with ExitStack() as parts:  # one that can't be put back keeps none of the others from it
            for patch, module in self._places(pipe).items():
                parts.callback(patch.take_off, module)
            yield

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Remove it again, exactly, whatever else is applied. Raises what `Patch.remove` raises."""
        with ExitStack() as undo:
            for patch, module in self._places(pipe).items():
                undo.callback(patch.put_on, module, patch.take_off(module))
            undo.pop_all()

    def _places(self, pipe: DiffusionPipeline) -> dict[Patch, nn.Module]:
        """Each part's patch, this one for the denoiser's, and the part."""
        parts = {part: getattr(pipe, part, None) for part in self.beside}
        if missing := [part for part, module in parts.items() if not isinstance(module, nn.Module)]:
            raise PatchMismatchError(f"the patch changes a {missing[0]}, and {type(pipe).__name__} has none")
        own = {self: denoiser(pipe)} if self.tensors else {}
        return own | {self.beside[part]: unwrapped(module) for part, module in parts.items()}

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(f"it also changes the {', '.join(self.beside)}, so it can only be applied and measured")

    save = scaled = low_rank = _refuse
