"""The arguments of `forget`, checked before anything is drawn or trained: each check says in one line what is wrong."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from fmn_nb.attention import text_layers
from fmn_nb.concepts import Concept, Vocabulary, find_phrase, forms_of, world_of
from fmn_nb.forgetting.settings import FACTS, Settings, SettingsError
from fmn_nb.forgetting.weights import check_no_adapters, trained_layers
from fmn_nb.models import ReferenceImageError, denoiser, text_encoders, tokenizers
from fmn_nb.patches.least_squares import POOLED, text_inputs

if TYPE_CHECKING:
    from fmn_nb.forgetting.data import Task


def concepts_of(given: Any) -> tuple[Concept, ...]:
    """The concepts, each given as a `Concept` or, for an object, by its name.

    Raises:
        ValueError: there is none, one occurs twice, or something is neither a concept nor a name.
    """
    several = [given] if isinstance(given, Concept | str) else given
    if not isinstance(several, Iterable) or isinstance(several, bytes):
        raise ValueError(f"concepts are a Concept, a name or a list of these, not {given!r}")
    named = tuple(Concept(one) if isinstance(one, str) else one for one in several)
    wrong = [one for one in named if not isinstance(one, Concept)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not a concept: give a name, or Concept(name, kind=...)")
    names = [concept.name for concept in named]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"forget needs at least one concept and each once, not {names}")
    return named


def checked_texts(name: str, given: Any) -> list[str] | None:
    """Prompts as a list; None stays None. A ValueError if it is a single text, empty, or holds anything but texts."""
    if given is None:
        return None
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ValueError(f"{name} are a list of texts, not {given!r}: put it in brackets")
    texts = list(given)
    wrong = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if wrong or not texts:
        raise ValueError(f"{name} are texts with words in them, not {wrong[0] if wrong else texts!r}")
    return texts


def check_reading(concept: Concept, reading: Any, what: str = "towards") -> None:
    """Raise a ValueError unless `reading` is a text that says something else than the concept."""
    if not isinstance(reading, str) or not reading.strip():
        raise ValueError(f"{what} is the name of a reading, a text such as 'computer mouse', not {reading!r}")
    if reading.strip().casefold() in {form.casefold() for word in (concept.name, concept.phrase)
                                      for form in forms_of(word)}:
        raise ValueError(f"{what}={reading!r} is the concept {concept.name!r} itself: name what to show instead")


def folder_of(name: str, given: Any) -> Path | None:
    """A folder to write to, or None. A SettingsError if it isn't a folder and can't become one."""
    if given is None or given == "":
        return None
    if not isinstance(given, str | os.PathLike):
        raise SettingsError(f"{name} is a folder, not {given!r}")
    folder = Path(given)
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise SettingsError(f"{name} is a folder, and {there} is a file: name another place")
    return folder


def check_known(pipe: DiffusionPipeline, concepts: Sequence[Concept]) -> None:
    """Raise an UnknownConceptError for a name that the models of the pipeline's world never learned.

    A token that was added to the tokenizer later (a learned one) counts as known.
    """
    world = world_of(pipe)
    if world is None:
        return
    added = {token for tokenizer in tokenizers(pipe) for token in tokenizer.get_added_vocab()}
    for concept in concepts:
        if not any(find_phrase(concept.phrase, token) for token in added):
            world.vocabulary.check(in_its_words(world.vocabulary, concept))


def in_its_words(vocabulary: Vocabulary, concept: Concept) -> Concept:
    """The concept under the vocabulary's own name if its name or phrase is one in other letters ("Cat")."""
    known = {name.casefold(): name for name in vocabulary.concepts()}
    names = [known[said.casefold()] for said in (concept.name, concept.phrase) if said.casefold() in known]
    return replace(concept, name=names[0]) if names else concept


def check_closed_form(pipe: DiffusionPipeline, settings: Settings) -> None:
    """Raise an UnsupportedPipelineError or SettingsError if no weights that see the text can be solved for; warn of
    what a closed form can't reach."""
    reached = {one.argument for one in text_inputs(pipe, settings.projections)}
    check_no_adapters(denoiser(pipe))
    if len(text_encoders(pipe)) > 1 and POOLED not in reached:
        warnings.warn(f"a pooled text embedding reaches the denoiser of {type(pipe).__name__} beside the columns, and "
                      f"'{settings.method}' can't close it: something of the concept may stay", stacklevel=3)


def check_sources(task: Task) -> None:
    """Warn if reference images were given to a method that learns from none; raise a SettingsError for masks then, and
    a ReferenceImageError for one of another shape than its image."""
    settings = task.settings
    if task.masks is not None and not (FACTS[settings.method].trains and settings.noise_on in ("images", "zeros")):
        raise SettingsError(f"masks belong to reference images, and '{settings.method}' learns from none here: "
                            "leave masks out")
    images = [image for found in task.references.values() for image in found]
    for image, mask in zip(images, task.masks or (), strict=False):
        if abs(image.width / image.height - mask.width / mask.height) > 0.02 * image.width / image.height:
            raise ReferenceImageError(f"a mask of {mask.width} x {mask.height} pixels doesn't fit its image of "
                                      f"{image.width} x {image.height}: make it of the same shape")
    if task.references and not settings.learns_from_references:
        warnings.warn(f"'{settings.method}' learns from no reference images here, so those given are not used",
                      stacklevel=3)


def check_layers(pipe: DiffusionPipeline, settings: Settings) -> None:
    """Raise a SettingsError if the method runs the layers that look at the text by themselves and one of them can't."""
    odd = [name for name, rule in text_layers(denoiser(pipe)).items() if rule.extra or rule.packed]
    if settings.method == "redirect" and odd:
        raise SettingsError(f"method 'redirect' runs the layers that look at the text by themselves, and {odd[0]} of "
                            f"this {type(denoiser(pipe)).__name__} has more in its sequence than text and image: take "
                            "another method, such as preset='balanced'")


def check_rank(pipe: DiffusionPipeline, settings: Settings) -> None:
    """Raise a SettingsError if a LoRA's rank is more than the narrowest trained layer's number of channels."""
    if settings.train != "lora":
        return
    model = denoiser(pipe)
    widths = [min(model.get_submodule(name).weight.shape) for name in trained_layers(model, settings)]
    if widths and settings.rank > min(widths):
        raise SettingsError(f"rank={settings.rank} is more than the narrowest trained layer's {min(widths)} channels: "
                            f"choose a rank from 1 to {min(widths)}")
