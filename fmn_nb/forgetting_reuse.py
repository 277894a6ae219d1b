"""The patch of a run's folder where it is the one that is wanted, else a new one with settings that suit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fmn_nb.concepts import Concept
from fmn_nb.forgetting import forget
from fmn_nb.models import denoiser, fingerprint
from fmn_nb.patches import Patch

LARGE = 10**8  # parameters of a denoiser; the emoji model's has 4 million, Stable Diffusion 1.5's 860
_SUITED = {  # a start, not a result: they were never tuned on a large model
    "balanced": {"learning_rate": 1e-4, "retain_batch": 2, "retain_count": 16, "gradient_checkpointing": True},
    "paper": {"train": "cross_attention", "gradient_checkpointing": True},
}


def suited(pipe: DiffusionPipeline, preset: str) -> dict[str, Any]:
    """Settings to override for a large model, none for a small one.

    The presets' numbers were found on the emoji model. A large model wants a smaller learning rate and less memory:
    gradient checkpointing, fewer retain images; for "paper" the published option that trains cross-attention alone.
    """
    size = sum(parameter.numel() for parameter in denoiser(pipe).parameters())
    return dict(_SUITED.get(preset, {})) if size > LARGE else {}


def saved_patch(
    pipe: DiffusionPipeline, concept: Concept, folder: str | Path, seed: int, **made: Any
) -> Patch | None:
    """The patch in `folder`/patch if it forgets just this concept, with this seed, on this very model.

    Args:
        made: what its `info` must say besides, preset="balanced" or settings={...}.
    """
    saved = Path(folder) / "patch"
    if not (saved / "fmn.json").is_file():
        return None
    found = Patch.load(saved)
    wanted = {**made, "seed": seed}
    fits = (all(found.info.get(name) == value for name, value in wanted.items())
            and [one["name"] for one in found.info["concepts"]] == [concept.name]
            and found.info["base"]["fingerprint"] == fingerprint(pipe))
    return found if fits else None


def patch_for(pipe: DiffusionPipeline, concept: Concept, folder: str | Path, preset: str, seed: int) -> Patch:
    """The run's own patch (`saved_patch`) if it was made with this preset, else a new one, which is not saved.

    A patch made with other steps or another rate counts too: the run that left it asked for them.
    """
    found = saved_patch(pipe, concept, folder, seed, preset=preset)
    return found or forget(pipe, concept, preset=preset, seed=seed, **suited(pipe, preset))
