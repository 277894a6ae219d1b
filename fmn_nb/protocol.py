"""The evaluation protocol: which prompts are drawn, and what each image must show to count.

UnlearnCanvas's protocol (Zhang et al., arXiv 2402.11846) over every object x style prompt of a vocabulary: the emoji
world's, or a list of names for another model. A *drawing* is one image to be made: a prompt, a seed, and its role. The
forget set's drawings name the concept; the retain set's don't. Seeds depend on the prompt and the repetition alone, so
neither order nor a resumed evaluation changes an image, and before and after share their noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from fmn_nb.concepts import Concept, find_phrase, with_article
from fmn_nb.emoji.captions import OPENINGS
from fmn_nb.emoji.world import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES, concept_names

Size = Literal["quick", "full"]
Role = Literal["forget", "retain", "paraphrase", "pair", "class", "member", "reading"]
REPEATS = {"quick": 1, "full": 3}
FORGET_SET = {"quick": 24, "full": 48}  # at least so many images, whatever the kind of concept
QUICK_RETAIN_SET = 48  # about so many object x style combinations, all names and styles equally often
NAME_PROMPTS = 4  # prompts for a proper name, which goes with no style


class UnknownConceptError(ValueError):
    """The concept is not one of the emoji world's; the text lists those."""


@dataclass(frozen=True)
class Drawing:
    """One image to draw and judge.

    `label` and `style` are what the prompt asks for (`label` in the judge's words); `domain` is what the prompt is
    about. `other` are further labels that a prompt of several objects asks for.
    """

    prompt: str
    seed: int
    role: Role
    label: str | None
    style: str | None
    domain: Literal["object", "style", "identity"]
    other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """The names that a model is asked for.

    Attributes:
        objects, styles, names: of objects, styles, and identities beside the concept.
        openings: templates of prompts for one thing, the plain one first.
        closed: whether the model knows these names alone, so that another concept is an error.
        classes: proper name -> the object it is one of, where that is known.
        readings: ambiguous word -> what the judge calls its dominant and its overshadowed reading.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    names: tuple[str, ...]
    openings: tuple[str, ...]
    closed: bool = False
    classes: Mapping[str, str] = field(default_factory=dict)
    readings: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def others(self, concept: Concept) -> Vocabulary:
        """The vocabulary without the names that hold the concept or are held by it ("cats" beside "a cat")."""
        def free(known: Sequence[str]) -> tuple[str, ...]:
            return tuple(name for name in known if not same_name(name, concept))

        kept = {f"{kind}s" if kind != "identity" else "names": free(self.of(kind))
                for kind in ("object", "style", "identity")}
        return replace(self, **kept)

    def of(self, kind: str) -> tuple[str, ...]:
        """All names of one kind."""
        return {"object": self.objects, "style": self.styles, "identity": self.names}[kind]

    def target_label(self, concept: Concept) -> str:
        """What the judge calls the concept: its name, or an ambiguous word's dominant reading."""
        return self.readings[concept.name][0] if concept.name in self.readings else concept.name


EMOJI = Vocabulary(
    tuple(OBJECTS), tuple(STYLES), tuple(IDENTITIES), OPENINGS, closed=True,
    classes={name: one.object for name, one in IDENTITIES.items()},
    readings={word: tuple(reading.phrase for reading in pair) for word, pair in AMBIGUOUS.items()},
)


def same_name(name: str, concept: Concept) -> bool:
    """Whether a vocabulary's name speaks of the concept: one holds the other as whole words, with or without an s."""
    names = {concept.name, concept.phrase}
    return any(find_phrase(long, short) for one in names for other in (name, name + "s", name.removesuffix("s"))
               for long, short in ((one, other), (other, one)))


