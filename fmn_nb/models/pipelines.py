"""Loading a diffusion pipeline, and reaching its parts.

Everything else in the package reaches the parts of a pipeline through the small functions here, so that no other module
has to know whether it has a U-Net or a transformer, and one text encoder or three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from fmn_nb.models.names import bundled, resolve

_SDXL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


class ModelLoadError(ValueError):
    """The model is named properly, but could not be loaded."""


class UnsupportedPipelineError(ValueError):
    """The pipeline lacks a part that the package needs (a denoiser, a text encoder)."""


def load(name: str | Path = "emoji", *, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, config: str | Path | None = None) -> DiffusionPipeline:
    """Load a text-to-image pipeline, in evaluation mode and without a safety checker.

    Args:
        name: a bundled name, a hub id, a diffusers folder, or a `.safetensors` checkpoint (SD 1.x, 2.x, SDXL).
        device: where to put it; by default "cuda", else "mps", else "cpu", whatever is there.
        dtype: of the weights, such as "float16"; float32 by default, as fine-tuning needs it.
        config: for a single file only: a folder with the pipeline's configuration and tokenizer, so that
            nothing is fetched from the hub.

    Only safetensors weights are read, and no code that comes with a model is run.

    Raises:
        UnknownModelError: the name means nothing, told before anything heavy happens.
        ModelLoadError: the model could not be read or fetched.
    """
    source, dtype = resolve(name), parse_dtype(dtype)
    fastest = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        with without_bars() if isinstance(source, Path) else nullcontext():  # a download may show its progress
            if isinstance(source, Path) and source.is_file():
                pipe = _load_single_file(source, dtype, config)
            else:
                without = {"safety_checker": None, "requires_safety_checker": False}
                if "safety_checker" not in DiffusionPipeline.load_config(str(source)):
                    without = {}  # the pipeline would warn about an unexpected argument
                pipe = DiffusionPipeline.from_pretrained(str(source), dtype=dtype, use_safetensors=True, **without)
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        where = "on the hub or in its cache (is the name right, the network there?)" if source == name else "there"
        raise ModelLoadError(f"the model '{name}' could not be loaded from what is {where}: {error}") from error
    if str(name) in bundled():
        pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.device(device or fastest))


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating torch dtype from its name ("float16", "torch.bfloat16") or itself; float32 for None."""
    found = getattr(torch, str(dtype or "float32").removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"'{dtype}' is no floating dtype; use float32, float16 or bfloat16")
    return found


@contextmanager
def without_bars() -> Iterator[None]:
    """Load without the progress bars that diffusers and transformers show for files already here."""
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _load_single_file(file: Path, dtype: torch.dtype, config: str | Path | None) -> DiffusionPipeline:
    with safe_open(file, framework="pt") as tensors:
        is_sdxl = _SDXL_KEY in set(tensors.keys())
    kind = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    without = {} if is_sdxl else {"safety_checker": None}
    local = {"config": str(config), "local_files_only": True} if config else {}
    return kind.from_single_file(str(file), dtype=dtype, **without, **local)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The name of the pipeline's denoising network among its components: "unet" or "transformer"."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise UnsupportedPipelineError(f"{type(pipe).__name__} has neither a unet nor a transformer, so nothing to work on")


def denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The pipeline's denoising network: a U-Net or a transformer."""
    return getattr(pipe, denoiser_name(pipe))


def text_encoders(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The pipeline's text encoders in order (SD has one, SDXL two, SD3 three); absent ones are left out."""
    return _numbered(pipe, "text_encoder")


def tokenizers(pipe: DiffusionPipeline) -> list:
    """The pipeline's tokenizers, in the order of its text encoders."""
    return _numbered(pipe, "tokenizer")


def _numbered(pipe: DiffusionPipeline, stem: str) -> list:
    parts = [getattr(pipe, stem + suffix, None) for suffix in ("", "_2", "_3", "_4")]
    return [part for part in parts if part is not None]
