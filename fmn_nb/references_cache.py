"""Latents that the model drew, kept in a folder that many runs share: each set is drawn once.

A file's name is a hash of all that its latents depend on, so another model, prompt or seed is another file. What is
missing, damaged or another's is drawn anew; processes that want the same set wait for the first one to draw it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fmn_nb.digests import drawing_key
from fmn_nb.files import one_at_a_time, replacing

FOLDER = "latents"
PATIENCE = 1800  # seconds to wait for another process that draws the same; then it is drawn twice


def shared_latents(
    cache: str | Path, pipe: DiffusionPipeline, prompts: Sequence[str], settings: Sequence[object],
    draw: Callable[[], Tensor],
) -> Tensor:
    """What `draw` gives, [prompts, ...] float32 on the CPU, from the cache where it was drawn before.

    Args:
        cache: the shared folder; its files lie in `latents/`.
        settings: what the latents depend on beside model and prompts (seed, steps, ...), as JSON values.
    """
    key = drawing_key(pipe, list(prompts), *settings)
    file = Path(cache) / FOLDER / f"{key[:32]}.safetensors"
    found = _load(file, key, len(prompts))
    if found is not None:
        return found
    with one_at_a_time(file.with_suffix(".lock"), PATIENCE):
        found = _load(file, key, len(prompts))
        if found is None:
            found = draw()
            with replacing(file) as temporary:
                save_file({"latents": found.contiguous()}, temporary, {"key": key, "sha256": _digest(found)})
    return found


def _load(file: Path, key: str, count: int) -> Tensor | None:
    """The latents if the file is there, whole and the one that is wanted."""
    try:
        with safe_open(file, framework="pt") as opened:
            said, latents = opened.metadata() or {}, opened.get_tensor("latents")
    except (OSError, SafetensorError, ValueError):
        return None
    whole = len(latents) == count and said.get("key") == key and said.get("sha256") == _digest(latents)
    return latents if whole else None


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
