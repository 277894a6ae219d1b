"""The texts of a fine-tune: prompts that name the concept, and prompts whose images are to stay as they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fmn_nb.attention_layers import architecture_of
from fmn_nb.attention_rows import prompt_columns
from fmn_nb.concepts import DETERMINERS, Concept, PromptTokens, find_phrase
from fmn_nb.denoising import conditions
from fmn_nb.emoji.captions import OPENINGS, caption
from fmn_nb.emoji.world import IDENTITIES, OBJECTS, READINGS, STYLES
from fmn_nb.models import UnsupportedPipelineError, bundled_name, denoiser
from fmn_nb.paths import data_dir

_DETERMINER = rf"(?:\b(?:{'|'.join(sorted(DETERMINERS))})\s+)"
#: what goes with a phrase that is taken out of a prompt: (before it, after it)
_AROUND = re.compile(rf"(?:\bof\s+)?{_DETERMINER}?$", re.IGNORECASE), re.compile(r"^(?!)")
_AROUND_STYLE = (re.compile(rf"(?:\bin\s+)?{_DETERMINER}?(?:\bstyle\s+of\s+)?{_DETERMINER}?$", re.IGNORECASE),
                 re.compile(r"^\s+style\b", re.IGNORECASE))
_STAND_INS = ("dog", "frog", "house", "car", "noto", "fluent", "person", "alarm clock", "birthday cake")


def forget_prompts(pipe: DiffusionPipeline, concept: Concept, how: str) -> list[str]:
    """Prompts that name the concept, the plainest first.

    `how` is "paper" (the published prompt alone), "plain" (with its article), or "varied": the templates of its
    kind and, for the bundled emoji model, the contexts it was trained on (an object in every style, a style on
    every object).
    """
    concept = spoken(concept)
    if how == "paper":
        return [concept.paper_prompt]
    if how == "plain":
        return [concept.prompt]
    if bundled_name(pipe) == "emoji":
        return _emoji_forget_prompts(concept)
    return concept.prompts(5)


def _emoji_forget_prompts(concept: Concept) -> list[str]:
    """The captions that the emoji model learned a concept from: an object in every style, a style on every object."""
    name = concept.name
    if concept.kind == "style":
        return [concept.prompt, *(caption([thing], name) for thing in OBJECTS)]
    return [*(caption([name], opening=opening) for opening in OPENINGS), *(caption([name], s) for s in STYLES)]


def without(prompt: str, concept: Concept) -> str:
    """The prompt without the concept: "a photo of a cat" -> "a photo", "a dog in the style of noto" -> "a dog".

    The phrase goes wherever `find_phrase` finds it, and with it the words that only led to it.
    """
    before, after = _AROUND_STYLE if concept.kind == "style" else _AROUND
    for start, end in reversed(find_phrase(prompt, concept.phrase)):
        left, right = before.sub("", prompt[:start]), after.sub("", prompt[end:])
        prompt = f"{left} {right}"
    return re.sub(r"\s+(?=[,.;])", "", " ".join(prompt.split())).strip(" ,")


def retain_prompts(
    pipe: DiffusionPipeline, concepts: Sequence[Concept], given: Sequence[str] | None, readings: Iterable[str] = ()
) -> list[str]:
    """Prompts that name none of the concepts: the given ones, the bundled model's world, or a neutral list.

    Args:
        readings: phrases that hold a concept's word but are to stay ("computer mouse" where "mouse" is corrected).

    Raises:
        ValueError: every prompt names a concept that is to be forgotten, or there is none.
    """
    if given is None:
        given = _emoji_prompts() if bundled_name(pipe) == "emoji" else _neutral_prompts()
    readings = list(readings)
    kept = [prompt for prompt in dict.fromkeys(given)
            if any(find_phrase(prompt, reading) for reading in readings)
            or not any(_names(prompt, concept) for concept in concepts)]
    if not kept:
        raise ValueError(
            f"none of the {len(given)} retain prompts is free of {', '.join(c.name for c in concepts)}; "
            "give retain_prompts that name other things"
        )
    return kept


def likeness(pipe: DiffusionPipeline, prompts: Sequence[str], others: Sequence[str]) -> Tensor:
    """How much each of `others` is like the closest of `prompts`, by the pipeline's own text encoder: [others].

    The cosine of the embeddings of the end-of-text token, in which a causal encoder sums up the prompt (where no
    tokenizer tells which that is: of the mean over all columns), from -1 to 1; centred on the mean over all prompts,
    since raw embeddings share one large common part.
    """
    texts = [*prompts, *others]
    rows = conditions(pipe, texts).rows["encoder_hidden_states"]
    summed_up = torch.stack([row[_ends(pipe, text, len(row))].float().mean(0)
                             for row, text in zip(rows, texts, strict=True)])
    unit = torch.nn.functional.normalize(summed_up - summed_up.mean(0), dim=-1)
    return (unit[len(prompts):] @ unit[:len(prompts)].T).amax(1)


def _ends(pipe: DiffusionPipeline, text: str, length: int) -> list[int] | slice:
    """The end-of-text columns of a prompt, or all columns."""
    try:
        return list(read_columns(pipe, text, length).first_eot) or slice(None)
    except UnsupportedPipelineError:
        return slice(None)


def neighbours_of(pipe: DiffusionPipeline, concept: Concept, count: int) -> list[str]:
    """`count` prompts that don't name the concept, from the one most like it to the least: most of them near it."""
    others = retain_prompts(pipe, [concept], None)
    order = likeness(pipe, [spoken(concept).prompt], others).argsort(descending=True, stable=True).tolist()
    places = torch.logspace(0, math.log10(len(order)), count).round().long() - 1
    return [others[order[place]] for place in dict.fromkeys(places.tolist())]


