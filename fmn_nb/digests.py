"""What a drawn image depends on, as one hash, so that what was drawn once can be found again."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn


def digest_of(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers as they are now, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def drawing_key(pipe: DiffusionPipeline, *settings: Any) -> str:
    """What drawn pixels or latents depend on, as 64 hexadecimal digits.

    The weights of all parts as they are now (with patches, adapters, learned tokens), the tokenizers' added words, the
    scheduler's settings, the processor or card, the number of threads, the versions of the libraries, and `settings`:
    whatever else the caller's drawings depend on, as JSON values.
    """
    parts = {name: digest_of(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    words = {name: part.get_added_vocab() for name, part in pipe.components.items() if hasattr(part, "get_added_vocab")}
    scheduler = [type(pipe.scheduler).__name__, dict(pipe.scheduler.config)]
    said = [type(pipe).__name__, parts, words, scheduler, _machine(pipe), settings]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _machine(pipe: DiffusionPipeline) -> list[Any]:
    device = pipe._execution_device  # where it draws, also when its parts wait elsewhere
    kind = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()])
    return [device.type, kind, torch.__version__, diffusers.__version__]
