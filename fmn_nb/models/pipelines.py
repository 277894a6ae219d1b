"""Loading a diffusion pipeline, and reaching its parts.

Everything else in the package reaches the parts of a pipeline through the small functions here, so that no other module
has to know whether it has a U-Net or a transformer, and one text encoder or three.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from logging import LogRecord
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import list_repo_files, try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from fmn_nb.files import REST, base_folder
from fmn_nb.models.gated import BESIDE, check_base, stored_tensors, with_gates
from fmn_nb.models.names import UnknownModelError, bundled, check_on_hub, resolve
from fmn_nb.models.parameters import unwrapped

_DENOISERS = ("unet", "transformer")
_SUFFIXES = ("", "_2", "_3", "_4")  # of the names of text encoders and tokenizers
CALL_KEY = "_call"  # in a denoiser's configuration: the default arguments of its pipeline's call
_SDXL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_REFINER_KEY = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
_FIRST_KEY = "model.diffusion_model.input_blocks.0.0.weight"  # [out, in, 3, 3]: 9 channels go in for inpainting
_WEIGHTS = re.compile(r"(?:model|pytorch_model|diffusion_pytorch_model)(?:\.(?P<before>[\w-]+?))?(?:-\d+-of-\d+)?"
                      r"(?:\.(?P<after>[\w-]+))?\.safetensors")
_PICTURES = {"image", "mask_image", "control_image", "init_image", "source_image", "reference_image", "cond_image"}
_PICTURE_IS_OPTIONAL = re.compile(  # they draw from text alone as well
    r"(?!.*(?:Inpaint|Control)).*(?:Kontext|OmniGen|Flux2|GlmImage|Helios|QwenImage21|ZImageOmni)")


class ModelLoadError(ValueError):
    """The model has a valid name, but could not be loaded."""


class UnsupportedPipelineError(ValueError):
    """The pipeline lacks a part that the package needs (a denoiser, a text encoder), or draws from a picture."""


def load(name: str | Path = "emoji", *, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, config: str | Path | None = None) -> DiffusionPipeline:
    """Load a text-to-image pipeline, in evaluation mode and without a safety checker.

    Args:
        name: a bundled name, a hub id, a diffusers folder, or a `.safetensors` checkpoint (SD 1.x, 2.x, SDXL).
        device: where to put it; by default the first that is there of "cuda", "mps", "cpu".
        dtype: the weights' type, such as "float16"; float32 by default, as fine-tuning needs it.
        config: for a single file only: a folder with the pipeline's configuration and tokenizer, so that
            nothing is fetched from the hub; None or "" for what the hub has.

    Only safetensors weights are read, and no code that comes with a model is run.

    Raises:
        UnknownModelError: the name means nothing; raised before any heavy work.
        UnsupportedPipelineError: the model draws from a picture, not from a prompt alone; raised as early.
        ModelLoadError: the model could not be read or fetched, or the device isn't there.
    """
    source, dtype, device, own = resolve(name), parse_dtype(dtype), _device(device), str(name) in bundled()
    is_file = isinstance(source, Path) and source.is_file()
    try:
        # A download may show its progress.
        with without_bars() if isinstance(source, Path) else nullcontext(), _known_types(own):
            if is_file:
                pipe = _load_single_file(source, dtype, config)
            elif isinstance(source, Path) and (source / BESIDE).is_file():
                pipe = _load_grounded(source, dtype)
            else:
                pipe = _load_diffusers(str(source), dtype)
    except (ModelLoadError, UnsupportedPipelineError):
        raise
    except Exception as error:  # a damaged folder ends in whatever error its reader stumbles over
        where = "there" if isinstance(source, Path) else "on the hub or in its cache (is the name right, the network " \
                                                         "there?)"
        raise ModelLoadError(f"the model '{name}' could not be loaded from what is {where}: "
                             f"{type(error).__name__}: {error}") from error
    if own:
        pipe.set_progress_bar_config(disable=True)
    return with_call_defaults(pipe).to(device)


def with_call_defaults(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with the default arguments of its denoiser's configuration (`CALL_KEY`: argument -> value).

    If these set the real guidance of a Flux (`true_cfg_scale`, with a negative prompt), `guidance_scale` means that
    one: a Flux that wasn't distilled has no other. Apart from its call, the class stays diffusers' own, and so does
    what is saved.
    """
    configs = (getattr(getattr(pipe, name, None), "config", None) or {} for name in _DENOISERS)
    defaults = next((dict(config[CALL_KEY]) for config in configs if config.get(CALL_KEY)), None)
    if defaults and not isinstance(pipe, _CalledByDefault):
        kind = type(pipe)
        pipe.__class__ = type(kind.__name__, (_CalledByDefault, kind), {
            "__module__": kind.__module__, "__call__": _called_with(kind, defaults)})
    return pipe


class _CalledByDefault:
    """Marks the classes that `with_call_defaults` makes."""


