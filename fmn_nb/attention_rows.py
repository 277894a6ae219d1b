"""Whose row is whose: which prompt, image and branch each row of a denoiser's batch belongs to.

A pipeline turns prompts into embeddings in `encode_prompt` and hands these to the denoiser, with guidance in one batch
(uncond first) or in two calls, each prompt several times where several images of it are asked for. `watch_prompts` sees
the prompts and the embeddings; `Generation.rows_of` recognises the embeddings in what the denoiser is given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fmn_nb.concepts import PromptTokens, join_prompts, read_prompt


class Row(NamedTuple):
    """What one row of the denoiser's batch is: the branch ("cond" or "uncond") of an image, counted from 0."""

    branch: str
    image: int


@dataclass
class Generation:
    """One call of a pipeline (or all calls of a bare denoiser): its texts, their embeddings, its images.

    `by_pipeline` says that a pipeline prepared it, rather than someone who only encodes prompts with it.
    """

    first_image: int = 0
    prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    further_prompts: dict[str, list[str]] = field(default_factory=dict)  # prompt_2, prompt_3
    further_negatives: dict[str, list[str]] = field(default_factory=dict)  # under the same names
    cond: torch.Tensor | None = None
    uncond: torch.Tensor | None = None
    seeds: list[int] = field(default_factory=list)
    images: int = 0
    by_pipeline: bool = False
    _last: tuple[torch.Tensor, tuple[str, ...]] | None = None

    def rows_of(self, text: torch.Tensor | None, batch: int, seen: set[str]) -> list[Row | None]:
        """What each of `batch` rows is, given the embeddings [batch, tokens, width] the denoiser was called with.

        Args:
            seen: branches already run at this step, for pipelines that call them one after another and whose
                embeddings don't tell (the same text in both).

        A row that repeats an image's branch (perturbed-attention guidance adds such rows) is None.
        """
        counts = {"cond": 0, "uncond": 0}
        rows: list[Row | None] = []
        for branch in self._branches(text, batch, seen):
            taken = counts[branch]
            counts[branch] += 1
            known = self.cond is not None
            rows.append(None if known and taken >= len(self.cond) else Row(branch, self.first_image + taken))
        self.images = max(self.images, *(row.image - self.first_image + 1 for row in rows if row is not None), 0)
        return rows

    def _branches(self, text: torch.Tensor | None, batch: int, seen: set[str]) -> tuple[str, ...]:
        if self.cond is None:
            return ("cond",) * batch
        if self._last is not None and self._last[0] is text:
            return self._last[1]
        cond, uncond = _matches(text, self.cond), _matches(text, self.uncond)
        images, by_order = len(self.cond), []
        for row in range(batch):  # diffusers' order: uncond before cond in one batch, cond first in two calls
            in_one_batch = batch >= 2 * images
            first_half = row < images if in_one_batch else ("cond" in seen and "uncond" not in seen)
            by_order.append("uncond" if first_half and self.uncond is not None else "cond")
        branches = tuple(
            order if is_cond == is_uncond else ("cond" if is_cond else "uncond")
            for order, is_cond, is_uncond in zip(by_order, cond or [False] * batch, uncond or [False] * batch,
                                                 strict=True))
        if text is not None and cond != uncond:
            self._last = (text, branches)
        return branches


def _matches(text: torch.Tensor | None, known: torch.Tensor | None) -> list[bool] | None:
    """For each row of `text`, whether it is one of the `known` embeddings; None where that can't be said."""
    if text is None or known is None or text.shape[1:] != known.shape[1:]:
        return None
    known = known.to(text)
    return [any(torch.equal(row, other) for other in known) for row in text]


