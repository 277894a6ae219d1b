"""Diffusion pipelines by name: what is bundled, how to load it, and how to recognise it again.

A model is named by a bundled name ("emoji"), a hub id ("owner/name"), a diffusers folder, or a single
`.safetensors` checkpoint. Everything else in the package reaches the parts of a pipeline through the small
functions here, so that no other module has to know whether a pipeline has a U-Net or a transformer, and one
text encoder or three.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from fmn_nb.paths import bundled_models

ORIGINALS = "_fmn_originals"
"""Attribute of a denoiser with applied patches: parameter name -> the parameter as it was before."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SDXL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_CONFIG_THAT_MATTERS = ("attention_head_dim", "num_attention_heads", "norm_num_groups")


class UnknownModelError(ValueError):
    """The name is neither bundled, nor a folder, nor a checkpoint file, nor shaped like a hub id."""


class ModelLoadError(ValueError):
    """The model is named properly, but could not be loaded."""


class UnsupportedPipelineError(ValueError):
    """The pipeline lacks a part that the package needs (a denoiser, a text encoder)."""


def bundled() -> dict[str, Path]:
    """Name -> folder of every pipeline that comes with the package."""
    return bundled_models()


def resolve(name: str | Path) -> str | Path:
    """Turn a model's name into what can be loaded: a folder, a `.safetensors` file, or a hub id (str).

    Only looks at the name and the file system: nothing is imported, downloaded or read, so a wrong name is
    answered at once.

    Raises:
        UnknownModelError: with the bundled names and the other ways to name a model.
    """
    known, path = bundled(), Path(name).expanduser()
    if str(name) in known:
        return known[str(name)]
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UnknownModelError(f"the folder '{name}' has no model_index.json, so it is no diffusers pipeline")
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UnknownModelError(f"'{name}' is no .safetensors file; pickled checkpoints are not read, convert it")
        return path
    if _HUB_ID.fullmatch(str(name)) and path.suffix != ".safetensors":
        return str(name)
    raise UnknownModelError(
        f"no model '{name}'; bundled: {', '.join(known) or 'none'}; or give a hub id (owner/name), "
        "a diffusers folder, or a .safetensors file that exists"
    )


def load(
    name: str | Path = "emoji",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    config: str | Path | None = None,
) -> DiffusionPipeline:
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
    source, dtype, device = resolve(name), parse_dtype(dtype), torch.device(device or default_device())
    try:
        with without_bars() if isinstance(source, Path) else nullcontext():  # a download may show its progress
            if isinstance(source, Path) and source.is_file():
                pipe = _load_single_file(source, dtype, config)
            else:
                pipe = _load_diffusers(source, dtype)
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        where = "on the hub or in its cache (is the name right, the network there?)" if source == name else "there"
        raise ModelLoadError(f"the model '{name}' could not be loaded from what is {where}: {error}") from error
    if str(name) in bundled():
        pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating torch dtype from its name ("float16", "torch.bfloat16") or itself; float32 for None."""
    found = getattr(torch, str(dtype or "float32").removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"'{dtype}' is no floating dtype; use float32, float16 or bfloat16")
    return found


def default_device() -> str:
    """The fastest kind of device of this machine: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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


def _load_diffusers(source: str | Path, dtype: torch.dtype) -> DiffusionPipeline:
    parts = DiffusionPipeline.load_config(str(source))
    # Passed only where the pipeline has one: others would warn about an unexpected argument.
    without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
    return DiffusionPipeline.from_pretrained(str(source), dtype=dtype, use_safetensors=True, **without)


def _load_single_file(file: Path, dtype: torch.dtype, config: str | Path | None) -> DiffusionPipeline:
    with safe_open(file, framework="pt") as tensors:
        is_sdxl = _SDXL_KEY in set(tensors.keys())
    kind = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    without = {} if is_sdxl else {"safety_checker": None}
    local = {"config": str(config), "local_files_only": True} if config else {}
    return kind.from_single_file(str(file), dtype=dtype, **without, **local)


def bundled_name(pipe: DiffusionPipeline) -> str | None:
    """The bundled name of the model that a pipeline was loaded from, or None where it is another one."""
    origin = Path(str(pipe.config.get("_name_or_path", "")))
    return next((name for name, folder in bundled().items() if origin.name and origin.resolve() == folder), None)


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


def fingerprint(pipe: DiffusionPipeline) -> str:
    """What model this is: SHA-256 (64 hexadecimal digits) over the denoiser's and text encoders' weights.

    Values are rounded to float16 first, so a model has one fingerprint whether it is loaded in float32 or in
    float16. Left out, because they don't make another base model: patches that are applied at the moment,
    LoRA adapters beside the weights, and rows of the token embedding past the tokenizer's own vocabulary
    (learned tokens). The few configuration values that change what the weights mean are included.
    """
    digest = hashlib.sha256()
    # Of the scheduler only what the network was trained to predict: users change samplers freely.
    settings = {key: denoiser(pipe).config.get(key) for key in _CONFIG_THAT_MATTERS}
    settings["class"] = type(denoiser(pipe)).__name__
    settings["prediction_type"] = pipe.scheduler.config.get("prediction_type")
    digest.update(json.dumps(settings, default=str).encode())
    _hash_module(digest, denoiser(pipe))
    sizes = [tokenizer.vocab_size for tokenizer in tokenizers(pipe)]
    for encoder, vocabulary in zip(text_encoders(pipe), sizes, strict=False):
        _hash_module(digest, encoder, encoder.get_input_embeddings().weight, vocabulary)
    return digest.hexdigest()


def _hash_module(digest, module: nn.Module, embedding: torch.Tensor | None = None, rows: int = 0) -> None:
    originals = getattr(module, ORIGINALS, {})
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if "lora_" in name or not tensor.is_floating_point():
            continue
        if tensor is embedding:
            tensor = tensor[:rows]
        tensor = originals.get(name, tensor).detach()
        plain = name.replace(".base_layer.", ".")
        digest.update(f"{plain} {tuple(tensor.shape)}".encode())
        digest.update(tensor.to("cpu", torch.float16).contiguous().numpy().data)
