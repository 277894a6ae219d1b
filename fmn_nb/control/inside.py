"""Forgetting only inside a box: a patch works there, and outside stays what the base model draws.

The base model draws first. Then the patched model draws from the same noise, and after each step the latents outside
the box are replaced by those of the base model at that step, so the two grow together at the box's rim. An
autoencoder's normalisation reaches over the whole image, so in the end the pixels outside are replaced as well. For
localised erasure by a model's own parts see GLoCE; this method needs no training and takes any patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.control.gates import box_mask
from fmn_nb.control.interaction import checked_box
from fmn_nb.control.relations import Box
from fmn_nb.models import GUIDANCE, STEPS, UnsupportedPipelineError, conditions, generate
from fmn_nb.models.denoising import latent_grid
from fmn_nb.patches import Patch


def forget_inside(pipe: DiffusionPipeline, patch: Patch, prompts: Sequence[str], boxes: Sequence[Box],
                  seeds: Sequence[int], *, steps: int = STEPS,
                  guidance: float = GUIDANCE) -> tuple[list[Image.Image], list[Image.Image]]:
    """Draw each prompt with the patch only inside its box; returns the base model's images, and those.

    Outside the box, both have the same latents and the same pixels, to the last bit.

    Raises:
        InteractionError: an invalid box. ValueError: not as many boxes and seeds as prompts.
        PatchMismatchError: the patch belongs to another model.
        UnsupportedPipelineError: where the model's latents lie in the image is unknown.
    """
    if not len(prompts) == len(boxes) == len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(boxes)} boxes, {len(seeds)} seeds: give as many of each")
    boxes = [checked_box(box, "the box") for box in boxes]
    track: list[torch.Tensor] = []

    def keep(_pipe: DiffusionPipeline, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        track.append(kept["latents"].clone())
        return kept

    def mend(_pipe: DiffusionPipeline, step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        latents = kept["latents"]
        inside = masks[:, None] if latents.ndim == 4 else masks.flatten(1)[..., None]  # packed: [images, positions, 1]
        kept["latents"] = torch.where(inside.to(latents.device), latents, track[step])
        return kept

    grid = latent_grid(conditions(pipe, list(prompts[:1]))) if prompts else (1, 1)
    if grid is None:
        raise UnsupportedPipelineError(f"where the latents of a {type(pipe).__name__} lie in the image is unknown here")
    masks = torch.from_numpy(np.array([box_mask(box, *grid) for box in boxes]))  # [images, rows, columns]
    options = {"steps": steps, "guidance": guidance, "batch": max(1, len(prompts))}
    base = generate(pipe, prompts, seeds, callback_on_step_end=keep, **options)
    with patch.applied(pipe):
        forgotten = generate(pipe, prompts, seeds, callback_on_step_end=mend, **options)
    return base, [_composed(*three) for three in zip(base, forgotten, boxes, strict=True)]


def _composed(outside: Image.Image, inside: Image.Image, box: Box) -> Image.Image:
    """One image inside the box, the other outside it."""
    mask = Image.fromarray(box_mask(box, inside.height, inside.width))
    return Image.composite(inside, outside, mask)
