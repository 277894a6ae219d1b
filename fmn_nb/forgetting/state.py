"""The state of a fine-tune on disk: enough to continue as if it had never stopped.

    checkpoint.json            which run this is (its identity), the steps done, what was measured in each
    checkpoint-N.safetensors   after step N: trained parameters, the optimiser's moments, the random generators
    latents/                   what the model drew for the references and retain images, so that it is drawn once

Only safetensors and JSON, each written whole. The JSON is written after the tensors that it names with their SHA-256,
and the earlier tensors are removed last: whenever the process dies, the folder holds a whole state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fmn_nb.files import read_json, replacing, write_json
from fmn_nb.forgetting.data import Task
from fmn_nb.models import (
    LATENTS,
    Noising,
    added_tokens,
    denoiser,
    digest,
    digest_of,
    switches,
    text_encoders,
    weights_checksum,
)
from fmn_nb.models.arguments import finite_number, whole_number

STATE_FILE = "checkpoint.json"
_NOT_IDENTITY = ("checkpoint_every", "offload")  # they don't change what is learned


class CheckpointError(ValueError):
    """The folder's checkpoint is damaged, or belongs to another run."""


@dataclass(frozen=True)
class State:
    """One moment of a fine-tune.

    Attributes:
        step: optimiser steps done.
        measured: name -> one number per step ("losses", "masses", and "retain", "anchor", "towards" if there are any).
        seconds: wall time spent so far.
        tensors: dotted names -> tensors.
    """

    step: int
    measured: dict[str, list[float]]
    seconds: float
    tensors: dict[str, Tensor]
    stopped_because: str = ""


class Checkpoint:
    """The checkpoint of one run in one folder, which is also a cache of the latents that the run learns from.

    `identity` holds JSON values that say which run this is; another run's folder is refused (CheckpointError).
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity, self._found = Path(folder), dict(identity), {}
        if (self.folder / STATE_FILE).is_file():
            try:
                self._found = _checked(read_json(self.folder / STATE_FILE))
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.folder / STATE_FILE} is damaged ({error}); delete the folder") from error
            other = self._found["identity"]
            different = [name for name in sorted({*identity, *other}) if identity.get(name) != other.get(name)]
            if different:
                said = "; ".join(f"{n}: {other.get(n)!r} there, {identity.get(n)!r} here" for n in different[:3])
                raise CheckpointError(f"{self.folder} holds the checkpoint of another run ({said}); use another folder")

    def begin(self) -> None:
        """Note which run this is and which latents in the folder it learns from.

        Lost latents are drawn again and come out the same, unless the machine, its number of threads or a library's
        version has changed: then a warning says so, if they were in this folder and not in a cache that others share.
        """
        latents = sorted(file.name for file in (self.folder / LATENTS).glob("*.safetensors"))
        if not self._found.get("step"):
            self._write({"step": 0, "latents": latents})
        elif set(latents) - set(self._found["latents"]):
            warnings.warn(
                f"the images that this run learns from were drawn anew beside the state of step {self._found['step']} "
                f"in {self.folder}, because the machine, its number of threads or a library's version has changed: "
                "the patch will be close to that of the unbroken run, but not the same; for the same patch, continue "
                "where the run began",
                stacklevel=3)

    def load(self) -> State | None:
        """The last state, or None if there is none yet; CheckpointError if its files are damaged."""
        if not self._found.get("step"):
            return None
        file = self._tensors_file(self._found["step"])
        content = file.read_bytes() if file.is_file() else b""
        if digest([content]) != self._found.get("sha256"):
            raise CheckpointError(f"{file} is missing or damaged; delete {self.folder} to start again")
        kept = {name: self._found[name] for name in ("step", "measured", "seconds", "stopped_because")}
        try:
            return State(tensors=load(content), **kept)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); delete {self.folder} to start again") from error

    def save(self, state: State) -> None:
        """Write a state, and only then remove the one before."""
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()})
        own = self._tensors_file(state.step)
        with replacing(own) as temporary:
            temporary.write_bytes(content)
        self._write({"step": state.step, "measured": state.measured, "seconds": state.seconds,
                     "stopped_because": state.stopped_because, "sha256": digest([content])})
        for older in self.folder.glob("checkpoint-*.safetensors"):
            if older != own:
                older.unlink()

    def _tensors_file(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}.safetensors"

    def _write(self, state: dict[str, Any]) -> None:
        found = {"identity": self.identity, "latents": self._found.get("latents", []), **state}
        write_json(self.folder / STATE_FILE, found)
        self._found = found  # only now: what can't be written is not the last good state


def _checked(found: Any) -> dict[str, Any]:
    """The content of a state's JSON if it is valid; otherwise a ValueError, TypeError or KeyError."""
    if not isinstance(found, dict) or not isinstance(found["identity"], dict):
        raise ValueError("it isn't a checkpoint's")
    step, latents = whole_number("step", found["step"], 0), found["latents"]
    if not isinstance(latents, list) or not all(isinstance(name, str) for name in latents):
        raise ValueError("latents are names of files")
    if not step:
        return found
    measured = {**found["measured"]}
    for name, values in measured.items():
        counts = (step,) if name in ("losses", "masses") else (0, step)
        if not isinstance(values, list) or len(values) not in counts:
            raise ValueError(f"measured {name} aren't one number for each of {step} steps")
        for value in values:
            finite_number(name, value)
    if not {"losses", "masses"} <= measured.keys():
        raise ValueError("it holds no losses and masses")
    finite_number("seconds", found["seconds"], 0)
    for name in ("stopped_because", "sha256"):
        if not isinstance(found[name], str):
            raise ValueError(f"{name} is a text, not {found[name]!r}")
    return found