def _called_with(kind: type[DiffusionPipeline], defaults: Mapping[str, Any]) -> Callable[..., Any]:
    """The class's call with other defaults, also in its signature; like the original, it computes no gradient."""
    own = inspect.unwrap(kind.__call__)  # what torch.no_grad decorates
    signature = inspect.signature(own)
    signature = signature.replace(parameters=[parameter.replace(default=defaults.get(name, parameter.default))
                                              for name, parameter in signature.parameters.items()])

    @functools.wraps(own)
    def call(self: DiffusionPipeline, *args: Any, **given: Any) -> Any:
        told = {name: value for name, value in signature.bind(self, *args, **given).arguments.items()
                if value is not None}
        if "guidance_scale" in told and "true_cfg_scale" in defaults:
            told.setdefault("true_cfg_scale", told["guidance_scale"])
        arguments = {**defaults, **told}
        if "negative_prompt_embeds" in told and "negative_prompt" not in told:
            arguments.pop("negative_prompt", None)
        negative, prompts = arguments.get("negative_prompt"), told.get("prompt", told.get("prompt_embeds"))
        if isinstance(negative, str) and not isinstance(prompts, str | None):  # one for each prompt
            arguments["negative_prompt"] = [negative] * len(prompts)
        return own(**arguments)

    call.__signature__ = signature
    return torch.no_grad()(call)


def _device(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default the fastest; ModelLoadError if there is no such device."""
    fastest = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or fastest)
    except (RuntimeError, TypeError) as error:
        raise ModelLoadError(f"{name!r} is not a device; use 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 1):
        raise ModelLoadError(f"there is no device '{device}' here (or this torch is built without it); the fastest is "
                             f"'{fastest}', and device=None takes it")
    return device


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating torch dtype from its name ("float16", "torch.bfloat16") or itself; float32 for None."""
    found = getattr(torch, str(dtype or "float32").removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"'{dtype}' is no floating dtype; use float32, float16 or bfloat16")
    return found


@contextmanager
def without_bars() -> Iterator[None]:
    """Load without the progress bars that diffusers and transformers show for files that are already here."""
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@contextmanager
def _known_types(known: bool) -> Iterator[None]:
    """Drop diffusers' warning that a part has an unusual class, if the combination is known to work."""
    logger = diffusers_logging.get_logger("diffusers.pipelines.pipeline_utils")

    def other(record: LogRecord) -> bool:
        return not (known and str(record.msg).startswith("Expected types for"))

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


# ---- folders and hub ids ---------------------------------------------------------------------------------------------


def _load_diffusers(source: str, dtype: torch.dtype) -> DiffusionPipeline:
    index = DiffusionPipeline.load_config(source)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str):
        raise ModelLoadError(f"the model_index.json of '{source}' names no pipeline's class; it is damaged: copy the "
                             "model again")
    if isinstance(known := getattr(diffusers, kind, None), type):
        require_text_to_image(known)
    # The pipeline would warn about an argument that it doesn't know.
    without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    return DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, variant=variant_of(source),
                                             **without, **_rest(source, index, dtype))


