"""A patch as files: the tensors in one safetensors file, what they are in `fmn.json`.

    pytorch_lora_weights.safetensors    a LoRA, in diffusers' own naming: `unet.MODULE.lora_A.weight`
    fmn_weights.safetensors             or: differences of whole parameters, `unet.PARAMETER`
    fmn.json                            the patch's `info`, its kind, schema and the SHA-256 of the other files
    learned_embeds.safetensors          learned tokens, only where `fmn.json` names them (`LearnedTokens.save`)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fmn_nb.files import read_json, sha256, write_json, write_tensors
from fmn_nb.patches.kohya import from_kohya, to_kohya
from fmn_nb.patches.learned_tokens import LearnedTokens, token_files

SCHEMA = 1
INFO_FILE = "fmn.json"
_UP, _BIAS = ".lora_B.weight", ".lora_B.bias"
TENSOR_FILES = {"lora": "pytorch_lora_weights.safetensors", "weights": "fmn_weights.safetensors"}


class PatchFileError(ValueError):
    """The folder holds no patch, or a damaged one."""


def write(folder: Path, kind: str, tensors: Mapping[str, Tensor], info: dict[str, Any],
          tokens: LearnedTokens | None, layout: str = "diffusers") -> Path:
    """Write a patch; `fmn.json` comes last, so a folder without it, or with another sum, is unfinished.

    Raises:
        ValueError: `info` doesn't say for which base model the patch is, so that `read` would refuse it, or holds what
            JSON doesn't have; the layout can't hold it; or `folder` is a file. Nothing is written then.
    """
    for key, value in info.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"info['{key}'] can't be saved as JSON ({error}): use plain, finite numbers, text, lists "
                             "and dicts") from None
    if not _says_base(info):
        raise ValueError("a patch is saved with its base model: info={'base': base_of(pipe)}, from fmn_nb.models")
    if files := [place for place in (folder, *folder.parents) if place.is_file()]:
        raise ValueError(f"{files[0]} is a file; a patch is saved to a folder")
    named, metadata = _named(kind, tensors, info["base"]["component"], layout)
    file = folder / TENSOR_FILES[kind]
    try:  # a patch that stands in the folder came with learned tokens; a user's own there are left alone
        tokens_go = tokens is None and "tokens" in read_json(folder / INFO_FILE)
    except (OSError, ValueError, TypeError):
        tokens_go = False
    said = {"schema": SCHEMA, "kind": kind, **({} if layout == "diffusers" else {"layout": layout})}
    write_tensors(file, named, metadata)
    said["sha256"] = sha256(file)
    if tokens is not None:
        tokens.save(folder)
        info = {**info, "tokens": tokens.name}
        said["tokens_sha256"] = {place.name: sha256(place) for place in token_files(folder)}
    write_json(folder / INFO_FILE, {**said, **info})
    for stale in set(TENSOR_FILES.values()) - {file.name}:
        (folder / stale).unlink(missing_ok=True)  # of a patch of the other kind that was here before
    if tokens_go:
        for stale in token_files(folder):
            stale.unlink()
    return folder


def read(folder: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """(kind, tensors, info) of the patch in `folder`; PatchFileError says what is wrong with it."""
    info = _read_info(folder)
    kind, expected, layout = info.pop("kind"), info.pop("sha256"), info.pop("layout", "diffusers")
    info.pop("schema")
    sums = {TENSOR_FILES[kind]: expected, **info.pop("tokens_sha256", {})}
    file = folder / TENSOR_FILES[kind]
    for name, known in sums.items():
        if not (folder / name).is_file():
            raise PatchFileError(f"{folder / name} is missing; copy the patch's folder again, whole")
        if sha256(folder / name) != known:
            raise PatchFileError(
                f"{folder / name} is damaged or was changed: its SHA-256 is not the one in {INFO_FILE}")
    try:
        tensors = _tensors(file, info["base"]["component"], layout)
    except SafetensorError as error:
        raise PatchFileError(f"{file} is not a valid safetensors file: {error}") from error
    if kind == "lora":
        _check_pairs(folder, tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BIAS) or tensor.any()}
    return kind, tensors, info


def _tensors(file: Path, component: str, layout: str) -> dict[str, Tensor]:
    """A file's tensors under a patch's names for them."""
    named = load_file(file)
    if layout == "kohya":
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata() or {}
        try:
            return from_kohya(named, json.loads(said["modules"]))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise PatchFileError(f"{file} holds other tensors than its metadata says: {error}") from error
    foreign = [name for name in named if not name.startswith(f"{component}.")]
    if foreign or not named:
        raise PatchFileError(f"{file} holds {foreign[0] if foreign else 'nothing'}, not a patch's tensors")
    return {name.removeprefix(f"{component}."): tensor for name, tensor in named.items()}


def _named(kind: str, tensors: Mapping[str, Tensor], component: str,
           layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors under their names in it, and its metadata."""
    if layout == "diffusers":  # which expects the entry of a PyTorch file
        return {f"{component}.{name}": tensor.cpu().contiguous()
                for name, tensor in {**_zero_biases(tensors), **tensors}.items()}, {"format": "pt"}
    if layout != "kohya":
        raise ValueError(f"a patch's layout is 'diffusers' or 'kohya', not {layout!r}")
    if kind != "lora" or component != "unet":
        raise ValueError(f"kohya's layout holds the LoRA of a unet, and this patch is {kind} of a {component}"
                         f"{'; low_rank(rank, biases=False) makes a LoRA of it' if kind != 'lora' else ''}")
    modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors)
    return to_kohya({name: tensor.cpu() for name, tensor in tensors.items()}), {
        "format": "pt", "modules": json.dumps(list(modules))}


