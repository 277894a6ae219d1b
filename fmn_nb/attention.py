"""Attention: the QKV equations as functions, the recorder, and attention maps.

    with record_attention(pipe) as attention:
        image = pipe("a photo of a cat").images[0]
    attention.map("cat")                                    # [height, width]

The recorder changes nothing in the model: it hears query and key where the model itself computes its attention
(`fmn_nb.attention_tap`), so generated images are the same bit for bit, with any model that diffusers runs through
torch's attention. What the images' rows are is found out in `fmn_nb.attention_rows`, which keys are text is said in
`fmn_nb.attention_layers`, and what was kept is read through `fmn_nb.attention_record`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from fmn_nb.attention_data import AttentionBudgetError, LayerCoverage, NotRecordedError
from fmn_nb.attention_layers import (
    ARCHITECTURES,
    Architecture,
    TextLayers,
    UnknownArchitectureError,
    register,
    text_layers,
)
from fmn_nb.attention_maths import attend, join_heads, probabilities, scores, split_heads
from fmn_nb.attention_missed import MissedLayersError
from fmn_nb.attention_record import AttentionRecord
from fmn_nb.attention_recorder import Recorder
from fmn_nb.attention_rows import Row
from fmn_nb.attention_selection import MEBIBYTE, Selection, as_numbers, as_phrases
from fmn_nb.concepts import Concept, PromptTokens
from fmn_nb.models import denoiser as denoiser_of

__all__ = [
    "ARCHITECTURES", "Architecture", "AttentionBudgetError", "AttentionRecord", "LayerCoverage", "MissedLayersError",
    "NotRecordedError", "Recorder", "Row", "TextLayers", "UnknownArchitectureError", "attend", "join_heads",
    "probabilities", "record_attention", "register", "scores", "split_heads", "text_layers",
]


@contextmanager
def record_attention(
        model: Any, *, layers: str | Sequence[str] | None = None, steps: Iterable[int] | None = None,
        heads: Iterable[int] | Literal["mean"] | None = None, branch: Literal["cond", "uncond"] | None = None,
        phrases: str | Concept | Sequence[str | Concept] | None = None,
        columns: torch.Tensor | Sequence[int] | Sequence[torch.Tensor] | None = None,
        prompts: Sequence[str | PromptTokens] | None = None, keep: Literal["auto", "mean", "steps"] = "auto",
        differentiable: bool = False, dtype: torch.dtype = torch.float32,
        max_bytes: int = 1024 * MEBIBYTE) -> Iterator[Recorder]:
    """Record how the image looks at the text while the model runs inside this `with` block.

    Args:
        model: a diffusers pipeline, or its denoiser alone (then every row is "cond" and an image of its own, and
            text columns are known by number only, unless `prompts` says what they are).
        layers: names or patterns ("up_blocks*") of the layers to keep; all where None.
        steps: the steps to keep, from 0; all where None.
        heads: the heads to keep, or "mean" to average them at once; all where None.
        branch: "cond" or "uncond" to keep only that.
        phrases: keep only these phrases' columns, summed for each phrase. A prompt of the batch that lacks one of
            them has no map of it; one that is in no prompt is an error.
        columns: keep only these text columns: numbers, or in differentiable mode also one tensor of numbers for each
            row of the batch, of any lengths, or a boolean mask [rows, columns].
        prompts: where the pipeline gets embeddings instead of prompts, one text for each image, or one for each
            prompt that is drawn several times. For a denoiser alone, which has no tokenizer, each must be a
            `PromptTokens` (`fmn_nb.concepts.read_prompt`).
        keep: "steps" keeps every step, "mean" a running mean over steps, "auto" steps while `max_bytes` lasts and
            their mean where it doesn't, with a warning.
        differentiable: keep the probabilities of the last run of the model with their graph, for a loss: see
            `Recorder.columns`. Nothing else is kept then, so only layers, heads and columns can be selected.
        dtype: of kept steps, torch.float16 to halve them; running means are always summed in float32.
        max_bytes: what may be kept at most.

    Yields:
        The recorder, an `AttentionRecord`.

    Raises:
        ValueError: a selection that means nothing, named; texts whose tokens can't be known; a pipeline whose rows
            can't be told apart.
        UnknownArchitectureError: it isn't known where this model looks at the text.
        AttentionBudgetError: on the way, before more than `max_bytes` are kept.
        MissedLayersError: at the end, if layers ran whose attention couldn't be heard.
    """
    selection = Selection(layers, None if steps is None else frozenset(as_numbers(steps)), as_numbers(heads), branch,
                          as_phrases(phrases), columns, keep, differentiable, dtype, max_bytes)
    bare = isinstance(model, torch.nn.Module)
    recorder = Recorder(model if bare else denoiser_of(model), None if bare else model, selection, prompts)
    with recorder.listening():
        yield recorder
    recorder.check_complete()
