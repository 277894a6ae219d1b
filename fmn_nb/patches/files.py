"""A patch as files: the tensors in one safetensors file, what they are in `fmn.json`.

    pytorch_lora_weights.safetensors    a LoRA, in diffusers' own naming: `unet.MODULE.lora_A.weight`
    fmn_weights.safetensors             or: differences of whole parameters, `unet.PARAMETER`
    fmn.json                            the patch's `info`, its kind, schema and the SHA-256 of the tensors
    learned_embeds.safetensors          learned tokens, only where `fmn.json` names them (`LearnedTokens.save`)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmn_nb.files import read_json, replacing, sha256, write_json
from fmn_nb.patches.learned_tokens import LearnedTokens

SCHEMA = 1
INFO_FILE = "fmn.json"
TENSOR_FILES = {"lora": "pytorch_lora_weights.safetensors", "weights": "fmn_weights.safetensors"}


class PatchFileError(ValueError):
    """The folder holds no patch, or a damaged one."""


def write(folder: Path, kind: str, tensors: Mapping[str, Tensor], info: dict[str, Any],
          tokens: LearnedTokens | None) -> Path:
    """Write a patch; `fmn.json` comes last, so a folder without it, or with another sum, is unfinished.

    Raises:
        ValueError: `info` doesn't say for which base model the patch is, so that `read` would refuse it.
    """
    if not _says_base(info):
        raise ValueError("a patch is saved with its base model: info={'base': {'name': ..., 'component': "
                         "denoiser_name(pipe), 'fingerprint': fingerprint(pipe)}}, both of fmn_nb.models")
    prefix, file = f"{info['base']['component']}.", folder / TENSOR_FILES[kind]
    try:  # a patch that stands in the folder came with learned tokens; a user's own there are left alone
        tokens_go = tokens is None and "tokens" in read_json(folder / INFO_FILE)
    except (OSError, ValueError, TypeError):
        tokens_go = False
    if tokens is not None:
        tokens.save(folder)
        info = {**info, "tokens": tokens.name}
    with replacing(file) as temporary:  # diffusers expects the entry of a PyTorch file
        save_file({prefix + name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary,
                  {"format": "pt"})
    write_json(folder / INFO_FILE, {"schema": SCHEMA, "kind": kind, "sha256": sha256(file), **info})
    shutil.copymode(folder / INFO_FILE, file)  # safetensors makes files that only their owner can read
    for stale in set(TENSOR_FILES.values()) - {file.name}:
        (folder / stale).unlink(missing_ok=True)  # of a patch of the other kind that was here before
    if tokens_go:
        for stale in folder.glob("learned_embeds*.safetensors"):
            stale.unlink()
    return folder


def read(folder: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """(kind, tensors, info) of the patch in `folder`; PatchFileError says what is wrong with it."""
    info = _read_info(folder)
    kind, expected = info.pop("kind"), info.pop("sha256")
    info.pop("schema")
    prefix, file = f"{info['base']['component']}.", folder / TENSOR_FILES[kind]
    if not file.is_file():
        raise PatchFileError(f"{file} is missing; copy the patch's folder again, whole")
    if sha256(file) != expected:
        raise PatchFileError(f"{file} is damaged or was changed: its SHA-256 is not the one in {INFO_FILE}")
    try:
        named = load_file(file)
    except (SafetensorError, ValueError) as error:
        raise PatchFileError(f"{file} is no valid safetensors file: {error}") from error
    foreign = [name for name in named if not name.startswith(prefix)]
    if foreign or not named:
        raise PatchFileError(f"{file} holds {foreign[0] if foreign else 'nothing'}, not a patch's tensors")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    if kind == "lora":
        _check_pairs(folder, tensors)
    return kind, tensors, info


def _says_base(info: Mapping[str, Any]) -> bool:
    base = info.get("base")
    return isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("component", "fingerprint"))


def _read_info(folder: Path) -> dict[str, Any]:
    file = folder / INFO_FILE
    if not file.is_file():
        raise PatchFileError(f"{folder} holds no {INFO_FILE}, so no patch of this package; "
                             "a LoRA from elsewhere goes through pipe.load_lora_weights")
    try:
        info = read_json(file)
    except ValueError as error:
        raise PatchFileError(str(error)) from error
    if not isinstance(info, dict) or info.get("kind") not in TENSOR_FILES or "sha256" not in info:
        raise PatchFileError(f"{file} doesn't describe a patch (its kind or sum is missing or unknown)")
    if not _says_base(info) or not isinstance(info.get("concepts", []), list):
        raise PatchFileError(f"{file} doesn't describe a patch: it must say its base model's component and "
                             "fingerprint, and a list of concepts if any")
    if info.get("schema") != SCHEMA:
        raise PatchFileError(f"{file} has schema {info.get('schema')}; this version reads {SCHEMA}: update fmn_nb")
    return info


def _check_pairs(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for module in {name.rpartition(".lora_")[0] for name in tensors}:
        down, up = tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")
        flat = [tensor for tensor in (down, up) if tensor is not None and tensor.ndim < 2]
        if flat:
            raise PatchFileError(f"{folder}: a LoRA factor of '{module}' has the shape {tuple(flat[0].shape)}, "
                                 "which is no matrix's")
        if down is None or up is None or up.shape[1] != down.shape[0]:
            raise PatchFileError(f"{folder}: the LoRA factors of '{module}' are missing or differ in rank")