class PromptWatch:
    """What a pipeline's `encode_prompt` and `prepare_latents` were called with since the last generation began."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.pending: Generation | None = None

    def encoded(self, arguments: dict[str, Any], result: Any) -> None:
        """Take prompts and embeddings from one call of encode_prompt."""
        embeddings = [t for t in (result if isinstance(result, tuple | list) else (result,))
                      if isinstance(t, torch.Tensor) and t.ndim == 3]
        if not embeddings:
            return
        prompts = _as_list(arguments.get("prompt"))
        earlier = self.pending
        if earlier is not None and earlier.uncond is None and len(embeddings) == 1:
            earlier.negative_prompts, earlier.uncond = prompts, embeddings[0]  # Flux, Qwen: a second call for uncond
            earlier.further_negatives = self._further(arguments, "prompt")
            return
        if earlier is not None and prompts is not None and prompts == earlier.prompts:
            return  # Hunyuan: the same prompts for a second encoder
        if prompts is None and earlier is not None and torch.equal(embeddings[0], earlier.cond):
            return  # the user encoded the prompts, the pipeline passes the embeddings through
        clean = self._cleaner(arguments)
        self.pending = Generation(
            prompts=prompts and [clean(p) for p in prompts],
            negative_prompts=[clean(p) for p in _as_list(arguments.get("negative_prompt")) or [""]],
            further_prompts=self._further(arguments, "prompt"),
            further_negatives=self._further(arguments, "negative_prompt"),
            cond=embeddings[0], uncond=embeddings[1] if len(embeddings) > 1 else None)

    def _further(self, arguments: dict[str, Any], name: str) -> dict[str, list[str]]:
        """The prompts (or negative prompts) of further encoders that were given."""
        clean = self._cleaner(arguments)
        return {f"prompt_{n}": [clean(p) for p in _as_list(arguments[f"{name}_{n}"])]
                for n in (2, 3) if arguments.get(f"{name}_{n}")}

    def latents_prepared(self, arguments: dict[str, Any], _result: Any) -> None:
        """Take the seeds of the generators that draw the noise."""
        generators = _as_list(arguments.get("generator")) or []
        if self.pending is not None:
            self.pending.by_pipeline = True
            self.pending.seeds = [g.initial_seed() for g in generators if isinstance(g, torch.Generator)]

    def _cleaner(self, arguments: dict[str, Any]) -> Callable[[str], str]:
        """The pipeline's own cleaning of prompts (PixArt's captions): words are looked up in what is encoded."""
        clean = getattr(self.pipe, "_text_preprocessing", None)
        if clean is None or "clean_caption" not in arguments:
            return lambda text: text
        return lambda text: clean(text, clean_caption=arguments["clean_caption"])[0]

    def next_generation(self) -> Generation | None:
        """The generation that was prepared since the last call, if any."""
        ready, self.pending = self.pending, None
        return ready


@contextmanager
def watch_prompts(pipe: Any) -> Iterator[PromptWatch]:
    """See every prompt that `pipe` encodes while this is open; the pipeline is put back as it was on exit.

    Raises:
        ValueError: a pipeline without `encode_prompt`, in which rows can't be told apart.
    """
    if not hasattr(pipe, "encode_prompt"):
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt, so it isn't known which row of its batches is "
                         f"which image and branch: record its denoiser alone, record_attention(pipe.{part}), where "
                         "each row counts as an image")
    watch = PromptWatch(pipe)
    with _watched(pipe, "encode_prompt", watch.encoded), _watched(pipe, "prepare_latents", watch.latents_prepared):
        yield watch


@contextmanager
def _watched(owner: Any, name: str, seen: Callable[[dict[str, Any], Any], None]) -> Iterator[None]:
    """Call `seen(arguments, result)` after each call of a method, by an attribute of the instance in front of it."""
    method = getattr(owner, name, None)
    if method is None:
        yield
        return
    shadowed = vars(owner).get(name)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen(dict(bound.arguments), result)
        return result

    object.__setattr__(owner, name, watched)
    try:
        yield
    finally:
        if vars(owner).get(name) is watched:
            object.__delattr__(owner, name)
            if shadowed is not None:
                object.__setattr__(owner, name, shadowed)


def prompt_columns(pipe: Any, tokenizer_names: tuple[str, ...], texts: list[str], columns: int) -> PromptTokens | None:
    """What each of a model's `columns` of text is: `texts` by tokenizer, the last one filling what the others leave.

    None where it isn't known which tokens the columns are.
    """
    tokenizers = [getattr(pipe, name, None) for name in tokenizer_names]
    if not tokenizers or tokenizers[-1] is None and len(tokenizers) == 1:
        return None
    parts, left = [], columns
    for index, (tokenizer, text) in enumerate(zip(tokenizers, texts, strict=True)):
        last = index == len(tokenizers) - 1
        length = left if last else tokenizer.model_max_length
        left -= length
        parts.append(_absent(text, length) if tokenizer is None
                     else read_prompt(tokenizer, expand_learned_tokens(tokenizer, text), length))
    return join_prompts(parts)


def expand_learned_tokens(tokenizer: Any, text: str) -> str:
    """"<toy>" as the tokens it was learned as, "<toy> <toy>_1 <toy>_2", as diffusers' pipelines write it."""
    added = tokenizer.get_added_vocab()
    for token in added:
        if token in text and f"{token}_1" in added and f"{token}_1" not in text:
            count = next(n for n in range(1, len(added) + 1) if f"{token}_{n}" not in added)
            text = text.replace(token, " ".join([token, *(f"{token}_{n}" for n in range(1, count))]))
    return text


def _absent(text: str, length: int) -> PromptTokens:
    """The columns of a text encoder that isn't loaded: zeros, so all padding."""
    return PromptTokens(text, ("",) * length, (None,) * length, (), (), (), tuple(range(length)))


def _as_list(value: Any) -> list | None:
    if value is None:
        return None
    return list(value) if isinstance(value, list | tuple) else [value]
