"""Which model this is, and what its drawings depend on: sums over weights, SHA-256 in 64 hexadecimal digits.

`fingerprint` recognises a base model whatever is applied to it or beside it, so that a patch finds its model;
`weights_checksum` and `drawing_key` change with any change.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PureWindowsPath
from typing import Any
from uuid import uuid4

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fmn_nb.files import bundled_models
from fmn_nb.models.gated import is_gated, is_gated_name
from fmn_nb.models.parameters import own_tensors
from fmn_nb.models.pipelines import denoiser, denoiser_name, tokenized_encoders, training_kind

FREEU = ("s1", "s2", "b1", "b2")  # attributes of a U-Net's blocks
_CONFIG_OF_FILES = {"_name_or_path", "_class_name", "_diffusers_version", "_use_default_values", "transformers_version"}
_CONFIG_THAT_MATTERS = ("attention_head_dim", "num_attention_heads", "norm_num_groups")


def digest(parts: Iterable[str | bytes | Tensor]) -> str:
    """SHA-256 of texts, bytes and tensors one after another; of a tensor only its bytes count, not its shape."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def fingerprint(pipe: DiffusionPipeline) -> str:
    """Which model this is: a sum over the denoiser's and text encoders' weights.

    Values are rounded to float16 first, so a model has the same fingerprint whether it is loaded in float32 or in
    float16. It leaves out what doesn't make another base model: currently applied patches, LoRA adapters beside the
    weights, gated layers that look at boxes, and rows of the token embedding past the tokenizer's own vocabulary
    (learned tokens). It includes the few configuration values that change what the weights mean.
    """
    encoders = (_base_weights(encoder, encoder.get_input_embeddings().weight, tokenizer.vocab_size)
                for _, tokenizer, encoder in tokenized_encoders(pipe))
    return digest(chain([_settings(pipe)], _base_weights(denoiser(pipe)), *encoders))


def base_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a patch's `info["base"]` says of the model it is made for; JSON values.

    It holds a name without the maker's folders, the component, the `fingerprint`, and three values about the denoiser
    alone, whatever is beside it: `denoiser`, a sum like the fingerprint; `signs`, a sum over the weights' signs, which
    every precision shares; and `coarse`, whether its values came through a precision below float16's (bfloat16,
    float8), so that only their signs can be compared.
    """
    tensors = {name: tensor for name, tensor in _base_tensors(denoiser(pipe)).items() if tensor.is_floating_point()}
    signs = (part for name, tensor in tensors.items() for part in (_title(name, tensor), _signs(tensor)))
    coarse = sum(int((tensor.float().bfloat16().float() == tensor.float()).sum()) for tensor in tensors.values())
    return {"name": model_name(pipe), "component": denoiser_name(pipe), "fingerprint": fingerprint(pipe),
            "denoiser": digest(chain([_settings(pipe)], _base_weights(denoiser(pipe)))),
            "signs": digest(chain([_settings(pipe)], signs)),
            "coarse": 2 * coarse > sum(tensor.numel() for tensor in tensors.values())}


def is_base(pipe: DiffusionPipeline, base: Mapping[str, Any]) -> bool:
    """Whether `base` (`base_of`, or only a fingerprint as in older patches) describes this pipeline's denoiser."""
    if fingerprint(pipe) == base.get("fingerprint"):
        return True
    if not isinstance(base.get("denoiser"), str):
        return False
    here = base_of(pipe)
    if here["denoiser"] == base["denoiser"]:
        return True
    return bool(here["coarse"] or base.get("coarse")) and here["signs"] == base.get("signs")


def model_name(pipe: DiffusionPipeline) -> str:
    """What the model is called: its bundled name, its hub id, or the last part of the folder or file it came from."""
    said = str(pipe.config.get("_name_or_path", "") or type(pipe).__name__)
    known = {str(folder): name for name, folder in bundled_models().items()}
    if said in known:
        return known[said]
    is_id = said.count("/") == 1 and not said.startswith(("/", ".", "~")) and not Path(said).exists()
    return said if is_id else PureWindowsPath(said).name


def _settings(pipe: DiffusionPipeline) -> str:
    """The configuration that changes what the denoiser's weights mean."""
    # From the scheduler, only what the network was trained to predict: users change samplers freely.
    settings = {key: denoiser(pipe).config.get(key) for key in _CONFIG_THAT_MATTERS}
    settings["class"] = type(denoiser(pipe)).__name__
    is_flow = training_kind(pipe) == "flow"  # flow samplers say it in several ways
    settings["prediction_type"] = None if is_flow else pipe.scheduler.config.get("prediction_type")
    return json.dumps(settings, default=str)


def _base_weights(module: nn.Module, embedding: Tensor | None = None, rows: int = 0) -> Iterator[str | Tensor]:
    for name, tensor in _base_tensors(module).items():
        if not tensor.is_floating_point():
            continue
        if tensor is embedding:
            tensor = tensor[:rows]
        yield _title(name, tensor)
        yield tensor.detach().to("cpu", torch.float16)


