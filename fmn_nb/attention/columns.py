"""What each text column that the denoiser sees is: a word, a special token or padding, and of which tokenizer.

A pipeline cleans a prompt (`as_encoded`), gives it to one tokenizer or several, whose columns follow one another
(`text_parts`), and may encode a long one in chunks; `read_columns` reads all of that back from the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fmn_nb.attention.layers import architecture_of
from fmn_nb.concepts.tokens import PromptTokens, UnreadablePromptError, join_prompts, read_chunks, read_prompt
from fmn_nb.models import UnsupportedPipelineError, denoiser


def as_encoded(pipe: Any, text: str, clean: bool | None = None) -> str:
    """A text as the pipeline cleans it before it encodes it; PixArt, for example, writes it in small letters.

    Args:
        clean: the pipeline's argument `clean_caption`; None for what it takes by default.
    """
    usual = inspect.signature(type(pipe).__call__).parameters.get("clean_caption")
    if usual is None or not hasattr(pipe, "_text_preprocessing"):
        return text
    return pipe._text_preprocessing(text, clean_caption=usual.default if clean is None else clean)[0]


def text_parts(pipe: DiffusionPipeline, length: int) -> list[range]:
    """Which of the `length` text columns come from each tokenizer; the last one's fill what the others leave."""
    parts, first = [], 0
    names = architecture_of(denoiser(pipe)).tokenizers
    for name in names[:-1]:
        parts.append(range(first, first + getattr(pipe, name).model_max_length))
        first = parts[-1].stop
    return [*parts, range(first, length)]


def read_columns(pipe: DiffusionPipeline, prompt: str, length: int, others: Mapping[str, str] | None = None,
                 embeddings: torch.Tensor | None = None, cleaned: bool = False) -> PromptTokens:
    """What each of the `length` text columns that the denoiser sees is, over all tokenizers that make them.

    The tokenizers' columns follow one another; the last tokenizer fills what the others leave. Columns of an encoder
    that isn't loaded are padding. More columns than an encoder has positions are a long prompt's chunks.

    Args:
        others: tokenizer's name ("tokenizer_2") -> the prompt that was given for its encoder instead.
        embeddings: what the denoiser got, [length, width], to check chunks against.
        cleaned: the texts are as the pipeline encoded them (`as_encoded`).

    Raises:
        UnsupportedPipelineError: the pipeline has no tokenizer, so nobody knows.
        UnreadablePromptError: the tokenizer doesn't tell words, or a long prompt wasn't encoded in plain chunks.
    """
    architecture, told = architecture_of(denoiser(pipe)), dict(others or {})
    if not cleaned:
        prompt, told = as_encoded(pipe, prompt), {name: as_encoded(pipe, text) for name, text in told.items()}
    names = architecture.tokenizers
    if not names or (len(names) == 1 and getattr(pipe, names[0], None) is None):
        raise UnsupportedPipelineError(f"{type(pipe).__name__} has no tokenizer to find a concept's words with")
    parts, chunked = [], False
    for name, place in zip(names, text_parts(pipe, length), strict=True):
        tokenizer, text = getattr(pipe, name, None), told.get(name, prompt)
        own, first = len(place), place.start
        unused = PromptTokens(text, ("",) * own, (None,) * own, (), (), (), tuple(range(own)))  # all padding
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        if encoder is None and len(names) > 1 and (embeddings is None or not embeddings[first:first + own].any()):
            tokenizer = None  # pipelines put zeros in the place of an encoder that isn't loaded
        if tokenizer is not None and _is_chunked(tokenizer, encoder, own):
            chunked = True
            parts.append(_read_chunks(tokenizer, encoder, text, own, embeddings))
        else:
            parts.append(unused if tokenizer is None else read_prompt(tokenizer, text, own))
    read, beside = join_prompts(parts), getattr(pipe, architecture.beside, None) if architecture.beside else None
    text = told.get(architecture.beside, prompt)
    if beside is None or text == prompt:
        return read
    if chunked:
        raise UnreadablePromptError(f"two long prompts side by side, {prompt!r} and {text!r}, can't be read: give "
                                    "both encoders the same, or ask for columns by number")
    return replace(read, beside=read_prompt(beside, text, min(length, beside.model_max_length)))


def _is_chunked(tokenizer: Any, encoder: Any | None, columns: int) -> bool:
    """Whether there are more columns than the encoder has positions (T5, for example, takes any number)."""
    if columns <= tokenizer.model_max_length:
        return False
    if encoder is None:
        return tokenizer.bos_token_id is not None
    return columns > (getattr(encoder.config, "max_position_embeddings", None) or columns)


@torch.no_grad()
def _read_chunks(tokenizer: Any, encoder: Any | None, text: str, columns: int,
                 embeddings: torch.Tensor | None) -> PromptTokens:
    """The columns of a long prompt that was encoded in chunks, as compel does; checked by encoding it once more.

    Raises:
        UnreadablePromptError: the embeddings aren't those of the plain chunks (other lengths, breaks or weights), or
            there is no encoder to compare with.
    """
    limit, doubt = tokenizer.model_max_length, ""
    if columns % limit:
        doubt = f"are no whole number of chunks of {limit}"
    elif encoder is None or embeddings is None or tokenizer.bos_token_id is None:
        doubt = "can't be compared with the text: its encoder isn't there"
    if not doubt:
        read, rows = read_chunks(tokenizer, text, columns // limit)
        ids = torch.tensor(rows, device=encoder.get_input_embeddings().weight.device)
        states = encoder(ids, output_hidden_states=True)
        there = [*read.begin, *read.words, *read.first_eot]
        layers = [states.last_hidden_state, *states.hidden_states]  # SDXL takes the last but one
        if any(_alike(layer.flatten(0, 1)[there], embeddings[there]) for layer in layers):
            return read
        doubt = f"aren't those of the plain text in chunks of {limit} (other breaks, or weights)"
    raise UnreadablePromptError(f"the embeddings of {text!r} have {columns} columns, which {doubt}: ask for "
                                "columns=[...] by number, or give prompts=[PromptTokens]")


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether rows of features are the same up to rounding; the other's may be followed by a second encoder's."""
    other = other[:, :one.shape[1]].to(one)
    return one.shape == other.shape and bool(((one - other).norm(dim=1) < 0.1 * one.norm(dim=1)).all())
