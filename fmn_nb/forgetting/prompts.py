"""The texts of a fine-tune: prompts that name the concept, and prompts whose images should stay as they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fmn_nb.attention import read_columns
from fmn_nb.concepts import (
    DETERMINERS,
    Concept,
    find_phrase,
    forms_of,
    neutral_prompts,
    same_name,
    spoken,
    with_article,
    world_of,
)
from fmn_nb.forgetting.settings import SettingsError
from fmn_nb.models import UnsupportedPipelineError, conditions

_DETERMINER = rf"(?:\b(?:{'|'.join(sorted(DETERMINERS))})\s+)"
#: what goes with a phrase that is taken out of a prompt: (before it, after it)
_AROUND = re.compile(rf"(?:\bof\s+)?{_DETERMINER}?$", re.IGNORECASE), re.compile(r"^(?!)")
_AROUND_STYLE = (re.compile(rf"(?:\bin\s+)?{_DETERMINER}?(?:\bstyle\s+of\s+)?{_DETERMINER}?$", re.IGNORECASE),
                 re.compile(r"^(?:['\u2019]s|-|)\s*style\b", re.IGNORECASE))
#: what ties a phrase to the noun after it, "my cat's toy", "a cat-shaped cake": (before it, after it)
_TIED = re.compile(r"(?:\w+-)*$"), re.compile(r"(?:['\u2019]s|(?<=s)['\u2019]|(?:-\w+)+)(?=\s+\w)", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(an?)\s+$", re.IGNORECASE)
_STAND_INS = ("dog", "frog", "house", "car", "noto", "fluent", "person", "alarm clock", "birthday cake")
#: kind -> names that a model of no known world will know, too
_OTHERS = {"object": ("dog", "frog", "house", "car", "tree", "alarm clock", "birthday cake"),
           "style": ("watercolor", "oil painting", "pencil drawing", "comic book", "pixel art"),
           "identity": ("Albert Einstein", "Charlie Chaplin", "Marilyn Monroe", "Nelson Mandela", "Frida Kahlo")}


def forget_prompts(pipe: DiffusionPipeline, concept: Concept, wording: str) -> list[str]:
    """Prompts that name the concept, the plainest first; `wording` is the setting of that name."""
    concept = spoken(concept)
    if wording == "paper":
        return [concept.paper_prompt]
    if wording == "plain":
        return [concept.prompt]
    world = world_of(pipe)
    return concept.prompts(5) if world is None else world.forget_prompts(concept)


def without(prompt: str, concept: Concept) -> str:
    """The prompt without the concept: "a photo of a cat" -> "a photo", "a dog in the style of noto" -> "a dog".

    The phrase goes wherever `find_phrase` finds it, together with the words that only led to it. If it is tied to the
    noun after it, that noun keeps these words: "a photo of my cat's toy" -> "a photo of my toy".
    """
    before, after = _AROUND_STYLE if concept.kind == "style" else _AROUND
    for start, end in reversed(find_phrase(prompt, concept.phrase)):
        left, right, tied = prompt[:start], prompt[end:], _TIED[1].match(prompt, end)
        if tied and (tied[0].startswith("-") or not after.search(right)):
            left, right = _TIED[0].sub("", left), prompt[tied.end():].lstrip()
            prompt = with_article_for(right.split()[0], left) + right
        else:
            prompt = f"{before.sub('', left)} {after.sub('', right)}"
    return re.sub(r"\s+(?=[,.;])", "", " ".join(prompt.split())).strip(" ,")


def with_article_for(word: str, before: str) -> str:
    """The text before a word that is put into a prompt, with the indefinite article that goes with the word."""
    article = _ARTICLE.search(before)
    return before[:article.start()] + _like(article[1], word) + " " if article else before


def _like(article: str, noun: str) -> str:
    """The indefinite article that goes with a noun, capitalised like `article`."""
    other = "an" if with_article(noun).startswith("an ") else "a"
    return other.capitalize() if article[0].isupper() else other


def retain_prompts(pipe: DiffusionPipeline, concepts: Sequence[Concept], given: Sequence[str] | None,
                   readings: Iterable[str] = ()) -> list[str]:
    """Prompts that name none of the concepts, not even in the plural: given ones, those of the model's world, or a
    neutral list.

    `readings` are phrases that hold a concept's word but should stay ("computer mouse" when "mouse" is corrected).
    """
    if given is None:
        world = world_of(pipe)
        given = neutral_prompts() if world is None else world.retain_prompts()
    staying = {form for reading in readings for form in forms_of(reading)}
    naming = {form for concept in concepts for word in (concept.phrase, concept.name)
              for form in (forms_of(word) if concept.kind == "object" else (word,))}
    kept = [prompt for prompt in dict.fromkeys(given) if any(find_phrase(prompt, form) for form in staying)
            or not any(find_phrase(prompt, form) for form in naming)]
    if not kept:
        raise ValueError(f"none of the {len(given)} retain prompts is free of {', '.join(c.name for c in concepts)}; "
                         "give retain_prompts that name other things")
    return kept


def likeness(pipe: DiffusionPipeline, prompts: Sequence[str], others: Sequence[str]) -> Tensor:
    """How similar each of `others` is to the closest of `prompts`, by the pipeline's own text encoder: [others].

    This is the cosine, from -1 to 1, of the embeddings of the end-of-text token, in which a causal encoder sums up the
    prompt (if no tokenizer tells which that is: of the mean over all columns); it is centred on the mean over all
    prompts, since raw embeddings share one large common part.
    """
    texts, means = [*prompts, *others], []
    for row, text in zip(conditions(pipe, texts).rows["encoder_hidden_states"], texts, strict=True):
        try:
            ends = list(read_columns(pipe, text, len(row)).first_eot)
        except UnsupportedPipelineError:
            ends = []
        means.append(row[ends or slice(None)].float().mean(0))
    summed_up = torch.stack(means)  # [texts, width]
    unit = torch.nn.functional.normalize(summed_up - summed_up.mean(0), dim=-1)
    return (unit[len(prompts):] @ unit[:len(prompts)].T).amax(1)


def neighbours_of(pipe: DiffusionPipeline, concept: Concept, count: int) -> list[str]:
    """At most `count` prompts that don't name the concept, from the most to the least similar, most of them close to
    it."""
    others = retain_prompts(pipe, [concept], None)
    order = likeness(pipe, [spoken(concept).prompt], others).argsort(descending=True, stable=True).tolist()
    places = torch.logspace(0, math.log10(len(order)), count).round().long() - 1
    return [others[order[place]] for place in dict.fromkeys(places.tolist())]


def stand_in_for(pipe: DiffusionPipeline, concept: Concept) -> str:
    """Another word with as many text columns in the concept's plain prompt, or as close to that number as possible."""
    asked = spoken(concept)
    length = pipe.tokenizer.model_max_length
    wanted = len(read_columns(pipe, asked.prompt, length).find(concept.phrase).columns)

    def difference(word: str) -> int:
        prompt = replace(asked, name=word, phrase=word).prompt
        return abs(wanted - len(read_columns(pipe, prompt, length).find(word).columns))

    return min((word for word in _STAND_INS if word.casefold() != concept.phrase.casefold()), key=difference)


def another_like(pipe: DiffusionPipeline, concept: Concept, but: Iterable[Concept] = ()) -> str:
    """Another name of the concept's kind, the one that the pipeline's text encoder finds most similar.

    Args:
        but: concepts that it doesn't name either, such as those that are forgotten together with this one.

    Raises:
        SettingsError: no name of this kind is left.
    """
    world = world_of(pipe)
    known = _OTHERS[concept.kind] if world is None else world.vocabulary.others(concept).of(concept.kind)
    apart = (concept, *but)
    names = [name for name in known if not any(same_name(name, one) for one in apart)]
    if not names:
        raise SettingsError(f"no other {concept.kind} is left to draw in place of '{concept.name}': give the setting "
                            "guide a name, 'empty' or 'without'")
    asked = [Concept(name, concept.kind).prompt for name in names]
    return names[int(likeness(pipe, [spoken(concept).prompt], asked).argmax())]