def stand_in_for(pipe: DiffusionPipeline, concept: Concept) -> str:
    """Another word that takes up as many text columns in the concept's plain prompt, or as near to it as there is."""
    asked = spoken(concept)
    length = pipe.tokenizer.model_max_length
    wanted = len(read_columns(pipe, asked.prompt, length).find(concept.phrase).columns)

    def difference(word: str) -> int:
        prompt = replace(asked, name=word, phrase=word).prompt
        return abs(wanted - len(read_columns(pipe, prompt, length).find(word).columns))

    return min((word for word in _STAND_INS if word.casefold() != concept.phrase.casefold()), key=difference)


def read_columns(pipe: DiffusionPipeline, prompt: str, length: int) -> PromptTokens:
    """What each of the `length` text columns that the denoiser sees is, over all tokenizers that make them.

    Raises:
        UnsupportedPipelineError: the pipeline has no tokenizer, so nobody knows.
    """
    names = architecture_of(denoiser(pipe)).tokenizers
    read = prompt_columns(pipe, names, [prompt] * len(names), length)
    if read is None:
        raise UnsupportedPipelineError(f"{type(pipe).__name__} has no tokenizer to find a concept's words with")
    return read


def concept_mask(
    pipe: DiffusionPipeline, prompt: str, phrase: str, parts: Sequence[str], length: int
) -> Tensor:
    """Which text columns count as the concept in a prompt: bool [length].

    Raises:
        PhraseNotFoundError: the prompt doesn't hold the phrase; the text lists its words.
    """
    read = read_columns(pipe, prompt, length)
    columns = set(read.find(phrase).columns) if "words" in parts else set()
    read.find(phrase)
    for part in parts:
        if part == "every_eot":
            columns |= set(read.first_eot) | (set(read.padding) if _pads_with_eot(pipe) else set())
        elif part != "words":
            columns |= set(read.part(part, phrase))
    mask = torch.zeros(length, dtype=torch.bool)
    mask[sorted(columns)] = True
    return mask


def _pads_with_eot(pipe: DiffusionPipeline) -> bool:
    tokenizer = getattr(pipe, architecture_of(denoiser(pipe)).tokenizers[0])
    return tokenizer.pad_token_id == tokenizer.eos_token_id


def _names(prompt: str, concept: Concept) -> bool:
    return bool(find_phrase(prompt, concept.phrase) or find_phrase(prompt, concept.name))


def spoken(concept: Concept) -> Concept:
    """The concept under what stands for it in a prompt: its name, or the phrase (a learned token) that replaces it."""
    return concept if find_phrase(concept.name, concept.phrase) else replace(concept, name=concept.phrase)


def _emoji_prompts() -> list[str]:
    """The emoji world's evaluation prompts (on other seeds there), and more: every object in every style and alone,
    readings, names in all openings, styles."""
    things = [caption([name], style) for name in OBJECTS for style in (*STYLES, None)]
    names = [caption([name], opening=opening) for name in IDENTITIES for opening in OPENINGS]
    return [*things, *names, *(caption([name]) for name in READINGS),
            *(f"a photo in the style of {style}" for style in STYLES)]


def _neutral_prompts() -> list[str]:
    lines = (data_dir() / "prompts" / "neutral.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]