def identity(task: Task, fingerprint: str) -> dict[str, Any]:
    """What must be the same to continue from a checkpoint; `fingerprint` is that of the task's pipeline.

    More steps don't make another run if the schedule doesn't depend on their number.
    """
    free = (*_NOT_IDENTITY, "steps") if task.settings.schedule.startswith("constant") else _NOT_IDENTITY
    return {
        "concepts": [asdict(concept) for concept in task.concepts], "seed": task.seed, "towards": dict(task.readings),
        **{name: value for name, value in task.settings.to_dict().items() if name not in free},
        "prompts": task.prompts and list(task.prompts),
        "retain_prompts": task.retain_prompts and list(task.retain_prompts),
        "references": {name: _pictures(found) for name, found in task.references.items()},
        "masks": task.masks and _pictures(task.masks),
        "guides": [task.guides_of(concept) for concept in task.concepts] if task.settings.guide else None,
        "fingerprint": fingerprint,
        # The fingerprint leaves out applied patches, adapters and learned tokens on purpose.
        "weights": weights_checksum(task.pipe),
        "beside": {name: f"SHA-256 {digest_of(part)[:16]}" for name, part in _beside(task.pipe).items()},
        "switches": {name: on for name, part in {"denoiser": denoiser(task.pipe), **_beside(task.pipe)}.items()
                     if (on := switches(part))},
        "learned_tokens": added_tokens(task.pipe),
        "noise": Noising(task.pipe).name,
        "latents": {name: value for name in ("scaling_factor", "shift_factor")
                    if (value := getattr(getattr(getattr(task.pipe, "vae", None), "config", None), name, None))},
    }


def _beside(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts that make what the denoiser learns from: the text encoders, and the autoencoder if there is one."""
    parts = {f"text encoder {number}": encoder for number, encoder in enumerate(text_encoders(pipe), 1)}
    return parts | ({"vae": pipe.vae} if isinstance(getattr(pipe, "vae", None), nn.Module) else {})


def _pictures(images: Sequence[Image.Image]) -> str:
    """Their number, and a sum over sizes and pixels: the same pictures under other names don't make another run."""
    found = digest(part for image in images for part in (f"{image.mode} {image.size}", image.tobytes()))
    return f"{len(images)} images, SHA-256 {found[:16]}"
