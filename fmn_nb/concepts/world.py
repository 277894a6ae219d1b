"""Which world does a model belong to? A *world* is what is known beyond a model: names, prompts, a judge, real images.

The package's core knows no world. A model names its own in one line that its training wrote beside the weights (the
denoiser's configuration holds `_world`), so an oracle, a copy in another folder and a second architecture are
recognised like the bundled model. Only `world_of` answers the question; the table `WORLDS` says where a world's code
is, which is imported only for a model of that world.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fmn_nb.concepts.concept import KINDS, Concept
from fmn_nb.concepts.tokens import find_phrase
from fmn_nb.files import GROUNDED, base_folder, data_dir, read_json

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline
    from PIL import Image

NOTHING = "nothing"  # a judge's label for an image that shows none of its names
WORLD_KEY = "_world"  # in the configuration of a denoiser
UNTAUGHT_KEY = "_untaught"  # in the same place, for an oracle
_DENOISERS = ("unet", "transformer")


class NotThereError(FileNotFoundError):
    """What a figure needs isn't there; the message is the reason given under "skipped"."""


class UnknownConceptError(ValueError):
    """The concept is not one of the world's; the message lists these."""


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one image; `label` is "nothing" if no probability exceeds one half."""

    label: str
    style: str
    seen: frozenset[str]
    probability: float  # of the most probable label


class JudgeLike(Protocol):
    """Whatever tells what images show, such as the bundled judges and a zero-shot CLIP."""

    def verdicts(self, images: Sequence[Image.Image] | np.ndarray) -> list[Verdict]: ...


@dataclass(frozen=True)
class Vocabulary:
    """The names that a model is asked for.

    Attributes:
        objects, styles, names: the names of objects, styles and identities.
        openings: templates of prompts for one thing, the plain one first.
        world: the world whose models know only these names, so that another concept is an error; "" for an open
            vocabulary.
        classes: proper name -> the object that it is one of, if known.
        readings: ambiguous word -> what the judge calls its dominant and its overshadowed reading.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    names: tuple[str, ...]
    openings: tuple[str, ...]
    world: str = ""
    classes: Mapping[str, str] = field(default_factory=dict)
    readings: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def others(self, concept: Concept) -> Vocabulary:
        """The vocabulary without the names that contain the concept or are contained in it ("cats" and "a cat")."""
        kept = {kind: tuple(name for name in self.of(kind) if not same_name(name, concept)) for kind in KINDS}
        return replace(self, objects=kept["object"], styles=kept["style"], names=kept["identity"])

    def of(self, kind: str) -> tuple[str, ...]:
        """All names of one kind."""
        return {"object": self.objects, "style": self.styles, "identity": self.names}[kind]

    def target_label(self, concept: Concept) -> str:
        """What the judge calls the concept: its name, or an ambiguous word's dominant reading."""
        return self.readings[concept.name][0] if concept.name in self.readings else concept.name

    def concepts(self) -> dict[str, str]:
        """Name -> kind of everything that can be forgotten: objects, styles, names, ambiguous words, their readings."""
        words = (*self.readings, *(reading for pair in self.readings.values() for reading in pair))
        return {name: kind for kind in KINDS for name in self.of(kind)} | dict.fromkeys(words, "object")

    def check(self, concept: Concept) -> None:
        """Raise UnknownConceptError unless the vocabulary is open or holds this concept as this kind."""
        known = self.concepts()
        if self.world and known.get(concept.name) != concept.kind:
            elsewhere = " (it holds that name as another kind)" if concept.name in known else ""
            there = ", ".join(sorted(name for name, kind in known.items() if kind == concept.kind))
            close = difflib.get_close_matches(concept.name.casefold(), list(known), 1)
            hint = f" (did you mean {close[0]!r}?)" if close and not elsewhere else ""
            raise UnknownConceptError(f"the {self.world} world has no {concept.kind} {concept.name!r}{elsewhere}{hint}"
                                      f"; its {concept.kind}s: {there}")


def same_name(name: str, concept: Concept) -> bool:
    """Whether a vocabulary's name means the concept: one contains the other as whole words, with or without an s."""
    names = {concept.name, concept.phrase}
    return any(find_phrase(long, short) for one in names for other in (name, name + "s", name.removesuffix("s"))
               for long, short in ((one, other), (other, one)))


@runtime_checkable
class World(Protocol):
    """What is known beyond a model. Asking for what isn't there raises NotThereError.

    Attributes:
        vocabulary: the names to ask for.
        scorer: a CLIP as a measure (`fmn_nb.evaluation.Clip`).
        features: the features to measure distances to real images on (`fmn_nb.evaluation.quality.Features`).
    """

    vocabulary: Vocabulary
    scorer: Any
    features: Any

    def judge_for(self, concept: Concept) -> JudgeLike:
        """A judge that knows the concept."""

    def real_set(self, concept: Concept) -> Sequence[Image.Image] | np.ndarray:
        """Real images of everything but the concept, to measure distances to."""

    def examples(self, name: str, kind: str) -> Sequence[Image.Image] | np.ndarray:
        """Real images of one name."""

    def masked_scenes(self, concept: Concept, count: int) -> tuple[Sequence[Image.Image] | np.ndarray, ...]:
        """`count` real images of the concept, and for each a picture that is white where the concept is."""

    def real_images(self, wanted: Sequence[Any]) -> Sequence[Image.Image] | np.ndarray:
        """One real image for each evaluation prompt."""

    def forget_prompts(self, concept: Concept) -> list[str]:
        """Prompts that name the concept in every way in which the world's models learned it, the plainest first."""

    def retain_prompts(self) -> list[str]:
        """Prompts for everything that the world's models know."""


#: name of a world -> where its vocabulary (light to import) and its class are
WORLDS: dict[str, tuple[str, str]] = {
    "emoji": ("fmn_nb.emoji.world:VOCABULARY", "fmn_nb.emoji.organism:EmojiWorld"),
}


def world_of(pipe: DiffusionPipeline) -> World | None:
    """The world that the pipeline's model names as its own; None if it names none. Loaded once per process."""
    parts = (getattr(pipe, name, None) for name in _DENOISERS)
    said = next((config.get(WORLD_KEY) for part in parts if (config := getattr(part, "config", None))), None)
    return _world(said, data_dir()) if said in WORLDS else None


def untaught_of(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The names that an oracle never learned, as noted beside its weights; () for a model without such a note."""
    configs = (getattr(getattr(pipe, name, None), "config", None) for name in _DENOISERS)
    return tuple(next((config[UNTAUGHT_KEY] for config in configs if config and UNTAUGHT_KEY in config), ()))


def neutral_prompts() -> list[str]:
    """Ordinary prompts for many things (`data/prompts/neutral.txt`): what a model of no known world should keep."""
    lines = (data_dir() / "prompts" / "neutral.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def vocabulary_of(folder: Path) -> Vocabulary | None:
    """The vocabulary of the world that the model in a diffusers folder belongs to, without loading the model."""
    if (folder / GROUNDED).is_file():  # only gated layers: the pipeline beside them names the world
        with suppress(FileNotFoundError):
            folder = base_folder(folder)
    for name in _DENOISERS:
        config = folder / name / "config.json"
        if config.is_file():
            said = read_json(config).get(WORLD_KEY)
            return _named(WORLDS[said][0]) if said in WORLDS else None
    return None


@cache
def _world(name: str, data: Path) -> World:
    return _named(WORLDS[name][1])(data)


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
