"""Scenes drawn again by the diffusion model, so that a judge learns on images like those it will judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from fmn_nb.emoji.captions import caption
from fmn_nb.emoji.scenes import Scene

STRENGTH = 0.9  # of the noise: what is drawn is the model's own, where it stands is still the scene's
STEPS = 10  # of which STRENGTH's share is taken
GUIDANCE = 4.0


def telling_caption(scene: Scene) -> str:
    """A caption that says all that a judge is asked: the readings of ambiguous words, and the style where one can."""
    return caption(scene.labels, None if scene.sort == "identity" else scene.style, scene.background)


@torch.no_grad()
def redraw(pipe: StableDiffusionPipeline, images: np.ndarray, scenes: Sequence[Scene], seed: int, *,
           steps: int = STEPS, batch: int = 64) -> np.ndarray:
    """The scenes' images, [images, 64, 64, 3] uint8, made noisy and drawn again by the model from the scenes' captions.

    Image i's noise has the seed `seed` + i. Source: Meng et al., SDEdit, arXiv 2108.01073.
    Raises ValueError when there are not as many scenes as images.
    """
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images of {len(scenes)} scenes; give one scene for each image")
    drawing = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    drawing.set_progress_bar_config(disable=True)
    redrawn = []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start:start + batch]).permute(0, 3, 1, 2).float() / 255
        captions = [telling_caption(scene) for scene in scenes[start:start + batch]]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(captions))]
        found = drawing(captions, image=pixels, strength=STRENGTH, num_inference_steps=steps, guidance_scale=GUIDANCE,
                        generator=generators, output_type="np").images
        redrawn.append((found * 255).round().astype(np.uint8))
    return np.ascontiguousarray(np.concatenate(redrawn))  # a file of tensors takes no transposed ones