def _base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base model: gated layers added beside them don't make it another model."""
    tensors = own_tensors(module)
    return {n: t for n, t in tensors.items() if not is_gated_name(n)} if is_gated(module) else tensors


def _title(name: str, tensor: Tensor) -> str:
    return f"{name} {tuple(tensor.shape)}"


def _signs(tensor: Tensor) -> Tensor:
    """One bit of each value; float8 has no signbit of its own."""
    return torch.signbit(tensor.detach().to("cpu", torch.float32)).to(torch.uint8)


def weights_checksum(pipe: DiffusionPipeline) -> str:
    """A sum over the denoiser's weights as they are now, bit for bit, patches included."""
    return digest(parameter for _, parameter in sorted(denoiser(pipe).named_parameters()))


def digest_of(module: nn.Module) -> str:
    """A sum over a module's parameters and buffers as they are now."""
    return digest(part for name, tensor in sorted(module.state_dict().items())
                  for part in (f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor))


def drawing_key(pipe: DiffusionPipeline, *settings: Any) -> str:
    """A sum over what drawn pixels or latents depend on.

    These are the weights of all parts as they are now (with patches, adapters, learned tokens), their configurations,
    `switches` and attention processors, the tokenizers' added words, the scheduler's settings, the processor or card,
    the number of threads, the versions of the libraries, and `settings`: whatever else the caller's drawings depend on,
    as JSON values.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    parts = {name: digest_of(part) for name, part in modules.items()}
    words = {name: part.get_added_vocab() for name, part in pipe.components.items() if hasattr(part, "get_added_vocab")}
    scheduler, tokens = [type(pipe.scheduler).__name__, dict(pipe.scheduler.config)], added_tokens(pipe)
    turned = {name: on for name, part in modules.items() if (on := switches(part))}
    more = [*([tokens] if tokens else []), *([{"switches": turned}] if turned else []), _configuration(pipe),
            {name: _processors(part) for name, part in modules.items()}]
    said = [type(pipe).__name__, parts, words, scheduler, _machine(pipe), settings, *more]
    return digest([json.dumps(said, sort_keys=True, default=str)])


def _configuration(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the configurations of the pipeline and its parts say, without names, places and versions."""
    whole = {name: value for name, value in pipe.config.items() if name not in pipe.components}
    found = {"": whole, **{name: getattr(part, "config", None) or {} for name, part in pipe.components.items()
                           if isinstance(part, nn.Module)}}
    return {name: {key: value for key, value in (config if isinstance(config, Mapping) else config.to_dict()).items()
                   if key not in _CONFIG_OF_FILES} for name, config in found.items()}


def _processors(part: nn.Module) -> list[Any]:
    """Each attention processor's class and plain attributes, in the modules' order. What somebody else's does isn't
    known, so it is never the same twice."""
    found = []
    for module in part.modules():
        if (processor := getattr(module, "processor", None)) is None:
            continue
        kind, own = type(processor), {name: value for name, value in vars(processor).items()
                                      if isinstance(value, str | int | float | bool | list | tuple | None)}
        foreign = kind.__module__.partition(".")[0] not in ("diffusers", "fmn_nb")
        found.append([f"{kind.__module__}.{kind.__qualname__}", own, *([uuid4().hex] if foreign else [])])
    return found


def switches(part: nn.Module) -> dict[str, Any]:
    """What changes a part's results and no weight says: which adapters are on and how strongly (PEFT's, and image
    prompts'), FreeU's factors, and whether an autoencoder works in tiles. JSON values; nothing for what is off."""
    said: dict[str, Any] = {}
    for name, module in part.named_modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            said[name] = [scaling, module.active_adapters, module.disable_adapters]
        if (scale := getattr(getattr(module, "processor", None), "scale", None)) is not None:
            said[f"{name}.processor"] = scale
        if factors := {key: value for key in FREEU if isinstance(value := getattr(module, key, None), int | float)}:
            said[f"{name}.freeu"] = factors
        if getattr(module, "use_tiling", False):
            said[f"{name}.tiling"] = True
    return json.loads(json.dumps(said, default=str))


@torch.no_grad()
def added_tokens(pipe: DiffusionPipeline) -> dict[str, str]:
    """Name -> a sum over its vectors, for each token that was added to the tokenizers and isn't a special one.

    The vectors of learned tokens stand outside the text encoders' weights, so no digest of these sees them.
    """
    vectors: dict[str, list[Tensor]] = {}
    for _, tokenizer, encoder in tokenized_encoders(pipe):
        embedding = encoder.get_input_embeddings()
        for name, number in sorted(tokenizer.get_added_vocab().items()):
            if number not in tokenizer.all_special_ids:
                row = embedding(torch.tensor([number], device=embedding.weight.device))
                vectors.setdefault(name, []).append(row.float())
    return {name: f"SHA-256 {digest(parts)[:16]}" for name, parts in vectors.items()}


def _machine(pipe: DiffusionPipeline) -> list[Any]:
    device = pipe._execution_device  # where it draws, also when its parts wait elsewhere
    kind = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()])
    return [device.type, kind, torch.__version__, diffusers.__version__]
