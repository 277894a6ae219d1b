"""What model this is, and what it draws depends on: sums over weights, SHA-256 in 64 hexadecimal digits.

`fingerprint` knows a base model again whatever is applied to it or beside it, so that a patch finds its model;
`weights_checksum` and `drawing_key` tell any change.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fmn_nb.models.pipelines import denoiser, text_encoders, tokenizers

ORIGINALS = "_fmn_originals"
"""Attribute of a denoiser with applied patches: parameter name -> the parameter as it was before."""
_CONFIG_THAT_MATTERS = ("attention_head_dim", "num_attention_heads", "norm_num_groups")


def digest(parts: Iterable[str | bytes | Tensor]) -> str:
    """SHA-256 of texts, bytes and tensors one after another: of a tensor its bytes alone, whatever its shape."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def fingerprint(pipe: DiffusionPipeline) -> str:
    """What model this is: a sum over the denoiser's and text encoders' weights.

    Values are rounded to float16 first, so a model has one fingerprint whether it is loaded in float32 or in
    float16. Left out, because they don't make another base model: patches that are applied at the moment,
    LoRA adapters beside the weights, and rows of the token embedding past the tokenizer's own vocabulary
    (learned tokens). The few configuration values that change what the weights mean are included.
    """
    # Of the scheduler only what the network was trained to predict: users change samplers freely.
    settings = {key: denoiser(pipe).config.get(key) for key in _CONFIG_THAT_MATTERS}
    settings["class"] = type(denoiser(pipe)).__name__
    settings["prediction_type"] = pipe.scheduler.config.get("prediction_type")
    encoders = (_base_weights(encoder, encoder.get_input_embeddings().weight, tokenizer.vocab_size)
                for encoder, tokenizer in zip(text_encoders(pipe), tokenizers(pipe), strict=False))
    return digest(chain([json.dumps(settings, default=str)], _base_weights(denoiser(pipe)), *encoders))


def _base_weights(module: nn.Module, embedding: Tensor | None = None, rows: int = 0) -> Iterator[str | Tensor]:
    originals = getattr(module, ORIGINALS, {})
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if "lora_" in name or not tensor.is_floating_point():
            continue
        if tensor is embedding:
            tensor = tensor[:rows]
        tensor = originals.get(name, tensor).detach()
        plain = name.replace(".base_layer.", ".")
        yield f"{plain} {tuple(tensor.shape)}"
        yield tensor.to("cpu", torch.float16)


def weights_checksum(pipe: DiffusionPipeline) -> str:
    """A sum over the denoiser's weights as they are now, bit for bit, patches included."""
    return digest(parameter for _, parameter in sorted(denoiser(pipe).named_parameters()))


def digest_of(module: nn.Module) -> str:
    """A sum over a module's parameters and buffers as they are now."""
    return digest(part for name, tensor in sorted(module.state_dict().items())
                  for part in (f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor))


def drawing_key(pipe: DiffusionPipeline, *settings: Any) -> str:
    """What drawn pixels or latents depend on.

    The weights of all parts as they are now (with patches, adapters, learned tokens), the tokenizers' added words, the
    scheduler's settings, the processor or card, the number of threads, the versions of the libraries, and `settings`:
    whatever else the caller's drawings depend on, as JSON values.
    """
    parts = {name: digest_of(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    words = {name: part.get_added_vocab() for name, part in pipe.components.items() if hasattr(part, "get_added_vocab")}
    scheduler = [type(pipe.scheduler).__name__, dict(pipe.scheduler.config)]
    said = [type(pipe).__name__, parts, words, scheduler, _machine(pipe), settings]
    return digest([json.dumps(said, sort_keys=True, default=str)])


def _machine(pipe: DiffusionPipeline) -> list[Any]:
    device = pipe._execution_device  # where it draws, also when its parts wait elsewhere
    kind = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()])
    return [device.type, kind, torch.__version__, diffusers.__version__]
