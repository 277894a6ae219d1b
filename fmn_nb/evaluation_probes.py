"""Beyond UA, IRA and CRA: paraphrases, two objects in one image, similar concepts, classes, names, ambiguous words.

A *probe* is a group of images and a share of them, with the same definition before and after forgetting. Its drawings
are apart from the forget set and the retain set, so that UA, IRA and CRA stay UnlearnCanvas's.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from fmn_nb.concepts import Concept
from fmn_nb.emoji.captions import STYLE_PHRASES
from fmn_nb.intervals import wilson
from fmn_nb.probes import PROBES
from fmn_nb.protocol import EMOJI, Drawing, Size, Vocabulary, draw, name_drawing, repeated, sentence

QUICK_PROBES = 24  # images of all probes together
FULL_PROBES = 72


@dataclass(frozen=True)
class Share:
    """A share of images, with its 95% Wilson interval."""

    value: float
    low: float
    high: float
    images: int


def probe_drawings(concept: Concept, seed: int = 0, size: Size = "quick",
                   vocabulary: Vocabulary = EMOJI) -> list[Drawing]:
    """The drawings of all probes for a concept; no prompt of `drawings` is among them.

    quick: 24 images, full: 72, shared out evenly among the groups that the concept's kind has.
    """
    groups = [group for group in _groups(concept, vocabulary) if group]
    count = (QUICK_PROBES if size == "quick" else FULL_PROBES) // max(1, len(groups))
    return [drawing for group in groups for drawing in _share_out(group, count, seed)]


def _share_out(group: Sequence[Drawing], count: int, seed: int) -> list[Drawing]:
    """`count` images of a group: evenly spread over its prompts, or each prompt several times."""
    if len(group) > count:
        return repeated([group[i * len(group) // count] for i in range(count)], 1, seed)
    return repeated(group, count // len(group), seed)


def _groups(concept: Concept, vocabulary: Vocabulary) -> list[list[Drawing]]:
    if concept.kind == "style":
        return [_style_paraphrases(concept, vocabulary), _style_pairs(concept, vocabulary)]
    if concept.kind == "identity":
        own = vocabulary.classes.get(concept.name)
        return [_name_paraphrases(concept, vocabulary),
                [draw(own, style, "class", "object") for style in vocabulary.styles] if own else []]
    return [_paraphrases(concept, vocabulary), _pairs(concept, vocabulary), _members(concept, vocabulary),
            _readings(concept, vocabulary)]


def _paraphrases(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    label, plain = vocabulary.target_label(concept), sentence([concept.name])
    noun = plain.removeprefix("a photo of ")
    said = [(opening.format(noun), None) for opening in vocabulary.openings[1:]]
    said += [(sentence([concept.name], style, STYLE_PHRASES[1]), style) for style in vocabulary.styles]
    if label != concept.name:  # a word's dominant reading by its own name
        said += [(sentence([label], style), style) for style in vocabulary.styles]
    return [Drawing(prompt, 0, "paraphrase", label, style, "object") for prompt, style in said]


def _style_paraphrases(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    return [Drawing(sentence([name], concept.name, STYLE_PHRASES[1]), 0, "paraphrase", name, concept.name, "style")
            for name in vocabulary.others(concept).objects]


def _name_paraphrases(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    own = vocabulary.classes.get(concept.name)
    names = [concept.name, *([f"{concept.name} the {own}"] if own else [])]
    return [replace(name_drawing(name, opening, "paraphrase"), label=concept.name)
            for opening in vocabulary.openings for name in names
            if (name, opening) not in {(concept.name, one) for one in vocabulary.openings[:4]}]


def _pairs(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    """The concept with each other object, now left, now right, in one style after another."""
    label, others = vocabulary.target_label(concept), vocabulary.others(concept).objects
    pairs = []
    for number, other in enumerate([*others, *others]):
        left = (number + number // len(others)) % 2 == 0
        things = [concept.name, other] if left else [other, concept.name]
        style = vocabulary.styles[number % len(vocabulary.styles)]
        pairs.append(Drawing(sentence(things, style), 0, "pair", label, style, "object", (other,)))
    random.Random("pairs").shuffle(pairs)  # taking every second one must not take one side or style alone
    return pairs


def _style_pairs(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    """Two objects in the style: both are to stay."""
    objects = vocabulary.others(concept).objects
    half = len(objects) // 2
    couples = [(one, objects[(number + half) % len(objects)]) for number, one in enumerate(objects)]
    return [Drawing(sentence(couple, concept.name), 0, "pair", couple[0], concept.name, "style", couple)
            for couple in couples if couple[0] != couple[1]]


def _members(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    names = [name for name, own in vocabulary.classes.items() if own == concept.name]
    return [name_drawing(name, opening, "member") for name in names for opening in vocabulary.openings[:4]]


def _readings(concept: Concept, vocabulary: Vocabulary) -> list[Drawing]:
    """The reading that is not to be forgotten: a word's overshadowed one, or a reading's counterpart."""
    for word, (dominant, overshadowed) in vocabulary.readings.items():
        if concept.name in (word, dominant, overshadowed):
            other = dominant if concept.name == overshadowed else overshadowed
            return [draw(other, style, "reading", "object") for style in vocabulary.styles]
    return []


def probe_shares(outcomes: pd.DataFrame, concept: Concept, similar: Collection[str] | None = None,
                 vocabulary: Vocabulary = EMOJI) -> dict[str, Share]:
    """Every probe's share of one model's outcomes (rows of `judge_images`); absent where it has no images.

    `similar` are the names of the concept's domain that count as similar; without them that pair is absent.
    """
    role = outcomes["role"]
    pair, retain = outcomes[role == "pair"], outcomes[role == "retain"]
    groups = {"paraphrase_ua": outcomes.loc[role == "paraphrase", "right"], "pair_kept": pair["right"],
              "pair_ua": pair["gone"], "own_class": outcomes.loc[role == "class", "right"],
              "members": outcomes.loc[role == "member", "right"],
              "other_reading": outcomes.loc[role == "reading", "right"]}
    if similar is not None:
        asked, right = domain_answers(retain, concept)
        groups |= {"similar": right[asked.isin(list(similar))], "unrelated": right[~asked.isin(list(similar))]}
    if concept.name in vocabulary.readings:
        second = vocabulary.readings[concept.name][1]
        groups["overshadowed"] = outcomes.loc[role == "forget", "seen_label"] == second
    return {name: share_of(values) for name, values in groups.items() if len(values)}


def domain_answers(retain: pd.DataFrame, concept: Concept) -> tuple[pd.Series, pd.Series]:
    """The retain set's rows of the concept's own domain: what was asked for, and whether it was seen."""
    if concept.kind == "style":
        return retain["asked_style"], retain["right_style"]
    rows = retain[retain["domain"] == "identity"] if concept.kind == "identity" else retain
    return rows["asked_label"], rows["right"]


def share_of(values: pd.Series) -> Share:
    """The share of true values; ValueError for no values at all, which have none."""
    count, hits = len(values), int(values.astype(bool).sum())
    if not count:
        raise ValueError("no image was judged, so there is no share; draw at least one")
    return Share(hits / count, *wilson(hits, count), count)


def probe_table(shares: Mapping[str, Mapping[str, Share]]) -> pd.DataFrame:
    """Probes as rows: what each says, its images, and the share with its interval in a column for each of `shares`."""
    rows = {}
    for name, probe in PROBES.items():
        found = {when: by_name[name] for when, by_name in shares.items() if name in by_name}
        if found:
            cells = {when: f"{s.value:.3f} [{s.low:.3f}, {s.high:.3f}]" for when, s in found.items()}
            images = next(iter(found.values())).images
            rows[name] = {**cells, "images": images, "aim": "forget" if probe.forgetting else "keep",
                          "meaning": probe.meaning}
    return pd.DataFrame.from_dict(rows, orient="index")
