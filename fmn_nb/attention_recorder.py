"""The recorder: hears the layers of a running denoiser and keeps what was chosen of their attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fmn_nb.attention_calls import Call, CallLog
from fmn_nb.attention_data import AttentionBudgetError, LayerCoverage, NotRecordedError
from fmn_nb.attention_layers import (
    choose_layers,
    image_grid,
    image_rows,
    text_columns,
    text_layers,
    unpacked,
)
from fmn_nb.attention_maths import column_shares
from fmn_nb.attention_missed import MissedLayersError, why_missed
from fmn_nb.attention_record import AttentionRecord
from fmn_nb.attention_rows import Row, watch_prompts
from fmn_nb.attention_selection import Selection, column_table
from fmn_nb.attention_tap import AttentionCall, tap
from fmn_nb.prompt_tokens import PhraseNotFoundError, PromptTokens


class Recorder(AttentionRecord):
    """An `AttentionRecord` that is being filled; made by `fmn_nb.attention.record_attention`.

    Attributes:
        selection: what is kept.
        column_mask: in differentiable mode, which of `columns()` count for each row: [batch, chosen columns], 1 or 0.
    """

    def __init__(self, denoiser: torch.nn.Module, pipe: Any | None, selection: Selection,
                 prompts: Sequence[str | PromptTokens] | None = None) -> None:
        super().__init__()
        self.denoiser, self.pipe, self.selection = denoiser, pipe, selection
        self.rules = text_layers(denoiser)
        self.chosen_layers = choose_layers(list(self.rules), selection.layers)
        self._image_first = {  # Wan with image conditioning: cross-attention to the image, then to the text
            name for name, rule in self.rules.items()
            if rule.text == "all" and getattr(denoiser.get_submodule(name), "add_k_proj", None) is not None}
        self.log = CallLog(denoiser, pipe, prompts)
        self.images, self.timesteps = self.log.images, self.log.timesteps
        self.phrases = list(selection.phrases) if selection.phrases else None
        if selection.columns is not None and not selection.differentiable:
            self.chosen_columns = list(selection.columns)
        self.model = {"denoiser": type(denoiser).__name__, "pipeline": type(pipe).__name__ if pipe else "",
                      "name": str(getattr(getattr(pipe, "config", None), "_name_or_path", "") or "")}
        self.column_mask: torch.Tensor | None = None
        self._keeps_steps = selection.keep != "mean"
        self._call: Call | None = None
        self._latents: tuple[int, int] | None = None
        self._runs: dict[str, int] = {}
        self._missed: set[str] = set()
        self._weights: dict[tuple, torch.Tensor] = {}
        self._graph: dict[str, torch.Tensor] = {}
        self._bytes, self._bytes_before = 0, 0  # kept, and kept when the generation began

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the denoiser and its layers; everything is put back on exit, also after an exception."""
        modules = {name: self.denoiser.get_submodule(name) for name in self.rules}
        with ExitStack() as stack:
            if self.pipe is not None:
                self.log.watch = stack.enter_context(watch_prompts(self.pipe))
            starts = self.denoiser.register_forward_pre_hook(self._denoiser_starts, with_kwargs=True)
            stack.callback(starts.remove)
            ends = self.denoiser.register_forward_hook(self._denoiser_ends, always_call=True)
            stack.callback(ends.remove)
            stack.enter_context(tap(modules, self._hear, self._layer_finished, lambda: self._call is not None))
            try:
                yield
            finally:
                self._call = None

    # ---- the denoiser's calls ----

    def _denoiser_starts(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        images = len(self.images)
        call = self.log.begin(args, kwargs)
        if not self.selection.differentiable:
            if self._latents not in (None, call.latents):
                raise ValueError(f"latents of {self._latents} and now {call.latents}: record images of one size at a "
                                 "time, each size in a 'with' block of its own")
            self._latents = call.latents
            if len(self.images) > images and self.phrases is not None:
                self._check_phrases([image.prompt for image in self.images[images:]])
        if call.first:
            self._bytes_before = self._bytes
        self._graph = {}
        self._call = call

    def _denoiser_ends(self, *_: Any) -> None:
        call, self._call = self._call, None
        if call is not None and call.step == 0 and self._keeps_steps and not self.selection.differentiable:
            steps = self.log.expected_steps() or 1
            kept = steps if self.selection.steps is None else len(self.selection.steps & set(range(steps)))
            each = self._bytes - self._bytes_before
            if self._bytes_before + each * kept > self.selection.max_bytes:
                earlier = f" after {self._bytes_before:,} of earlier generations" if self._bytes_before else ""
                self._over_budget(f"{kept} steps of {each:,} bytes each{earlier}")

    def _check_phrases(self, texts: list[PromptTokens | None]) -> None:
        """Each selected phrase must be in one prompt at least."""
        if any(text is None for text in texts):
            raise NotRecordedError("phrases were selected but the prompt isn't known (a bare denoiser, or embeddings "
                                   "without their text): give prompts=[...], or select columns=[...] by number")
        for phrase in self.phrases:
            failures = [_failure(text, phrase) for text in texts]
            if all(failures):
                raise failures[0]

    # ---- the layers ----

    def _layer_finished(self, name: str, heard: bool) -> None:
        self._runs[name] = self._runs.get(name, 0) + 1
        if not heard:
            self._missed.add(name)

    def _hear(self, name: str, heard: AttentionCall) -> bool:
        """Keep one layer's attention of one call, as far as it was selected; False where its keys aren't the text."""
        call = self._call
        if call is None or name not in self.chosen_layers:
            return True
        if name in self._image_first and heard.key.shape[2] != call.text_length:
            return False
        if self.selection.differentiable:
            self._keep_graph(name, heard, call)
        else:
            self._keep(name, heard, call)
        return True

    def _keep(self, name: str, heard: AttentionCall, call: Call) -> None:
        """Keep what was selected of one layer's attention."""
        selection = self.selection
        rows = [index for index, row in enumerate(call.rows)
                if row is not None and selection.branch in (None, row.branch)]
        if not rows or (selection.steps is not None and call.step not in selection.steps):
            return
        chosen = tuple(call.rows[index] for index in rows)
        with torch.no_grad():
            shares = self._shares(name, heard, call, rows if len(rows) < len(call.rows) else None)
            self._add(name, call.step, chosen, self._reduced(shares, chosen))

    def _shares(self, name: str, heard: AttentionCall, call: Call, rows: list[int] | None) -> torch.Tensor:
        """The chosen heads' probabilities [rows, heads, pixels, text columns] of one layer."""
        query, key, mask, rule = heard.query, heard.key, heard.mask, self.rules[name]
        if query.ndim != 4 or len(query) != len(call.rows):
            raise MissedLayersError(f"{name} computes attention on {tuple(query.shape)}, not on [batch of "
                                    f"{len(call.rows)}, heads, pixels, channels]: leave it out with layers=[...]")
        if rule.packed:
            query, key, mask = unpacked(query, key, call.text_lengths, call.text_length)
        pixels = image_rows(rule, query.shape[2], call.text_length)
        text = text_columns(rule, key.shape[2], call.text_length)
        self._note_layer(name, query.shape[1], len(range(query.shape[2])[pixels]), call.latents)
        height, width = self.grids[name]  # more pixels than that are further images (Flux Kontext's reference)
        pixels = slice(pixels.start, pixels.start + height * width)
        heads = list(self.selection.heads) if isinstance(self.selection.heads, tuple) else slice(None)
        rows = slice(None) if rows is None else rows
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])[rows][:, heads, pixels]
        query, key = query[rows][:, heads, pixels], key[rows][:, heads]
        return column_shares(query, key, text, mask, heard.scale)

    def _note_layer(self, name: str, heads: int, pixels: int, latents: tuple[int, int] | None) -> None:
        """Note a layer's heads and its grid, which may change in differentiable mode."""
        known = self.grids.get(name)
        if known is not None and known[0] * known[1] == pixels:
            return
        chosen = self.selection.heads
        if isinstance(chosen, tuple) and max(chosen) >= heads:
            raise ValueError(f"head {max(chosen)} was selected; {name} has heads 0 to {heads - 1}")
        self.grids[name] = image_grid(name, pixels, latents, self.rules[name].text != "all")
        self.heads[name] = () if chosen == "mean" else tuple(range(heads) if chosen is None else chosen)
        self.layers = list(self.grids)

    def _reduced(self, shares: torch.Tensor, rows: tuple[Row, ...]) -> torch.Tensor:
        """The selected phrases or columns, and the mean over heads where it was asked for."""
        if self.selection.heads == "mean":
            shares = shares.mean(dim=1, keepdim=True)
        if self.phrases is not None:
            return shares @ self._phrase_weights(rows, shares.shape[-1]).to(shares)
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
                    text = self._text_for(phrase, row.branch, row.image)
                    if _failure(text, phrase) is None:
                        self._weights[key][index, 0, list(text.find(phrase).columns), number] = 1
        return self._weights[key]

    # ---- keeping ----

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
        self.sums[key] = shares.to("cpu", dtype) if self._keeps_steps else shares.to(dtype)
        self.counts[key] = 1
        self._bytes += needed

    def _over_budget(self, what: str) -> None:
        """Go over to the mean over steps, or give up.

        Raises:
            AttentionBudgetError: steps were asked for, or the mean alone is too large.
        """
        allowed = f"more than the {self.selection.max_bytes:,} bytes allowed"
        if self.selection.keep != "auto" or not self._keeps_steps:
            raise AttentionBudgetError(f"recording needs {allowed} ({what}): select phrases, layers or steps, use "
                                       "keep='mean', heads='mean' or dtype=torch.float16, or raise max_bytes")
        warnings.warn(f"keeping each step needs {allowed} ({what}), so only the mean over steps is kept; select "
                      "phrases, layers or steps, or raise max_bytes, to keep them apart", stacklevel=2)
        kept, self.sums, self.counts, self._bytes, self._keeps_steps = self.sums, {}, {}, 0, False
        for (name, step, rows), values in kept.items():
            self._add(name, step, rows, values.float())

    # ---- with the graph ----

    def _keep_graph(self, name: str, heard: AttentionCall, call: Call) -> None:
        """Keep the chosen columns of one layer with their graph.

        Under gradient checkpointing a layer runs again during the backward pass, to compute the tensors that the first
        run didn't save. What is computed here is no part of that second run, so its tensors are saved as usual.
        """
        if call.with_graph and not torch.is_grad_enabled():
            raise MissedLayersError(
                f"{name} runs without a graph under re-entrant gradient checkpointing; use the non-re-entrant kind: "
                "enable_gradient_checkpointing() without arguments")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            shares = self._shares(name, heard, call, None)
            if self.selection.heads == "mean":
                shares = shares.mean(dim=1, keepdim=True)
            if self.selection.columns is not None:
                table, there = column_table(self.selection.columns, len(shares), shares.shape[-1], shares.device)
                self.column_mask = there
                table = table[:, None, None].expand(*shares.shape[:3], -1)
                shares = shares.gather(-1, table) * there[:, None, None]
        self._graph[name] = shares

    def columns(self) -> dict[str, torch.Tensor]:
        """In differentiable mode: layer -> probabilities [batch, heads, pixels, chosen columns] with their graph.

        They are those of the model's last run inside the block. Rows with fewer chosen columns than others are filled
        up with zeros; `column_mask` tells which columns count.

        Raises:
            NotRecordedError: not in differentiable mode, or the model hasn't run.
            MissedLayersError: it ran, and no layer could be heard.
        """
        if not self.selection.differentiable:
            raise NotRecordedError("columns with a graph need record_attention(..., differentiable=True)")
        if not self._graph:
            self._check_heard()
            raise NotRecordedError("nothing was recorded yet: run the model inside the 'with' block")
        return dict(self._graph)

    # ---- the end ----

    def coverage(self) -> list[LayerCoverage]:
        """Each layer with text attention: recorded, skipped by the selection, missed, or not run at all."""
        names = dict.fromkeys([*self.layers, *self.rules])  # in the order they run, then those that weren't recorded
        return [LayerCoverage(name, self._state(name), self._runs.get(name, 0),
                              len(self.heads[name]) if name in self.heads else None, self.grids.get(name))
                for name in names]

    def _state(self, name: str) -> str:
        if name not in self.chosen_layers:
            return "skipped"
        runs = self._runs.get(name, 0)
        if name in self._missed or (self.timesteps and not runs):
            return "missed"
        return "recorded" if runs else "not run"

    def check_complete(self) -> None:
        """Fail if a chosen layer ran unheard, or if nothing that was selected came up.

        Raises:
            MissedLayersError: names the layers.
            NotRecordedError: none of the selected steps or branches ran.
        """
        self._check_heard()
        if self.timesteps and not self.selection.differentiable and not self.sums:
            raise NotRecordedError(f"nothing matched the selection: {len(self.timesteps)} steps ran, with branches "
                                   f"{', '.join(sorted(self.log.branches))}")

    def _check_heard(self) -> None:
        missed = [entry for entry in self.coverage() if entry.state == "missed"]
        if missed:
            raise MissedLayersError(why_missed(self.denoiser, missed))


def _failure(text: PromptTokens | None, phrase: str) -> PhraseNotFoundError | None:
    """Why a phrase isn't found in a text; None where it is."""
    try:
        if text is not None:
            text.find(phrase)
    except PhraseNotFoundError as error:
        return error
    return None
