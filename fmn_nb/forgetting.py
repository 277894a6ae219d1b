"""Forget-Me-Not: make a text-to-image model forget a concept by re-steering its attention away from it.

    patch = forget(pipe, Concept("cat"), preset="balanced", seed=0)         # pipe itself stays as it is

Each step noises reference images of the concept to random timesteps, runs the denoiser on prompts that name it, and
moves the trained weights so that the concept's text columns get less attention (Zhang, Wang, Xu, Wang, Shi,
arXiv 2303.17591). An anchor can pull the prediction to what it would be without the concept, and a retain term holds
the rest in place: on other prompts the model is to predict what it did before.
Settings and presets are in `forgetting_settings`, the losses in `forgetting_loss`, the data in `forgetting_sets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from diffusers import DiffusionPipeline

from fmn_nb.concepts import Concept
from fmn_nb.denoising import seeded
from fmn_nb.forgetting_checkpoint import Checkpoint, CheckpointError
from fmn_nb.forgetting_device import precision_for
from fmn_nb.forgetting_identity import identity
from fmn_nb.forgetting_offload import Absent, offloaded
from fmn_nb.forgetting_sets import TrainingSet, forget_set, retain_set, towards_set
from fmn_nb.forgetting_settings import PRESETS, Settings, SettingsError, settings_for
from fmn_nb.forgetting_steps import Callback, Finetune, ForgettingError, Progress
from fmn_nb.forgetting_stops import periodic_judge
from fmn_nb.forgetting_weights import trainable
from fmn_nb.models import denoiser, denoiser_name, fingerprint
from fmn_nb.patches import Patch, applied_patches
from fmn_nb.references import Images, Latents, load_all, load_images
from fmn_nb.results import versions

__all__ = [
    "PRESETS", "CheckpointError", "ForgettingError", "Progress", "Settings", "SettingsError", "forget",
    "periodic_judge", "settings_for",
]


def forget(
    pipe: DiffusionPipeline,
    concepts: Concept | str | Sequence[Concept | str],
    *,
    references: Images | Mapping[str, Images] | None = None,
    preset: str | Settings = "balanced",
    seed: int = 0,
    callback: Callback | None = None,
    checkpoint: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    retain_prompts: Sequence[str] | None = None,
    towards: str | Mapping[str, str] | None = None,
    masks: Images | None = None,
    cache: str | Path | None = None,
    **overrides: Any,
) -> Patch:
    """Fine-tune until the concept gets no more attention; the result is a patch, the pipeline stays as it is.

    Under `accelerate launch` every process calls this alike, its pipeline on its own device; all get the same patch.
    A progress bar shows only where the error stream is a terminal: in a notebook a `callback` tells the progress, and
    the lists in the patch's `info["forgetting"]` are the curves afterwards.

    Args:
        pipe: a diffusers pipeline; its weights, modes and scheduler are the same afterwards, bit for bit, also
            when this raises.
        concepts: one or several, as `Concept` or, for objects, by name.
        references: reference images: a folder, a list of files or PIL images; for several concepts a mapping from
            a concept's name to them. Concepts without any get images that the model generates.
        preset: a name in `PRESETS`, or settings of your own.
        seed: of everything random; the same seed gives the same patch on the same machine.
        callback: called after each step with a `Progress`; while it runs, `pipe` is as trained so far. A text that
            it returns ends the fine-tune for that reason (`periodic_judge` makes one that asks a judge).
        checkpoint: a folder to save the state to. A run that finds its own state there goes on from it and ends in
            the same patch as one that never stopped. Its own: the same settings, images, prompts, weights and tokens.
        prompts: prompts to learn from instead of the preset's; each must hold the (single) concept's phrase.
        retain_prompts: prompts whose images are to stay as they are; those that name a concept are left out. By
            default the bundled model's world, or `data/prompts/neutral.txt`.
        towards: correction of an ambiguous word: the name of the reading that is to show instead, "computer mouse"
            for the concept "mouse"; for several concepts a mapping from names to readings. It acts through
            `anchor_weight` and `towards_weight`: without either (as in "paper") the concept is merely forgotten.
        masks: one picture for each reference image, white where the concept is: attention counts only there.
        cache: a folder that keeps the images that the model draws for this (as latents), so that a fine-tune with
            the same ones doesn't draw them again. Several processes can share it; the patch is the same with and
            without. An image takes 4 bytes a latent value: 8 KB for the emoji model, 64 KB for 512 x 512 pixels of
            Stable Diffusion.
        overrides: single settings, see `Settings`.

    Returns:
        A patch; `patch.info["forgetting"]` holds steps, seconds, loss_first, loss_last, stopped_because,
        trainable_parameters, patch_bytes, peak_memory_bytes, and of every step losses, masses (concept's share of
        attention) and the other terms.

    Raises:
        SettingsError, PhraseNotFoundError, ReferenceImageError, CheckpointError: before anything is trained.
        ForgettingError: the loss became NaN or infinite, or nothing can be trained.
    """
    started = perf_counter()
    settings, concepts = settings_for(preset, overrides), _concepts(concepts)
    wanted = _by_concept(references, concepts, "references")
    readings = _by_concept(towards, concepts, "towards")
    _check(concepts, prompts, seed)
    first = next(denoiser(pipe).parameters())
    precision_for(settings, first.device, first.dtype)  # told before anything is generated
    base = {"name": str(pipe.config.get("_name_or_path", "") or type(pipe).__name__),
            "component": denoiser_name(pipe), "fingerprint": fingerprint(pipe)}
    info = {"concepts": [asdict(concept) for concept in concepts], "preset": _name_of(preset), "seed": seed,
            "settings": settings.to_dict(), "towards": readings, "base": base, "versions": versions()}
    if applied_patches(pipe):
        info["on_top_of"] = [patch.info.get("concepts", []) for patch, _ in applied_patches(pipe)]
    images = load_all(wanted)  # once and first: what can't be read is told before anything is generated
    regions = None if masks is None else load_images(masks)
    saved = (Checkpoint(checkpoint, identity(pipe, info, images, regions, prompts, retain_prompts))
             if checkpoint else None)
    sets = _sets(pipe, concepts, images, prompts, regions, retain_prompts, readings, settings, seed, saved, cache)
    with ExitStack() as borrowed:
        absent = borrowed.enter_context(offloaded(pipe, settings.offload))
        weights = borrowed.enter_context(trainable(denoiser(pipe), settings, seeded(seed, 3)))
        run = Finetune(pipe, weights, sets, settings, seed, info, saved, started)
        run.train(callback and _with_all_parts(callback, absent))
        return run.patch()


def _sets(
    pipe: DiffusionPipeline, concepts: list[Concept], images: Mapping[str, Images],
    prompts: Sequence[str] | None, masks: Images | None, kept_prompts: Sequence[str] | None,
    readings: Mapping[str, str], settings: Settings, seed: int, saved: Checkpoint | None, cache: str | Path | None,
) -> dict[str, TrainingSet]:
    """The forget set and, where asked for, the retain set and the set of the reading to show instead."""
    cached = saved.latents() if saved else {}
    known = {name: Latents(cached[f"{name}.mean"], cached[f"{name}.std"])
             for name in ("forget", "retain", "towards") if f"{name}.mean" in cached}
    sets = {"forget": forget_set(pipe, concepts, images, prompts, masks, settings, seed, known.get("forget"),
                                readings, cache)}
    if settings.retain_weight:
        sets["retain"] = retain_set(
            pipe, concepts, kept_prompts, readings.values(), sets["forget"], settings, seed, known.get("retain"),
            cache)
    if readings and settings.towards_weight:
        sets["towards"] = towards_set(
            pipe, concepts, readings, prompts, settings, seed, known.get("towards"), cache)
    if saved and not cached:
        saved.keep_latents({f"{name}.{part}": getattr(found.latents, part).clone()
                            for name, found in sets.items() for part in ("mean", "std")})
    return sets


def _with_all_parts(callback: Callback, absent: Absent) -> Callback:
    """The callback, called while the pipeline is complete."""

    def called(progress: Progress) -> str | None:
        with absent.present():
            return callback(progress)

    return called


def _concepts(given: Concept | str | Sequence[Concept | str]) -> list[Concept]:
    several = [given] if isinstance(given, (Concept, str)) else list(given)
    concepts = [Concept(item) if isinstance(item, str) else item for item in several]
    names = [concept.name for concept in concepts]
    if not concepts or len(set(names)) != len(names):
        raise ValueError(f"forget needs at least one concept and each once, not {names}")
    return concepts


def _by_concept(given: Any, concepts: Sequence[Concept], what: str) -> dict[str, Any]:
    """Concept name -> what was given for it."""
    if given is None:
        return {}
    names = [concept.name for concept in concepts]
    if not isinstance(given, Mapping):
        if len(names) > 1:
            raise ValueError(f"{what} for several concepts need a mapping from name to {what}: {', '.join(names)}")
        return {names[0]: given}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{what} name '{unknown[0]}', which is no concept to forget; those are {', '.join(names)}")
    return dict(given)


def _check(concepts: Sequence[Concept], prompts: Sequence[str] | None, seed: int) -> None:
    if prompts is not None and (len(concepts) > 1 or not prompts or isinstance(prompts, str)):
        raise ValueError("prompts are a list of texts for a single concept")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"a seed is a whole number from 0 to 2**63 - 1, not {seed!r}")


def _name_of(preset: str | Settings) -> str:
    return preset if isinstance(preset, str) else "own settings"