def _rest(source: str, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The parts that a folder leaves to a bundled model, by name: an oracle shares all but its networks.

    The folder's index says so: {"_rest": {"of": "emoji", "config": {"vae": {"scaling_factor": 1.1}}}}, where `config`
    holds configuration values for the shared parts.
    """
    if REST not in index:
        return {}
    of, settings = index[REST]["of"], index[REST].get("config", {})
    if of not in bundled():
        raise ModelLoadError(f"{source} leaves its other parts to the bundled model {of!r}, which isn't there; "
                             f"bundled: {', '.join(bundled()) or 'none'}")
    own = [name for name, kind in index.items() if isinstance(kind, list) and (Path(source) / name).is_dir()]
    whole = DiffusionPipeline.from_pretrained(bundled()[of], dtype=dtype, use_safetensors=True, **dict.fromkeys(own))
    parts = {name: part for name, part in whole.components.items() if part is not None}
    for name, values in settings.items():
        parts[name].register_to_config(**values)
    return parts


def _load_grounded(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline beside a folder of gated layers, with these layers in its denoiser."""
    check_base(folder)
    pipe = _load_diffusers(str(base_folder(folder)), dtype)
    pipe.unet = with_gates(pipe.unet, stored_tensors(folder, dtype))
    pipe.register_to_config(_name_or_path=str(folder))
    return pipe


def variant_of(source: str | Path) -> str | None:
    """Which variant of the weights ("fp16", "non_ema") to load: None unless a part exists in no other form.

    Args:
        source: a folder, or a hub id, whose files are listed on the hub or else in its cache.
    """
    parts: dict[str, set[str | None]] = {}
    for file in _files_of(str(source)):
        folder, _, name = file.rpartition("/")
        if folder and folder != "safety_checker" and (found := _WEIGHTS.fullmatch(name)):
            parts.setdefault(folder, set()).add(found["before"] or found["after"])
    needed = [variants for variants in parts.values() if None not in variants]
    common = sorted(set.intersection(*needed)) if needed else []
    return "fp16" if "fp16" in common else common[0] if common else None


def _files_of(source: str) -> list[str]:
    folder = Path(source)
    if not folder.is_dir():
        try:
            return list_repo_files(source)
        except Exception:  # whichever HTTP library is at work has errors of its own
            cached = try_to_load_from_cache(source, "model_index.json")
            if not isinstance(cached, str):
                return []
            folder = Path(cached).parent
    return [file.relative_to(folder).as_posix() for file in folder.glob("*/*.safetensors")]


# ---- single files ----------------------------------------------------------------------------------------------------


def _load_single_file(file: Path, dtype: torch.dtype, config: str | Path | None) -> DiffusionPipeline:
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if shapes.get(_FIRST_KEY, (0, 4))[1] != 4 or _REFINER_KEY in shapes:
        raise UnsupportedPipelineError(f"{file} draws from a picture (inpainting, editing or a refiner), not from a "
                                       "prompt alone; give the text-to-image model that it came from")
    is_sdxl = _SDXL_KEY in shapes
    kind = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    without = {} if is_sdxl else {"safety_checker": None}
    if not config:
        _check_config_in_reach(file, shapes)
    elif not Path(config).expanduser().is_dir():
        raise ModelLoadError(f"there is no folder '{config}': config= names a folder with the pipeline's "
                             "model_index.json, configurations and tokenizer")
    local = {"config": str(Path(config).expanduser()), "local_files_only": True} if config else {}
    return kind.from_single_file(str(file), dtype=dtype, **without, **local)


def _check_config_in_reach(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelLoadError unless the configuration that diffusers wants for this file is cached or on the hub."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    wanted = fetch_diffusers_config(empty)["pretrained_model_name_or_path"]
    try:
        check_on_hub(wanted)
    except UnknownModelError as error:
        raise ModelLoadError(
            f"{file} holds only weights, and the configuration for it, '{wanted}', is neither on this machine nor in "
            "reach: call fmn.load(file, config=FOLDER) with a folder that holds such a pipeline's model_index.json, "
            "configurations and tokenizer (weights aren't needed), or load it once with a connection") from error


# ---- parts -----------------------------------------------------------------------------------------------------------


def require_text_to_image(pipe: DiffusionPipeline | type[DiffusionPipeline]) -> None:
    """Raise UnsupportedPipelineError for a pipeline (or its class) that needs a picture besides the prompt, or that
    draws videos."""
    kind = pipe if isinstance(pipe, type) else type(pipe)
    taken = inspect.signature(kind.__call__).parameters
    if "num_frames" in taken:
        raise UnsupportedPipelineError(f"{kind.__name__} draws videos; load a text-to-image model")
    wanted = [name for name in taken if name in _PICTURES]
    if wanted and not _PICTURE_IS_OPTIONAL.match(kind.__name__):
        raise UnsupportedPipelineError(
            f"{kind.__name__} draws from a picture ({', '.join(wanted)}), not from a prompt alone; make a "
            "text-to-image pipeline of its parts, diffusers' AutoPipelineForText2Image.from_pipe(pipe) "
            "(from_pretrained(...) for a folder), or load the text-to-image model")


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The name of the pipeline's denoising network among its components: "unet" or "transformer"."""
    for name in _DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise UnsupportedPipelineError(f"{type(pipe).__name__} has neither a unet nor a transformer to work on")


def denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The pipeline's denoising network: a U-Net or a transformer, without the wrapper of `torch.compile`."""
    return unwrapped(getattr(pipe, denoiser_name(pipe)))


@contextmanager
def uncompiled() -> Iterator[None]:
    """While open, compiled modules run uncompiled, so that hooks on their layers are called."""
    compiled = "torch._dynamo" in sys.modules  # which takes seconds to import
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def training_kind(pipe: DiffusionPipeline) -> str:
    """What the network was trained to predict, whatever its sampler: "flow", or a scheduler's prediction_type
    ("epsilon", "v_prediction", "sample")."""
    config = pipe.scheduler.config
    kind = config.get("prediction_type", "epsilon")
    is_flow = "FlowMatch" in type(pipe.scheduler).__name__ or config.get("use_flow_sigmas")
    return "flow" if is_flow or kind == "flow_prediction" else kind


def text_encoders(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The pipeline's text encoders in order (SD has one, SDXL two, SD3 three), without absent ones."""
    return _numbered(pipe, "text_encoder")


def tokenizers(pipe: DiffusionPipeline) -> list:
    """The pipeline's tokenizers, in the order of its text encoders."""
    return _numbered(pipe, "tokenizer")


def tokenized_encoders(pipe: DiffusionPipeline) -> list[tuple[str, Any, nn.Module]]:
    """(the tokenizer's name in the pipeline, tokenizer, text encoder) where both are there: a Stable Diffusion 3 may
    have its T5 encoder left out, and still its tokenizer."""
    found = [(f"tokenizer{suffix}", getattr(pipe, f"tokenizer{suffix}", None),
              getattr(pipe, f"text_encoder{suffix}", None)) for suffix in _SUFFIXES]
    return [(name, tokenizer, unwrapped(encoder)) for name, tokenizer, encoder in found
            if tokenizer is not None and encoder is not None]


def _numbered(pipe: DiffusionPipeline, stem: str) -> list:
    parts = [getattr(pipe, stem + suffix, None) for suffix in _SUFFIXES]
    return [unwrapped(part) for part in parts if part is not None]
