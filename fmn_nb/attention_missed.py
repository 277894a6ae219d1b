"""What to do about layers whose attention couldn't be heard."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fmn_nb.attention_data import LayerCoverage


class MissedLayersError(RuntimeError):
    """Layers ran whose attention couldn't be heard; the text names them and says what to do."""


def why_missed(denoiser: torch.nn.Module, missed: Sequence[LayerCoverage]) -> str:
    """Names the layers that couldn't be heard, and what to do about it."""
    names = ", ".join(entry.layer for entry in missed)
    otherwise = "or leave these layers out with layers=[...]"
    if not any(entry.runs for entry in missed):
        return (f"attention of {names} couldn't be heard: the model ran past these layers' hooks, as a compiled one "
                f"does. Record the model as it was before torch.compile, {otherwise}")
    processors = [getattr(denoiser.get_submodule(entry.layer), "processor", None) for entry in missed]
    kinds = ", ".join(sorted({type(processor).__name__ for processor in processors}))
    ways = "; ".join(dict.fromkeys(_way(denoiser, processor) for processor in processors))
    return (f"attention of {names} couldn't be heard: {kinds} doesn't call torch's scaled_dot_product_attention. "
            f"{ways}, {otherwise}")


def _way(denoiser: torch.nn.Module, processor: object) -> str:
    """The call that replaces a processor by one that can be heard."""
    kind = type(processor).__name__
    if "Sliced" in kind:
        return ("Call pipe.disable_attention_slicing() (set_attention_slice(None) on a model alone); "
                "set_default_attn_processor() doesn't help")
    if "XFormers" in kind:
        return "Call disable_xformers_memory_efficient_attention() on the pipeline or the model"
    if getattr(processor, "_attention_backend", None) is not None:
        return "Call reset_attention_backend() on the model"
    if any("UNet" in base.__name__ or "PixArt" in base.__name__ for base in type(denoiser).__mro__):
        # diffusers' own "default" is the older AttnProcessor, which computes attention by hand
        return ("Call set_attn_processor(AttnProcessor2_0()) on the model, from diffusers.models.attention_processor; "
                "set_default_attn_processor() doesn't help")
    return "Put back the attention processors that the model was loaded with, or load it again"
