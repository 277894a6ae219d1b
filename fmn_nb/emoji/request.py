"""What a folder of checkpoints was trained for, so that none of them is resumed for something else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmn_nb.files import read_json, write_json

REQUEST_FILE = "request.json"
_NEXT_STEP = "give another --out, or train anew with --restart"


def claim(work: Path, request: Mapping[str, Any]) -> None:
    """Note in the folder `work` what is trained there; the same request again changes nothing.

    Raises:
        ValueError: the folder holds checkpoints of another request, or of one that was never noted.
    """
    path = work / REQUEST_FILE
    if not path.is_file():
        if any(work.glob("*.safetensors")):
            raise ValueError(f"the checkpoints in {work} are of an older version, which didn't note what they were "
                             f"trained with; this training has {_listed(request, request)}; {_NEXT_STEP}")
        write_json(path, dict(request))
        return
    before = read_json(path)
    differing = [name for name in {**before, **request} if before.get(name) != request.get(name)]
    if differing:
        raise ValueError(f"the checkpoints in {work} were trained with {_listed(before, differing)}, this training has "
                         f"{_listed(request, differing)}; {_NEXT_STEP}")


def origin(start_from: Path | None, own: Path) -> str | None:
    """What a training starts from, in words that stay the same when folders move; None where it starts from nothing.

    `own` is the folder that the training itself replaces: its content says nothing, for it changes on the way.

    Raises:
        FileNotFoundError: `start_from` holds no pipeline.
    """
    if start_from is None:
        return None
    if not (start_from / "model_index.json").is_file():
        raise FileNotFoundError(f"{start_from} holds no model_index.json; start from a finished pipeline's folder")
    if start_from.resolve() == own.resolve():
        return "the pipeline in its own folder"
    digest = hashlib.sha256()
    for file in sorted([*start_from.rglob("*.safetensors"), *start_from.glob("tokenizer/tokenizer.json")]):
        digest.update(file.relative_to(start_from).as_posix().encode())
        digest.update(file.read_bytes())
    return f"the pipeline {digest.hexdigest()[:16]}"


def _listed(request: Mapping[str, Any], names: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(f"{name} {_worded(request.get(name))}" for name in names)


def _worded(value: Any) -> str:
    return (", ".join(value) if isinstance(value, list) else "" if value is None else str(value)) or "nothing"