def _zero_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The missing biases: diffusers and peft want a bias for all layers of a LoRA, or for none."""
    if not any(name.endswith(_BIAS) for name in tensors):
        return {}
    return {name.removesuffix(_UP) + _BIAS: tensor.new_zeros(len(tensor))
            for name, tensor in tensors.items() if name.endswith(_UP)}


def _says_base(info: Mapping[str, Any]) -> bool:
    base = info.get("base")
    return isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("component", "fingerprint"))


def _read_info(folder: Path) -> dict[str, Any]:
    file = folder / INFO_FILE
    if not file.is_file():
        raise PatchFileError(f"{folder} holds no {INFO_FILE}, so it isn't a patch of this package; "
                             "a LoRA from elsewhere goes through pipe.load_lora_weights")
    try:
        info = read_json(file)
    except ValueError as error:
        raise PatchFileError(str(error)) from error
    if not isinstance(info, dict) or info.get("kind") not in list(TENSOR_FILES) or not isinstance(
            info.get("sha256"), str):
        raise PatchFileError(f"{file} doesn't describe a patch (its kind or sum is missing or unknown)")
    if not _says_base(info):
        raise PatchFileError(f"{file} doesn't describe a patch: it must say its base model's component and fingerprint")
    if wrong := [name for name, right in _SAID.items() if name in info and not right(info[name])]:
        raise PatchFileError(f"{file} doesn't describe a patch: its '{wrong[0]}' can't be "
                             f"{shortened(info[wrong[0]])}; copy the patch's folder again, or make the patch anew")
    if info.get("schema") != SCHEMA:
        raise PatchFileError(f"{file} has schema {info.get('schema')}; this version reads {SCHEMA}: update fmn_nb")
    return info


def _is_concept(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _is_report(value: Any) -> bool:
    return isinstance(value, dict)


_SAID: dict[str, Callable[[Any], bool]] = {  # what fmn.json may say, where it says it
    "concepts": lambda value: isinstance(value, list) and all(_is_concept(one) for one in value),
    "forgetting": _is_report, "settings": _is_report, "versions": _is_report, "metrics": _is_report,
    "towards": _is_report, "preset": lambda value: isinstance(value, str), "tokens": lambda v: isinstance(v, str),
    "seed": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "layout": lambda value: value in ("diffusers", "kohya"),
    "tokens_sha256": lambda value: isinstance(value, dict) and all(
        isinstance(known, str) and Path(name).name == name for name, known in value.items()),
}


def _check_pairs(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for module in {name.rpartition(".lora_")[0] for name in tensors}:
        down, up = tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")
        bias = tensors.get(f"{module}.lora_B.bias")
        flat = [tensor for tensor in (down, up) if tensor is not None and tensor.ndim < 2]
        if flat:
            raise PatchFileError(f"{folder}: a LoRA factor of '{module}' has the shape {tuple(flat[0].shape)}, "
                                 "which isn't a matrix's")
        if down is None or up is None or up.shape[1] != down.shape[0]:
            raise PatchFileError(f"{folder}: the LoRA factors of '{module}' are missing or differ in rank")
        if bias is not None and bias.shape != up.shape[:1]:
            raise PatchFileError(f"{folder}: the bias of '{module}' has the shape {tuple(bias.shape)}, its factor "
                                 f"{tuple(up.shape)}")
