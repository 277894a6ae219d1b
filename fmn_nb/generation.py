"""Images from prompts, each with a seed of its own, so that batch size and order don't decide what is drawn.

To the last bit they do on a CPU, where a convolution rounds by how many images go through it: see `evaluation_images`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image

STEPS = 20
GUIDANCE = 4.0


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = STEPS,
             guidance: float = GUIDANCE, batch: int = 72, **options) -> list[Image.Image]:
    """One image per (prompt, seed), in their order.

    Each image's noise comes from its own generator. `options` go to the pipeline (`height`, `width`, ...).
    Raises ValueError when there are not as many seeds as prompts.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; every image needs one of each")
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[start:start + batch]]
        images += pipe(list(prompts[start:start + batch]), generator=generators, num_inference_steps=steps,
                       guidance_scale=guidance, **options).images
    return images
