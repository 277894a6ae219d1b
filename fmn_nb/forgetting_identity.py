"""What run a fine-tune is: all that its result depends on, as JSON values. A checkpoint of another run is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.models import text_encoders, tokenizers
from fmn_nb.patches import weights_checksum

_NOT_IDENTITY = ("checkpoint_every", "offload", "tracker", "tracker_folder")  # they don't change what is learned


def identity(
    pipe: DiffusionPipeline, info: Mapping[str, Any], images: Mapping[str, Sequence[Image.Image]],
    masks: Sequence[Image.Image] | None, prompts: Sequence[str] | None, retain_prompts: Sequence[str] | None,
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on with.

    More steps are no other run where the schedule doesn't depend on their number.

    Args:
        info: what the patch will say of itself; its concepts, seed, readings, settings and base count.
        images: concept name -> reference images, decoded.
    """
    settings = info["settings"]
    free = (*_NOT_IDENTITY, "steps") if settings["schedule"].startswith("constant") else _NOT_IDENTITY
    return {
        **{name: info[name] for name in ("concepts", "seed", "towards")},
        **{name: value for name, value in settings.items() if name not in free},
        "prompts": prompts and list(prompts), "retain_prompts": retain_prompts and list(retain_prompts),
        "references": {name: _pictures(found) for name, found in images.items()},
        "masks": masks and _pictures(masks),
        "fingerprint": info["base"]["fingerprint"],
        "weights": weights_checksum(pipe),  # the fingerprint leaves out applied patches and adapters on purpose
        "learned_tokens": _tokens(pipe),  # and these
    }


def _pictures(images: Sequence[Image.Image]) -> str:
    """Their number, and a sum over sizes and pixels: the same pictures under other file names are no other run."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return f"{len(images)} images, SHA-256 {digest.hexdigest()[:16]}"


@torch.no_grad()
def _tokens(pipe: DiffusionPipeline) -> dict[str, str]:
    """Name -> a sum over its vectors, of each token that was added to the tokenizers and is no special one."""
    vectors: dict[str, list[bytes]] = {}
    for tokenizer, encoder in zip(tokenizers(pipe), text_encoders(pipe), strict=False):
        embedding = encoder.get_input_embeddings()
        for name, number in sorted(tokenizer.get_added_vocab().items()):
            if number not in tokenizer.all_special_ids:
                row = embedding(torch.tensor([number], device=embedding.weight.device))
                vectors.setdefault(name, []).append(row.float().cpu().numpy().tobytes())
    return {name: f"SHA-256 {hashlib.sha256(b''.join(parts)).hexdigest()[:16]}" for name, parts in vectors.items()}