def drawings(concept: Concept, seed: int = 0, size: Size = "quick", vocabulary: Vocabulary = EMOJI) -> list[Drawing]:
    """The forget set's drawings, then the retain set's.

    Objects: the object in every style against every other object in every style. Styles: the other way round.
    Identities: the name alone, against the other names and the objects, its own class among them.

    Raises:
        ValueError: an unknown size.
        UnknownConceptError: the emoji world has no such concept of this kind.
    """
    if size not in REPEATS:
        raise ValueError(f"{size!r} is no size of evaluation; choose quick or full")
    check_concept(concept, vocabulary)
    forget, retain = _forget_set(concept, vocabulary), _retain_set(concept, size, vocabulary)
    repeats = max(REPEATS[size], FORGET_SET[size] // len(forget))
    return repeated(forget, repeats, seed) + repeated(retain, REPEATS[size], seed)


def check_concept(concept: Concept, vocabulary: Vocabulary = EMOJI) -> None:
    """Raise UnknownConceptError unless the vocabulary is open or holds this concept as this kind."""
    readings = {*vocabulary.readings, *(name for pair in vocabulary.readings.values() for name in pair)}
    holds = {*vocabulary.of(concept.kind), *(readings if concept.kind == "object" else ())}
    if vocabulary.closed and concept.name not in holds:
        known = ", ".join(sorted(holds))
        elsewhere = " (it holds that name as another kind)" if concept.name in concept_names() else ""
        raise UnknownConceptError(
            f"the emoji world has no {concept.kind} {concept.name!r}{elsewhere}; its {concept.kind}s: {known}")


def target_label(concept: Concept) -> str:
    """What the emoji world's judge calls the concept: its name, or an ambiguous word's dominant reading."""
    return EMOJI.target_label(concept)


def _forget_set(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    if concept.kind == "style":
        return [draw(o, concept.name, "forget", "style") for o in vocabulary.others(concept).objects]
    if concept.kind == "identity":
        return [name_drawing(concept.name, opening, "forget") for opening in vocabulary.openings[:NAME_PROMPTS]]
    return [draw(concept.name, s, "forget", "object", vocabulary.target_label(concept)) for s in vocabulary.styles]


def _retain_set(concept: Concept, size: Size, vocabulary: Vocabulary) -> list[Drawing]:
    known, left = vocabulary, vocabulary.others(concept)
    stride = max(1, len(known.objects) * len(known.styles) // QUICK_RETAIN_SET) if size == "quick" else 1
    objects = [draw(name, style, "retain", "style" if concept.kind == "style" else "object")
               for i, name in enumerate(known.objects) for j, style in enumerate(known.styles)
               if name in left.objects and style in left.styles and (i + j) % stride == 0]
    if concept.kind != "identity":
        return objects
    return [name_drawing(name, opening, "retain") for name in left.names
            for opening in vocabulary.openings[:NAME_PROMPTS]] + objects


def sentence(things: Sequence[str], style: str | None = None, style_phrase: str = "in the style of {}") -> str:
    """The prompt for some things: "a photo of a cat and a frog in the style of noto"."""
    text = "a photo of " + " and ".join(with_article(thing) for thing in things)
    return f"{text} {style_phrase.format(style)}" if style else text


def draw(name: str, style: str | None, role: Role, domain: str, label: str | None = None) -> Drawing:
    """A drawing of one object, as yet without a seed."""
    return Drawing(sentence([name], style), 0, role, label or name, style, domain)


def name_drawing(name: str, opening: str, role: Role) -> Drawing:
    """A drawing of a proper name, as yet without a seed."""
    return Drawing(opening.format(name), 0, role, name, None, "identity")


def repeated(wanted: Sequence[Drawing], repeats: int, seed: int) -> list[Drawing]:
    """Each drawing `repeats` times, with a seed of its own each time."""
    return [replace(d, seed=image_seed(d.prompt, seed, k)) for d in wanted for k in range(repeats)]


def image_seed(prompt: str, seed: int, repetition: int) -> int:
    """The seed of one image, from its prompt, the evaluation's seed and which repetition it is; below 2**53."""
    digest = hashlib.sha256(f"{seed}|{repetition}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
