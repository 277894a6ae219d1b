"""The evaluation protocol: which prompts are drawn, and what each image must show to count.

UnlearnCanvas's protocol (Zhang et al., arXiv 2402.11846) over every object x style prompt of a vocabulary: the emoji
world's, or a list of names for another model. A *drawing* is one image to be made: a prompt, a seed, and its role. The
forget set's drawings name the concept; the retain set's don't. Seeds depend only on the prompt and the repetition, so
neither order nor a resumed evaluation changes an image, and before and after share their noise.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal

import pandas as pd

from fmn_nb.concepts import Concept, Vocabulary, find_phrase, put_instead, spoken, with_article
from fmn_nb.stats import wilson

Size = Literal["quick", "full"]
Role = Literal["forget", "retain", "paraphrase", "pair", "class", "member", "reading"]
REPEATS = {"quick": 1, "full": 3}
FORGET_SET = {"quick": 24, "full": 48}  # at least this many images, whatever the kind of concept
QUICK_RETAIN_SET = 48  # about this many object x style combinations, all names and styles equally often
OTHER_STYLE_PHRASE = "in {} style"  # how a paraphrase says a style
NAME_PROMPTS = 4  # prompts for a proper name, which goes with no style


@dataclass(frozen=True)
class Drawing:
    """One image to draw and judge.

    `label` and `style` are what the prompt asks for (`label` in the judge's words); `domain` is what the prompt is
    about. `other` holds the other labels that a prompt of several objects asks for.
    """

    prompt: str
    seed: int
    role: Role
    label: str | None
    style: str | None
    domain: Literal["object", "style", "identity"]
    other: tuple[str, ...] = ()


def drawings(concept: Concept, vocabulary: Vocabulary, seed: int = 0, size: Size = "quick") -> list[Drawing]:
    """The forget set's drawings, then the retain set's.

    Objects: the object in every style against every other object in every style. Styles: the other way round.
    Identities: the name alone, against the other names and the objects, its own class among them.

    Raises:
        ValueError: an unknown size, or a style without any object to draw in it.
        UnknownConceptError: the vocabulary is a world's, which has no such concept of this kind.
    """
    if size not in REPEATS:
        raise ValueError(f"{size!r} is not a size of evaluation; choose quick or full")
    vocabulary.check(concept)
    left, openings = vocabulary.others(concept), vocabulary.openings[:NAME_PROMPTS]
    chosen = _some(len(vocabulary.objects), len(vocabulary.styles), QUICK_RETAIN_SET if size == "quick" else None)
    retain = [draw(name, style, "retain", "style" if concept.kind == "style" else "object")
              for i, name in enumerate(vocabulary.objects) for j, style in enumerate(vocabulary.styles)
              if name in left.objects and style in left.styles and (i, j) in chosen]
    if concept.kind == "style":
        if not left.objects:
            raise ValueError(f"the vocabulary has no object to draw in the style {concept.name!r}; add one to its list")
        forget = [draw(name, concept.name, "forget", "style") for name in left.objects]
    elif concept.kind == "identity":
        forget = [name_drawing(concept.name, opening, "forget") for opening in openings]
        retain = [name_drawing(name, opening, "retain") for name in left.names for opening in openings] + retain
    else:
        label = vocabulary.target_label(concept)
        forget = [draw(concept.name, style, "forget", "object", label) for style in vocabulary.styles]
    repeats = max(REPEATS[size], FORGET_SET[size] // len(forget))
    return _worded(repeated(forget, repeats, seed), concept) + repeated(retain, REPEATS[size], seed)


def _worded(wanted: Sequence[Drawing], concept: Concept, longer: Sequence[str] = ()) -> list[Drawing]:
    """The drawings, with what stands for the concept in a prompt (a learned token) in the place of its name; prompts
    stay that hold one of the `longer` names, in which its own is a part ("cricket bat")."""
    words, forms = spoken(concept).name, (with_article(concept.name), concept.name)
    if words == concept.name:
        return list(wanted)
    return [d if any(find_phrase(d.prompt, name) for name in longer) else
            replace(d, prompt=put_instead(d.prompt, forms, words) or d.prompt) for d in wanted]


def _some(objects: int, styles: int, about: int | None) -> set[tuple[int, int]]:
    """About this many of all (object, style), each object and each style about equally often; None: all of them."""
    stride = 1 if about is None else max(1, objects * styles // about)
    every = [(i, j) for i in range(objects) for j in range(styles)]
    if stride <= max(objects, styles):
        return {(i, j) for i, j in every if (i + j) % stride == 0}
    while gcd(stride, styles) > 1:  # or only some styles would ever be chosen
        stride += 1
    return set(every[::stride])


def sentence(things: Sequence[str], style: str | None = None, style_phrase: str = "in the style of {}") -> str:
    """The prompt for some things: "a photo of a cat and a frog in the style of noto"."""
    text = "a photo of " + " and ".join(with_article(thing) for thing in things)
    return f"{text} {style_phrase.format(style)}" if style else text


def draw(name: str, style: str | None, role: Role, domain: str, label: str | None = None) -> Drawing:
    """A drawing of one object, still without a seed."""
    return Drawing(sentence([name], style), 0, role, label or name, style, domain)


def name_drawing(name: str, opening: str, role: Role) -> Drawing:
    """A drawing of a proper name, still without a seed."""
    return Drawing(opening.format(name), 0, role, name, None, "identity")


def repeated(wanted: Sequence[Drawing], repeats: int, seed: int) -> list[Drawing]:
    """Each drawing `repeats` times, with a seed of its own each time."""
    return [replace(d, seed=image_seed(d.prompt, seed, k)) for d in wanted for k in range(repeats)]


def evenly(things: Sequence[Any], count: int) -> list[Any]:
    """`count` of the things, evenly spread over them in order; all of them if there are no more."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def image_seed(prompt: str, seed: int, repetition: int) -> int:
    """The seed of one image, from its prompt, the evaluation's seed and which repetition it is; below 2**53."""
    digest = hashlib.sha256(f"{seed}|{repetition}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


QUICK_PROBES = 24  # images of all probes together
FULL_PROBES = 72


@dataclass(frozen=True)
class Share:
    """A share of images, with its 95% Wilson interval."""

    value: float
    low: float
    high: float
    images: int


def probe_drawings(concept: Concept, vocabulary: Vocabulary, seed: int = 0, size: Size = "quick") -> list[Drawing]:
    """The drawings of all probes for a concept; but for a name's class, no prompt of `drawings` is among them.

    quick: 24 images, full: 72, divided evenly among the groups that the concept's kind has.
    """
    groups = {"object": _object_probes, "style": _style_probes, "identity": _name_probes}[concept.kind]
    groups = [group for group in groups(concept, vocabulary) if group]
    count, wanted = (QUICK_PROBES if size == "quick" else FULL_PROBES) // max(1, len(groups)), []
    for group in groups:
        chosen = evenly(group, count)
        wanted += repeated(chosen, count // len(chosen), seed)
    longer = [name for name in vocabulary.concepts() if name != concept.name and find_phrase(name, concept.name)]
    return _worded(wanted, concept, longer)


def _object_probes(concept: Concept, vocabulary: Vocabulary) -> list[list[Drawing]]:
    """Paraphrases, pairs with another object, names that are one of it, and the reading that should stay."""
    label, styles = vocabulary.target_label(concept), vocabulary.styles
    noun = sentence([concept.name]).removeprefix("a photo of ")
    said = [(opening.format(noun), None) for opening in vocabulary.openings[1:]]
    said += [(sentence([concept.name], style, OTHER_STYLE_PHRASE), style) for style in styles]
    if label != concept.name:  # a word's dominant reading by its own name
        said += [(sentence([label], style), style) for style in styles]
    paraphrases = [Drawing(prompt, 0, "paraphrase", label, style, "object") for prompt, style in said]

    pairs, others = [], vocabulary.others(concept).objects  # each other object, now right of the concept, now left
    for number, other in enumerate([*others, *others]):
        left = (number + number // len(others)) % 2 == 0
        things, style = [concept.name, other] if left else [other, concept.name], styles[number % len(styles)]
        pairs.append(Drawing(sentence(things, style), 0, "pair", label, style, "object", (other,)))
    random.Random("pairs").shuffle(pairs)  # taking every second one must not take one side or style alone

    members = [name_drawing(name, opening, "member") for name, own in vocabulary.classes.items() if own == concept.name
               for opening in vocabulary.openings[:NAME_PROMPTS]]
    stays = next((dominant if concept.name == overshadowed else overshadowed
                  for word, (dominant, overshadowed) in vocabulary.readings.items()
                  if concept.name in (word, dominant, overshadowed)), None)
    readings = [draw(stays, style, "reading", "object") for style in styles] if stays else []
    return [paraphrases, pairs, members, readings]


def _style_probes(concept: Concept, vocabulary: Vocabulary) -> list[list[Drawing]]:
    """Paraphrases, and two objects in the style, which should both stay."""
    objects = vocabulary.others(concept).objects
    paraphrases = [Drawing(sentence([name], concept.name, OTHER_STYLE_PHRASE), 0, "paraphrase", name, concept.name,
                           "style") for name in objects]
    couples = [(one, objects[(number + len(objects) // 2) % len(objects)]) for number, one in enumerate(objects)]
    return [paraphrases, [Drawing(sentence(couple, concept.name), 0, "pair", couple[0], concept.name, "style", couple)
                          for couple in couples if couple[0] != couple[1]]]


def _name_probes(concept: Concept, vocabulary: Vocabulary) -> list[list[Drawing]]:
    """Paraphrases of a proper name, with what it is one of, and that class itself."""
    own = vocabulary.classes.get(concept.name)
    names, asked = [concept.name, *([f"{concept.name} the {own}"] if own else [])], vocabulary.openings[:NAME_PROMPTS]
    paraphrases = [replace(name_drawing(name, opening, "paraphrase"), label=concept.name)
                   for opening in vocabulary.openings for name in names if name != concept.name or opening not in asked]
    return [paraphrases, [draw(own, style, "class", "object") for style in vocabulary.styles] if own else []]


def probe_shares(outcomes: pd.DataFrame, concept: Concept, vocabulary: Vocabulary,
                 similar: Collection[str] | None = None) -> dict[str, Share]:
    """Every probe's share of one model's outcomes (rows of `judge_images`), if it has images.

    `similar` are the names of the concept's domain that count as similar; without them that pair is absent.
    """
    role = outcomes["role"]
    pair, retain = outcomes[role == "pair"], outcomes[role == "retain"]
    groups = {"paraphrase_ua": outcomes.loc[role == "paraphrase", "right"], "pair_kept": pair["right"],
              "pair_ua": pair["gone"], "own_class": outcomes.loc[role == "class", "right"],
              "members": outcomes.loc[role == "member", "right"],
              "other_reading": outcomes.loc[role == "reading", "right"]}
    if similar is not None:
        if concept.kind == "identity":
            retain = retain[retain["domain"] == "identity"]
        style = concept.kind == "style"
        alike = retain["asked_style" if style else "asked_label"].isin(list(similar))
        right = retain["right_style" if style else "right"]
        groups |= {"similar": right[alike], "unrelated": right[~alike]}
    if concept.name in vocabulary.readings:
        second = vocabulary.readings[concept.name][1]
        groups["overshadowed"] = outcomes.loc[role == "forget", "seen_label"] == second
    return {name: share_of(values) for name, values in groups.items() if len(values)}


def share_of(values: pd.Series) -> Share:
    """The share of true values; ValueError for no values at all, which have none."""
    count, hits = len(values), int(values.astype(bool).sum())
    if not count:
        raise ValueError("no image was judged, so there is no share; draw at least one")
    return Share(hits / count, *wilson(hits, count), count)
