"""Where a fine-tune stands, on disk: enough to go on as if it had never stopped.

    checkpoint.json            what run this is (its identity), the steps done, what was measured in each
    checkpoint-N.safetensors   after step N: trained parameters, the optimiser's moments, the random generators
    latents.safetensors        the references' and retain images' latents, so that they are made once

Safetensors and JSON only, each written whole. The JSON comes after the tensors that it names, with their SHA-256, and
the tensors before them go last: whenever the process dies, the folder holds a whole state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from fmn_nb.files import read_json, replacing, write_json

STATE_FILE, LATENTS_FILE = "checkpoint.json", "latents.safetensors"


class CheckpointError(ValueError):
    """The folder's checkpoint is damaged, or belongs to another run."""


@dataclass(frozen=True)
class State:
    """One moment of a fine-tune.

    Attributes:
        step: optimiser steps done.
        measured: name -> one number per step ("losses", "masses", "retain", and
            "anchor" and "towards" where there are such terms).
        seconds: wall time spent up to here.
        tensors: dotted names -> tensors.
    """

    step: int
    measured: dict[str, list[float]]
    seconds: float
    tensors: dict[str, Tensor]
    stopped_because: str = ""


class Checkpoint:
    """The checkpoint of one run in one folder.

    Args:
        folder: made if needed.
        identity: JSON values that say what run this is; a folder with another identity is refused.

    Raises:
        CheckpointError: the folder holds another run's checkpoint; the text names the first differences.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = Path(folder), dict(identity)
        if (self.folder / STATE_FILE).is_file():
            try:
                self._found = read_json(self.folder / STATE_FILE)
                other = self._found["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.folder / STATE_FILE} is damaged ({error}); delete the folder") from error
            self._compare(other)
        else:
            self._found = {}
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / LATENTS_FILE).unlink(missing_ok=True)  # of a run that never got to its first checkpoint

    def load(self) -> State | None:
        """The last state, or None where there is none yet.

        Raises:
            CheckpointError: its files are damaged.
        """
        if not self._found.get("step"):
            return None
        file = self._tensors_file(self._found["step"])
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self._found.get("sha256"):
            raise CheckpointError(f"{file} is missing or damaged; delete {self.folder} to start again")
        kept = {name: self._found[name] for name in ("step", "measured", "seconds", "stopped_because")}
        return State(tensors=load(content), **kept)

    def save(self, state: State) -> None:
        """Write a state, and only then remove the last one."""
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()})
        own = self._tensors_file(state.step)
        with replacing(own) as temporary:
            temporary.write_bytes(content)
        self._write({"step": state.step, "measured": state.measured, "seconds": state.seconds,
                     "stopped_because": state.stopped_because, "sha256": hashlib.sha256(content).hexdigest()})
        for older in self.folder.glob("checkpoint-*.safetensors"):
            if older != own:
                older.unlink()

    def _tensors_file(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}.safetensors"

    def latents(self) -> dict[str, Tensor]:
        """Latents that were kept by `keep_latents`; empty where there are none.

        Raises:
            CheckpointError: the file is damaged, or lost beside a state that was trained on it.
        """
        file = self.folder / LATENTS_FILE
        if self._found.get("step") and not file.is_file():
            raise CheckpointError(f"{file} is missing beside the state of step {self._found['step']}; put it back, or "
                                  f"delete {self.folder} to start again")
        if not self._found or not file.is_file():
            return {}
        try:
            return load_file(file)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); delete {self.folder} to start again") from error

    def keep_latents(self, latents: Mapping[str, Tensor]) -> None:
        """Keep the latents, and note what run this is."""
        with replacing(self.folder / LATENTS_FILE) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in latents.items()}, temporary)
        self._write({"step": 0})

    def _write(self, state: dict[str, Any]) -> None:
        found = {"identity": self.identity, **state}
        write_json(self.folder / STATE_FILE, found)
        self._found = found  # only now: what can't be written is not the last good state

    def _compare(self, other: Mapping[str, Any]) -> None:
        names = sorted({*self.identity, *other})
        different = [name for name in names if self.identity.get(name) != other.get(name)]
        if different:
            said = "; ".join(f"{n}: {other.get(n)!r} there, {self.identity.get(n)!r} here" for n in different[:3])
            raise CheckpointError(f"{self.folder} holds the checkpoint of another run ({said}); use another folder")
