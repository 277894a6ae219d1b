"""`record_attention`: record how the image looks at the text while a model runs, as far as selected.

The recorder changes nothing of what the model computes. It hears each layer's attention (`listening`), asks which image
each row belongs to (`batch`), and keeps probabilities as an `AttentionRecord`: every step or a running mean, within a
budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fmn_nb.attention.batch import Call, CallLog, Row
from fmn_nb.attention.layers import Arguments
from fmn_nb.attention.listening import Listener
from fmn_nb.attention.record import AttentionBudgetError, AttentionRecord, LayerCoverage, NotRecordedError, as_numbers
from fmn_nb.attention.tap import AttentionCall
from fmn_nb.concepts import Concept, PhraseNotFoundError, PromptTokens
from fmn_nb.models import denoiser as denoiser_of
from fmn_nb.models import model_name, unwrapped

MOST_BYTES = 2**30  # kept by default


@contextmanager
def record_attention(
        model: Any, *, layers: str | Sequence[str] | None = None, steps: Iterable[int] | None = None,
        heads: Iterable[int] | Literal["mean"] | None = None, branch: Literal["cond", "uncond"] | None = None,
        phrases: str | Concept | Sequence[str | Concept] | None = None,
        columns: torch.Tensor | Sequence[int] | None = None,
        prompts: Sequence[str | PromptTokens] | None = None, keep: Literal["auto", "mean", "steps"] = "auto",
        dtype: torch.dtype = torch.float32, max_bytes: int = MOST_BYTES,
        differentiable: bool = False) -> Iterator[Recorder]:
    """Record how the image looks at the text while the model runs inside this `with` block.

    A compiled model (torch.compile) runs uncompiled while it is recorded.

    Args:
        model: a diffusers pipeline, or its denoiser alone (then every row is "cond" and an image of its own, and
            text columns are known only by number, unless `prompts` says what they are).
        layers: names, dotted or short ("up 0.1"), or patterns ("up_blocks*") of the layers to keep; None for all.
        steps: the steps to keep, from 0; None for all.
        heads: the heads to keep, or "mean" to average them at once; None for all.
        branch: "cond" or "uncond" to keep only that one.
        phrases: keep only these phrases' columns, summed for each phrase. A prompt of the batch that lacks a phrase
            has no map of it; a phrase that is in no prompt is an error.
        columns: keep only these text columns, by number.
        prompts: if the pipeline gets embeddings instead of prompts, one text for each image, or one for each prompt
            that is drawn several times. For a bare denoiser, which has no tokenizer, each must be a `PromptTokens`
            (`fmn_nb.concepts.tokens.read_prompt`).
        keep: "steps" keeps every step, "mean" a running mean over steps; "auto" keeps steps as long as `max_bytes`
            allows, and then only their mean, with a warning.
        dtype: the type of kept steps, torch.float16 to halve them; running means are always summed in float32.
        max_bytes: the most that may be kept.
        differentiable: True is an error that points to `attention_with_graph(model)`, which keeps the graph.

    Yields:
        The recorder, an `AttentionRecord`.

    Raises:
        ValueError: a selection that means nothing, which is named; texts whose tokens can't be known; a pipeline whose
            rows can't be told apart.
        UnknownArchitectureError: where this model looks at the text is unknown.
        AttentionBudgetError: while recording, before more than `max_bytes` are kept.
        MissedLayersError: at the end, if layers ran whose attention couldn't be heard.
    """
    if differentiable:
        raise ValueError("a record has no graph: use fmn_nb.attention.attention_with_graph(model) for a loss")
    if phrases is not None:
        several = [phrases] if isinstance(phrases, str | Concept) else phrases
        phrases = tuple(dict.fromkeys(p.phrase if isinstance(p, Concept) else p for p in several))
    selection = Selection(layers, None if steps is None else frozenset(_numbers("steps", steps)),
                          heads if heads is None or isinstance(heads, str) else _numbers("heads", heads), branch,
                          phrases, None if columns is None else _plain_numbers(columns), keep, dtype, max_bytes)
    bare = isinstance(model, torch.nn.Module)
    recorder = Recorder(unwrapped(model) if bare else denoiser_of(model), None if bare else model, selection, prompts)
    with recorder.listening():
        yield recorder


@dataclass(frozen=True)
class Selection:
    """What to keep; see `record_attention` for the meaning of each. None means all."""

    layers: str | Sequence[str] | None = None
    steps: frozenset[int] | None = None
    heads: tuple[int, ...] | Literal["mean"] | None = None
    branch: Literal["cond", "uncond"] | None = None
    phrases: tuple[str, ...] | None = None
    columns: tuple[int, ...] | None = None
    keep: Literal["auto", "mean", "steps"] = "auto"
    dtype: torch.dtype = torch.float32
    max_bytes: int = MOST_BYTES

    def __post_init__(self) -> None:
        choices = {"keep": ("auto", "mean", "steps"), "branch": (None, "cond", "uncond"),
                   "dtype": (torch.float32, torch.float16, torch.bfloat16)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(map(repr, allowed))}")
        if isinstance(self.heads, str) and self.heads != "mean":
            raise ValueError(f"heads={self.heads!r}; give numbers from 0, or 'mean'; leave it out to keep all")
        if self.phrases is not None and self.columns is not None:
            raise ValueError("select phrases or columns, not both")
        for name in ("steps", "heads", "phrases", "columns"):
            value = getattr(self, name)
            if value is not None and not value:
                raise ValueError(f"{name} is empty, so nothing would be kept; leave it out to keep all")
            if name in ("steps", "heads") and value not in (None, "mean") and min(value) < 0:
                raise ValueError(f"{name} count from 0; got {sorted(value)}")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes} keeps nothing; give a number of bytes above 0")


def _numbers(name: str, numbers: int | Iterable[int]) -> tuple[int, ...]:
    """One or several numbers in ascending order, each once."""
    return tuple(sorted(set(as_numbers(name, numbers))))


def _plain_numbers(columns: Any) -> tuple[int, ...]:
    """Column numbers that hold for all rows; a list for each row, or a mask, is a ValueError."""
    numbers = columns.tolist() if isinstance(columns, torch.Tensor) else columns
    numbers = list(numbers) if isinstance(numbers, Iterable) else [numbers]
    if any(isinstance(number, bool | list | tuple) or torch.as_tensor(number).ndim for number in numbers):
        raise ValueError("columns must be plain numbers, which hold for all rows; choose columns of single rows from "
                         "`values`, or for a loss from attention_with_graph(model)")
    return as_numbers("columns", numbers)


class Recorder(AttentionRecord):
    """An `AttentionRecord` that is being filled; made by `record_attention`.

    Attributes:
        rules: every layer with text attention, and what is known about its keys.
        chosen_layers: the layers to keep.
    """

    def __init__(self, denoiser: torch.nn.Module, pipe: Any | None, selection: Selection,
                 prompts: Sequence[str | PromptTokens] | None = None) -> None:
        super().__init__()
        self.pipe, self.selection, self._listener = pipe, selection, Listener(denoiser, selection.layers)
        self.rules, self.chosen_layers = self._listener.rules, self._listener.chosen
        self._log = CallLog(denoiser, pipe, prompts)
        self.images, self.timesteps = self._log.images, self._log.timesteps
        self.phrases = list(selection.phrases) if selection.phrases else None
        self.chosen_columns = list(selection.columns) if selection.columns else None
        self.model = {"denoiser": type(denoiser).__name__, "pipeline": type(pipe).__name__ if pipe else "",
                      "name": model_name(pipe) if hasattr(pipe, "config") else ""}
        self._keeps_steps = selection.keep != "mean"
        self._call: Call | None = None
        self._latents: tuple[int, int] | None = None
        self._weights: dict[tuple, torch.Tensor] = {}
        self._bytes, self._bytes_before = 0, 0  # kept, and kept when the generation began

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the denoiser and its layers; everything is restored on exit, also after an exception.

        On a normal exit: MissedLayersError if a chosen layer ran unheard, NotRecordedError if nothing selected ran.
        """
        with (nullcontext() if self.pipe is None else self._log.watch.watching(),
              self._listener.listening(self._run_starts, self._keep, self._run_ends)):
            yield
        self._listener.check_heard()
        if self.timesteps and not self.sums:
            raise NotRecordedError(f"nothing matched the selection: {len(self.timesteps)} steps ran, with branches "
                                   f"{', '.join(sorted(self._log.branches))}")

    def coverage(self) -> list[LayerCoverage]:
        return [LayerCoverage(name, self._listener.state(name), self._listener.runs.get(name, 0),
                              len(self.heads[name]) if name in self.heads else None, self.grids.get(name))
                for name in dict.fromkeys([*self.layers, *self.rules])]  # in the order they run, then the unrecorded

    # ---- a run of the denoiser --------------------------------------------------------------------------------------

    def _run_starts(self, arguments: Arguments) -> None:
        images, self._call = len(self.images), self._log.begin(arguments)
        if self._latents not in (None, arguments.latents):
            raise ValueError(f"latents of {self._latents} and now {arguments.latents}: record images of one size at a "
                             "time, each size in a 'with' block of its own")
        self._latents = arguments.latents
        if new := self.images[images:] if self.phrases is not None else []:
            if any(image.prompt is None for image in new):
                raise NotRecordedError("phrases were selected but the prompt isn't known (a bare denoiser, or "
                                       "embeddings without their text): give prompts=[...], or select columns=[...] "
                                       "by number")
            for phrase in self.phrases:  # each must be in one prompt at least
                failures = []
                for image in new:
                    try:
                        image.prompt.find(phrase)
                    except PhraseNotFoundError as error:
                        failures.append(error)
                if len(failures) == len(new):
                    raise failures[0]
        if self._call.first:
            self._bytes_before = self._bytes

    def _run_ends(self) -> None:
        """The first step tells how much all of them need."""
        if self._call.step == 0 and self._keeps_steps:
            steps = (self._log.generation.by_pipeline and getattr(self.pipe, "_num_timesteps", None)) or 1
            kept = steps if self.selection.steps is None else len(self.selection.steps & set(range(steps)))
            each = self._bytes - self._bytes_before
            if self._bytes_before + each * kept > self.selection.max_bytes:
                earlier = f" after {self._bytes_before:,} of earlier generations" if self._bytes_before else ""
                self._over_budget(f"{kept} steps of {each:,} bytes each{earlier}")

    # ---- a layer's attention ----------------------------------------------------------------------------------------

    def _keep(self, name: str, heard: AttentionCall) -> None:
        """Keep what was selected of one layer's attention."""
        selection, call = self.selection, self._call
        rows = [index for index, row in enumerate(call.rows)
                if row is not None and selection.branch in (None, row.branch)]
        if not rows or (selection.steps is not None and call.step not in selection.steps):
            return
        chosen = tuple(call.rows[index] for index in rows)
        heads = selection.heads if isinstance(selection.heads, tuple) else None
        with torch.no_grad():
            shares, grid = self._listener.shares(name, heard, rows if len(rows) < len(call.rows) else None, heads)
            if name not in self.grids:
                self.grids[name] = grid
                self.heads[name] = () if selection.heads == "mean" else heads or tuple(range(shares.shape[1]))
                self.layers = list(self.grids)
            self._add(name, call.step, chosen, self._reduced(shares, chosen))

    def _reduced(self, shares: torch.Tensor, rows: tuple[Row, ...]) -> torch.Tensor:
        """The selected phrases or columns of [rows, heads, pixels, columns], and the heads' mean if asked for."""
        if self.selection.heads == "mean":
            shares = shares.mean(dim=1, keepdim=True)  # [rows, 1, pixels, columns]
        if self.phrases is not None:
            return shares @ self._phrase_weights(rows, shares.shape[-1]).to(shares)  # [rows, heads, pixels, phrases]
        if self.chosen_columns is None:
            return shares
        if not all(0 <= column < shares.shape[-1] for column in self.chosen_columns):
            raise ValueError(f"columns={self.chosen_columns}: text columns go from 0 to {shares.shape[-1] - 1}; choose "
                             "from these")
        return shares[..., self.chosen_columns]

    def _phrase_weights(self, rows: tuple[Row, ...], columns: int) -> torch.Tensor:
        """[rows, 1, columns, phrases]: 1 where a column belongs to a phrase of the row's image."""
        key = (rows, columns)
        if key not in self._weights:
            self._weights[key] = torch.zeros(len(rows), 1, columns, len(self.phrases))
            for index, row in enumerate(rows):
                for number, phrase in enumerate(self.phrases):
                    with suppress(PhraseNotFoundError):
                        found = self._text_for(phrase, row.branch, row.image).find(phrase)
                        self._weights[key][index, 0, list(found.columns), number] = 1
        return self._weights[key]

    def _add(self, name: str, step: int, rows: tuple[Row, ...], shares: torch.Tensor) -> None:
        """Keep one tensor, as a step of its own or in the running mean, within the budget."""
        key = (name, step if self._keeps_steps else None, rows)
        if key in self.sums:
            self.sums[key] += shares.to(self.sums[key])  # a mean begun from steps is on the CPU
            self.counts[key] += 1
            return
        dtype = self.selection.dtype if self._keeps_steps else torch.float32
        needed = shares.numel() * torch.finfo(dtype).bits // 8
        if self._bytes + needed > self.selection.max_bytes:
            self._over_budget(f"{name} at step {step}")
            self._add(name, step, rows, shares)  # to the mean, now
            return
        kept = shares.to("cpu", dtype) if self._keeps_steps else shares.to(dtype)
        # A view of text columns would keep the image's columns alive, too.
        self.sums[key] = kept.clone() if kept.untyped_storage().nbytes() > needed else kept
        self.counts[key] = 1
        self._bytes += needed

    def _over_budget(self, what: str) -> None:
        """Switch to the mean over steps; give up if steps were asked for, or if even the mean is too large."""
        allowed = f"more than the {self.selection.max_bytes:,} bytes allowed"
        if self.selection.keep != "auto" or not self._keeps_steps:
            raise AttentionBudgetError(f"recording needs {allowed} ({what}): select phrases, layers or steps, use "
                                       "keep='mean', heads='mean' or dtype=torch.float16, or raise max_bytes")
        warnings.warn(f"keeping each step needs {allowed} ({what}), so only the mean over steps is kept; select "
                      "phrases, layers or steps, or raise max_bytes, to keep them apart", stacklevel=2)
        kept, self.sums, self.counts, self._bytes, self._keeps_steps = self.sums, {}, {}, 0, False
        for (name, step, rows), values in kept.items():
            self._add(name, step, rows, values.float())
