"""Around `forget`: settings that suit the model, a run's own patch if there is one, patches of several concepts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fmn_nb.concepts import Concept, same_name
from fmn_nb.forgetting.finetune import forget, joined
from fmn_nb.forgetting.prompts import another_like, forget_prompts, retain_prompts
from fmn_nb.forgetting.settings import Settings, settings_for
from fmn_nb.models import denoiser, fingerprint
from fmn_nb.patches import Patch, applied_patches, fuse

LARGE = 10**8  # parameters of a denoiser; the emoji model's has 4 million, Stable Diffusion 1.5's 860
_SUITED = {  # a start, not a result: they were never tuned on a large model
    "balanced": {"learning_rate": 1e-4, "retain_batch": 2, "retain_count": 16, "gradient_checkpointing": True},
    "paper": {"train": "cross_attention", "gradient_checkpointing": True},
    "adversarial": {"learning_rate": 1e-4, "batch_size": 2, "retain_batch": 2, "retain_count": 16,
                    "gradient_checkpointing": True},
    "resteer": {"learning_rate": 1e-4, "retain_batch": 2, "retain_count": 16, "gradient_checkpointing": True},
    # The others' published rates; fewer images than theirs.
    "esd-x": {"learning_rate": 1e-5, "reference_count": 8, "batch_size": 1, "gradient_checkpointing": True},
    "esd-u": {"learning_rate": 1e-5, "reference_count": 8, "batch_size": 1, "gradient_checkpointing": True},
    "robust": {"train": "except_cross_attention", "learning_rate": 1e-5, "reference_count": 8, "batch_size": 1,
               "retain_batch": 2, "retain_count": 16, "gradient_checkpointing": True},
    "joint": {"learning_rate": 1e-4, "reference_count": 8, "batch_size": 1, "retain_batch": 2, "retain_count": 16,
              "gradient_checkpointing": True},
    "ca": {"learning_rate": 1.6e-5, "reference_count": 16, "batch_size": 4, "gradient_checkpointing": True},
    "mace": {"learning_rate": 1e-5, "gradient_checkpointing": True},
}


def suited(pipe: DiffusionPipeline, preset: str) -> dict[str, Any]:
    """Settings to override for a large model, none for a small one.

    The presets' numbers were found on the emoji model. A large model wants a smaller learning rate and less memory:
    gradient checkpointing, fewer retain images; for "paper", the published option that trains only cross-attention.
    """
    size = sum(parameter.numel() for parameter in denoiser(pipe).parameters())
    return dict(_SUITED.get(preset, {})) if size > LARGE else {}


def saved_patch(pipe: DiffusionPipeline, concept: Concept, folder: str | Path, seed: int, **made: Any) -> Patch | None:
    """The patch in `folder`/patch if it forgets only this concept (and corrects nothing), with this seed, on this very
    model as it is now.

    Args:
        made: what else its `info` must say, preset="balanced" or settings={...}.
    """
    saved = Path(folder) / "patch"
    if not (saved / "fmn.json").is_file():
        return None
    found = Patch.load(saved)
    fits = (all(found.info.get(name) == value for name, value in {**made, "seed": seed}.items())
            and found.info["concepts"] == [asdict(concept)] and not found.info.get("towards")
            and found.info.get("on_top_of", []) == [one.info.get("concepts", []) for one, _ in applied_patches(pipe)]
            and found.info["base"]["fingerprint"] == fingerprint(pipe))
    return found if fits else None


def patch_for(pipe: DiffusionPipeline, concept: Concept, folder: str | Path, preset: str, seed: int) -> Patch:
    """The run's own patch (`saved_patch`) if it was made with this preset; otherwise a new one, which is not saved.

    A patch made with other steps or another rate counts, too: its run asked for them.
    """
    return saved_patch(pipe, concept, folder, seed, preset=preset) or forget(
        pipe, concept, preset=preset, seed=seed, **suited(pipe, preset))


WAYS = ("one after another", "apart", "all at once", "fused")


def forget_several(pipe: DiffusionPipeline, concepts: Sequence[Concept], way: str = "one after another", *,
                   preset: str | Settings = "balanced", seed: int = 0, patches: Sequence[Patch] = (),
                   **overrides: Any) -> list[Patch]:
    """Patches that together forget the concepts; `pipe` stays as it is.

    Args:
        way: "one after another" trains each patch on the model that carries the earlier ones; "apart" trains each on
            the base model (`combine` adds them up); "all at once" trains a single patch; "fused" trains them apart and
            makes one patch of them (`fmn_nb.patches.fuse`): as far as one change of keys and values can, it does on
            each patch's prompts what that patch does alone, and nothing on others.
        patches: patches of the first concepts, if there are any yet; the rest is made. The first patch is the same one
            after another and apart.
        overrides: single settings of the fine-tune.

    Returns:
        One patch for each concept in their order, or a single one for "all at once" and "fused".

    Raises:
        ValueError: an unknown way, no concepts, or a concept that occurs twice.
    """
    names = [concept.name for concept in concepts]
    if way not in WAYS or not names or len(set(names)) != len(names):
        raise ValueError(f"give each concept once and a way of {', '.join(WAYS)}, not {names} and {way!r}")
    if way == "all at once":
        return list(patches[:1]) or [forget(pipe, list(concepts), preset=preset, seed=seed, **overrides)]
    made = list(patches[:len(concepts)])
    settings = settings_for(preset, {name: one for name, one in overrides.items() if name in Settings.model_fields})
    with ExitStack() as carried:
        for number, concept in enumerate(concepts):
            if number >= len(made):
                guided = _guide_apart(pipe, concept, concepts, settings)
                made.append(forget(pipe, concept, preset=preset, seed=seed, **{**overrides, **guided}))
            if way == "one after another":
                carried.enter_context(made[number].applied(pipe))
    return [_fused(pipe, concepts, made)] if way == "fused" else made


def _guide_apart(pipe: DiffusionPipeline, concept: Concept, concepts: Sequence[Concept], settings: Settings,
                 ) -> dict[str, str]:
    """The setting `guide` where "another" would name one of the other concepts, which then would be drawn."""
    others = [one for one in concepts if one.name != concept.name]
    if settings.guide != "another":
        return {}
    usual = another_like(pipe, concept)
    if not any(same_name(usual, one) for one in others):
        return {}
    return {"guide": another_like(pipe, concept, others)}


def _fused(pipe: DiffusionPipeline, concepts: Sequence[Concept], made: Sequence[Patch]) -> Patch:
    """One patch of those made apart, on prompts in their wording; it keeps the world's retain prompts, or neutral ones.
    """
    kept = [*retain_prompts(pipe, concepts, None), ""]
    wording = made[-1].info["settings"]["wording"]
    fused = fuse(pipe, made, [forget_prompts(pipe, concept, wording) for concept in concepts], kept)
    report = joined([patch.info["forgetting"] for patch in made]) | {"patch_bytes": fused.nbytes}
    return replace(fused, info={**made[-1].info, **fused.info, "forgetting": report})
