"""The emoji model with gated layers that are open but untrained, for tests of the machinery."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from fmn_nb.control import Grounding
from fmn_nb.models.gated import with_gates


def gated(pipe: DiffusionPipeline, gate: float = 0.4, seed: int = 0) -> DiffusionPipeline:
    """A pipeline with the same parts and a U-Net with random gated layers, each opened to `gate`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = with_gates(pipe.unet)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith((".alpha_attn", ".alpha_dense")):
                parameter.fill_(gate)
    made = type(pipe)(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    made.grounding = Grounding(unet.config.cross_attention_dim, seed)
    return made
