"""Attention of any diffusers layer computed by hand from the layer's inputs, and a spy on these."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.embeddings import apply_rotary_emb


def by_hand(module, inputs: dict) -> torch.Tensor:
    """Attention probabilities [B, heads, queries, keys] of a diffusers attention module, from its inputs."""
    x, c = inputs["hidden_states"], inputs.get("encoder_hidden_states")
    heads, rotary = module.heads, inputs.get("image_rotary_emb")

    def split(y, norm=None):
        y = y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)
        return y if norm is None else norm(y)

    q_norm, k_norm = getattr(module, "norm_q", None), getattr(module, "norm_k", None)
    if getattr(module, "added_kv_proj_dim", None) is not None:  # joint: image and text have their own projections
        image = split(module.to_q(x), q_norm), split(module.to_k(x), k_norm)
        text = (split(module.add_q_proj(c), getattr(module, "norm_added_q", None)),
                split(module.add_k_proj(c), getattr(module, "norm_added_k", None)))
        order = (text, image) if "Flux" in type(module).__name__ else (image, text)
        q, k = (torch.cat([part[i] for part in order], dim=2) for i in (0, 1))
    else:
        q, k = split(module.to_q(x), q_norm), split(module.to_k(x if c is None else c), k_norm)
    if rotary is not None:
        q, k = (apply_rotary_emb(y, rotary) for y in (q, k))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mask = inputs.get("attention_mask")
    if mask is not None:
        logits = logits + mask.reshape(len(x), -1, 1, mask.shape[-1])
    return logits.softmax(-1)


@contextmanager
def spied(model, layers):
    """What each of `layers` is called with, in order, while this is open."""
    seen = {name: [] for name in layers}

    def hook(name):
        def remember(_module, args, kwargs):
            seen[name].append({**({"hidden_states": args[0]} if args else {}), **kwargs})
        return remember

    with ExitStack() as hooks:
        for name in layers:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        yield seen
