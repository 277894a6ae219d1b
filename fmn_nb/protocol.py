"""The evaluation protocol: which prompts are drawn, and what each image must show to count.

UnlearnCanvas's protocol (Zhang et al., arXiv 2402.11846) over every object x style prompt of the emoji world.
A *drawing* is one image to be made: a prompt, a seed, and its role. The forget set's drawings name the concept; the
retain set's don't. Seeds depend on the prompt and the repetition alone, so neither batch size nor order nor a
resumed evaluation changes an image, and before and after share their noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fmn_nb.concepts import Concept
from fmn_nb.emoji.captions import OPENINGS, caption
from fmn_nb.emoji.world import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES, concept_names

Size = Literal["quick", "full"]
REPEATS = {"quick": 1, "full": 5}
QUICK_FORGET_SET = 24  # images, whatever the kind of concept
QUICK_STRIDE = 3  # quick draws every third object x style combination of the retain set, all styles equally often


class UnknownConceptError(ValueError):
    """The concept is not one of the emoji world's; the text lists those."""


@dataclass(frozen=True)
class Drawing:
    """One image to draw and judge.

    `label` and `style` are what the prompt asks for; `answers` are the labels or styles that show the concept itself
    (forget set) or that count as right within the concept's own domain (retain set).
    """

    prompt: str
    seed: int
    role: Literal["forget", "retain"]
    label: str | None
    style: str | None
    domain: Literal["object", "style", "identity"]


def drawings(concept: Concept, seed: int = 0, size: Size = "quick") -> list[Drawing]:
    """The forget set's drawings, then the retain set's.

    Objects: the object in every style against every other object in every style. Styles: the other way round.
    Identities: the name alone, against the other names and the objects, its own class among them.

    Raises:
        ValueError: an unknown size.
        UnknownConceptError: the emoji world has no such concept of this kind.
    """
    if size not in REPEATS:
        raise ValueError(f"{size!r} is no size of evaluation; choose quick or full")
    check_concept(concept)
    forget, retain = _forget_set(concept), _retain_set(concept, size)
    repeats = REPEATS["full"] if size == "full" else QUICK_FORGET_SET // len(forget)
    return _repeat(forget, repeats, seed) + _repeat(retain, REPEATS[size], seed)


def check_concept(concept: Concept) -> None:
    """Raise UnknownConceptError unless the emoji world holds this concept as this kind."""
    holds = {"object": {*OBJECTS, *AMBIGUOUS, *(r.phrase for pair in AMBIGUOUS.values() for r in pair)},
             "style": set(STYLES), "identity": set(IDENTITIES)}[concept.kind]
    if concept.name not in holds:
        known = ", ".join(sorted(holds))
        elsewhere = " (it holds that name as another kind)" if concept.name in concept_names() else ""
        raise UnknownConceptError(
            f"the emoji world has no {concept.kind} {concept.name!r}{elsewhere}; its {concept.kind}s: {known}")


def target_label(concept: Concept) -> str:
    """What the judge calls the concept: its name, or an ambiguous word's dominant reading."""
    return AMBIGUOUS[concept.name][0].phrase if concept.name in AMBIGUOUS else concept.name


def _forget_set(concept: Concept) -> list[Drawing]:
    if concept.kind == "style":
        return [_draw(o, concept.name, "forget", "style") for o in OBJECTS]
    if concept.kind == "identity":
        return [Drawing(opening.format(concept.name), 0, "forget", concept.name, None, "identity")
                for opening in OPENINGS[:4]]
    return [_draw(concept.name, s, "forget", "object", target_label(concept)) for s in STYLES]


def _retain_set(concept: Concept, size: Size) -> list[Drawing]:
    stride = QUICK_STRIDE if size == "quick" else 1
    objects = [_draw(name, style, "retain", "style" if concept.kind == "style" else "object")
               for i, name in enumerate(OBJECTS) for j, style in enumerate(STYLES)
               if concept.name not in (name, style) and (i + j) % stride == 0]
    if concept.kind != "identity":
        return objects
    names = [Drawing(opening.format(name), 0, "retain", name, None, "identity")
             for name in IDENTITIES if name != concept.name for opening in OPENINGS[:4]]
    return names + objects


def _draw(name: str, style: str, role: str, domain: str, label: str | None = None) -> Drawing:
    return Drawing(caption([name], style), 0, role, label or name, style, domain)


def _repeat(wanted: Sequence[Drawing], repeats: int, seed: int) -> list[Drawing]:
    return [Drawing(d.prompt, image_seed(d.prompt, seed, k), d.role, d.label, d.style, d.domain)
            for d in wanted for k in range(repeats)]


def image_seed(prompt: str, seed: int, repetition: int) -> int:
    """The seed of one image, from its prompt, the evaluation's seed and which repetition it is; below 2**53."""
    digest = hashlib.sha256(f"{seed}|{repetition}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
