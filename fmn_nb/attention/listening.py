"""Hearing a denoiser's layers look at the text, from the start to the end of each of its runs.

`layers` says which layers these are and which of their keys are text; `tap` hears what they hand to torch. A `Listener`
brings the two together for one denoiser, turns what it hears into probabilities, and knows which layers it missed and
what to do about that. The recorder keeps what the listener hears; `attention_with_graph` passes it on with its graph,
for a loss on attention such as the re-steering loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import Transformer2DModel

from fmn_nb.attention.layers import Arguments, choose_layers, image_grid, text_and_pixels, text_layers, unpacked
from fmn_nb.attention.qkv import column_shares
from fmn_nb.attention.tap import AttentionCall, tap
from fmn_nb.models import denoiser as denoiser_of
from fmn_nb.models import uncompiled, unwrapped


class MissedLayersError(RuntimeError):
    """Layers ran whose attention couldn't be heard; the message names them and says what to do."""


class Listener:
    """Hears one denoiser: the layers that `layers` names (see `attention_with_graph`).

    Attributes:
        rules: every layer with text attention, and what is known about its keys.
        chosen: the names of those to hear.
        runs: how often each layer ran.
    """

    def __init__(self, denoiser: torch.nn.Module, layers: str | Sequence[str] | None = None) -> None:
        denoiser = unwrapped(denoiser)
        self.denoiser, self.rules = denoiser, text_layers(denoiser)
        self.chosen = choose_layers(list(self.rules), layers)
        self.runs: dict[str, int] = {}
        self._calls, self._unheard = 0, set()
        self._now: Arguments | None = None
        self._positions: dict[str, int] = {}
        self._signature = inspect.signature(denoiser.forward)
        self._modules = {name: denoiser.get_submodule(name) for name in self.rules}
        self._around = {block: module for name in self.chosen for block in _blocks_around(name)
                        if not isinstance(module := denoiser.get_submodule(block), torch.nn.ModuleList)}  # never runs
        self._image_first = {  # Wan with image conditioning: cross-attention to the image, then to the text
            name for name, rule in self.rules.items()
            if rule.text == "all" and getattr(self._modules[name], "add_k_proj", None) is not None}

    @contextmanager
    def listening(self, starts: Callable[[Arguments], None], hear: Callable[[str, AttentionCall], torch.Tensor | None],
                  ends: Callable[[], None]) -> Iterator[None]:
        """While open, call `hear(layer, call)` for each chosen layer, and `starts(arguments)` and `ends()` around each
        run.

        If `hear` returns anything, the layer continues with it as its result. Everything is restored on exit, also
        after an exception. A run that fails has no `ends`. Layers that run again after a run's end, as in the backward
        pass under gradient checkpointing, aren't heard.
        """
        def begins(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments = Arguments.of(self._signature, args, kwargs)
            starts(arguments)
            self._now, self._calls = arguments, self._calls + 1

        def over(*_: Any) -> None:
            self._now = None

        def heard(name: str, call: AttentionCall) -> bool | torch.Tensor:
            if self._now is not None and name in self.chosen:
                if name in self._image_first and call.key.shape[2] != self._now.columns:
                    return False
                result = hear(name, call)
                return True if result is None else result
            return True

        def finished(name: str, was_heard: bool) -> None:
            self.runs[name] = self.runs.get(name, 0) + 1
            if not was_heard:
                self._unheard.add(name)

        with ExitStack() as stack:
            for block, module in self._around.items():
                noted = partial(self._note_positions, block)
                stack.callback(module.register_forward_pre_hook(noted, with_kwargs=True).remove)
            stack.enter_context(uncompiled())
            stack.callback(self.denoiser.register_forward_pre_hook(begins, with_kwargs=True).remove)
            stack.callback(self.denoiser.register_forward_hook(over, always_call=True).remove)
            stack.callback(self.denoiser.register_forward_hook(lambda *_: ends()).remove)
            stack.enter_context(tap(self._modules, heard, finished, lambda: self._now is not None))
            try:
                yield
            finally:
                self._now = None

    @property
    def runs_again(self) -> bool:
        """Whether layers run a second time in the backward pass (gradient checkpointing)."""
        return any(getattr(block, "gradient_checkpointing", False) for block in (self.denoiser, *self._around.values()))

    def _note_positions(self, block: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep how many positions a block around a layer gets."""
        given = args[0] if args else kwargs.get("hidden_states")
        self._positions.pop(block, None)
        if isinstance(given, torch.Tensor) and given.ndim == 3:
            self._positions[block] = given.shape[1]
        elif isinstance(given, torch.Tensor) and given.ndim == 4 and isinstance(module, Transformer2DModel):
            self._positions[block] = given.shape[2] * given.shape[3]

    def _check_unmerged(self, name: str, positions: int, pixels: int) -> None:
        """Raise MissedLayersError if a layer sees another number of positions than the blocks around it."""
        for block in _blocks_around(name):
            if self._positions.get(block, pixels) not in (positions, pixels):
                raise MissedLayersError(
                    f"{name} looks from {pixels} positions where {block} got {self._positions[block]}: its tokens are "
                    "merged (as by tomesd with merge_crossattn), so they have no place in the image. Turn token "
                    "merging off (tomesd.remove_patch(pipe)) to record, or leave the layer out with layers=[...]")

    def shares(self, name: str, heard: AttentionCall, rows: list[int] | None = None,
               heads: Sequence[int] | None = None) -> tuple[torch.Tensor, tuple[int, int]]:
        """A layer's attention to the text in the current run: probabilities [rows, heads, pixels, text columns], and
        the (rows, columns) of its pixels.

        `rows` and `heads` are numbers; None for all. Attention of another shape is a MissedLayersError.
        """
        query, key, mask, rule, now = heard.query, heard.key, heard.mask, self.rules[name], self._now
        if query.ndim != 4 or len(query) != now.batch:
            raise MissedLayersError(f"{name} computes attention on {tuple(query.shape)}, not on [batch of {now.batch}, "
                                    "heads, pixels, channels]: leave it out with layers=[...]")
        if heads is not None and max(heads) >= query.shape[1]:
            raise ValueError(f"head {max(heads)} was selected; {name} has heads 0 to {query.shape[1] - 1}")
        if rule.packed:
            query, key, mask = unpacked(query, key, now.text_lengths, now.columns)
        text, pixels = text_and_pixels(rule, query.shape[2], key.shape[2], now.columns)
        self._check_unmerged(name, heard.query.shape[2], len(range(query.shape[2])[pixels]))
        grid = image_grid(name, len(range(query.shape[2])[pixels]), now.latents, rule.text != "all")
        pixels = slice(pixels.start, pixels.start + grid[0] * grid[1])  # any more are Flux Kontext's reference
        mask = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
        if rows is None and heads is None and pixels == slice(0, query.shape[2]):  # no slices for a graph to hold
            return column_shares(query, key, text, mask, heard.scale), grid
        row, head = (slice(None) if chosen is None else list(chosen) for chosen in (rows, heads))
        mask = None if mask is None else mask[row][:, head, pixels]  # [rows, heads, pixels, T]
        query, key = query[row][:, head, pixels], key[row][:, head]  # [rows, heads, pixels, d], [rows, heads, T, d]
        return column_shares(query, key, text, mask, heard.scale), grid

    # ---- what was missed --------------------------------------------------------------------------------------------

    def state(self, name: str) -> str:
        """What became of a layer: "recorded", "skipped" (not chosen), "missed" or "not run"."""
        if name not in self.chosen:
            return "skipped"
        if name in self._unheard or (self._calls and not self.runs.get(name)):
            return "missed"
        return "recorded" if self.runs.get(name) else "not run"

    def check_heard(self) -> None:
        """Raise MissedLayersError if a chosen layer wasn't heard."""
        missed = [name for name in self.rules if self.state(name) == "missed"]
        if not missed:
            return
        names, otherwise = ", ".join(missed), "or leave these layers out with layers=[...]"
        if not any(self.runs.get(name) for name in missed):
            raise MissedLayersError(f"attention of {names} couldn't be heard: the model ran past these layers' hooks, "
                                    "as a scripted or exported one does. Record the model as it was before that, "
                                    f"{otherwise}")
        processors = [getattr(self.denoiser.get_submodule(name), "processor", None) for name in missed]
        kinds = ", ".join(sorted({type(processor).__name__ for processor in processors}))
        ways = "; ".join(dict.fromkeys(_way(self.denoiser, processor) for processor in processors))
        raise MissedLayersError(f"attention of {names} couldn't be heard: {kinds} doesn't call torch's "
                                f"scaled_dot_product_attention. {ways}, {otherwise}")


def _blocks_around(name: str) -> list[str]:
    """The dotted names of the modules that hold a layer, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _way(denoiser: torch.nn.Module, processor: object) -> str:
    """The call that replaces a processor with one that can be heard."""
    kind = type(processor).__name__
    if "Sliced" in kind:
        return ("Call pipe.disable_attention_slicing() (set_attention_slice(None) on a model alone); "
                "set_default_attn_processor() doesn't help")
    if "XFormers" in kind:
        return "Call disable_xformers_memory_efficient_attention() on the pipeline or the model"
    if getattr(processor, "_attention_backend", None) is not None:
        return "Call reset_attention_backend() on the model"
    if any("UNet" in base.__name__ or "PixArt" in base.__name__ for base in type(denoiser).__mro__):
        # diffusers' own "default" is the older AttnProcessor, which computes attention by hand
        return ("Call set_attn_processor(AttnProcessor2_0()) on the model, from diffusers.models.attention_processor; "
                "set_default_attn_processor() doesn't help")
    return "Put back the attention processors that the model was loaded with, or load it again"


@contextmanager
def attention_with_graph(model: Any, *, layers: str | Sequence[str] | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the attention of the model's last run inside this `with` block, with its graph, for a loss on it.

        with attention_with_graph(unet) as attention:
            unet(noisy, timestep, encoder_hidden_states=text)
        sum(values[..., columns].square().sum() for values in attention.values()).backward()

    A layer whose keys are all text continues with these probabilities, so that a training step computes them once: what
    it writes equals torch's fused attention up to rounding. Without gradients, in half precision, under
    gradient checkpointing and in joint attention the model computes what it would without this, bit for bit.

    Args:
        model: a denoiser, or a pipeline for its denoiser; or a `Listener` to one, which already knows its layers:
            finding them is a good part of what listening costs in a training.
        layers: names, dotted or short ("up 0.1"), or patterns ("up_blocks*") of the layers to keep; None for all with
            text attention.

    Yields:
        Layer -> probabilities [batch, heads, pixels, text columns] in float32 at least, in the order in which the
        layers run. Each run of the model fills it anew.

    Raises:
        UnknownArchitectureError: where this model looks at the text is unknown.
        ValueError: a pattern that matches no layer.
        MissedLayersError: in the run itself, if a layer couldn't be heard, or runs without a graph.
    """
    listener = model if isinstance(model, Listener) else Listener(
        model if isinstance(model, torch.nn.Module) else denoiser_of(model), layers)
    attention: dict[str, torch.Tensor] = {}
    with_graph, again = False, listener.runs_again
    saved_as_usual = partial(torch.autograd.graph.saved_tensors_hooks, lambda t: t.detach(), lambda t: t)

    def starts(_: Arguments) -> None:
        nonlocal with_graph
        with_graph = torch.is_grad_enabled()
        attention.clear()

    def hear(name: str, heard: AttentionCall) -> torch.Tensor | None:
        if with_graph and not torch.is_grad_enabled():
            raise MissedLayersError(
                f"{name} runs without a graph under re-entrant gradient checkpointing; use the non-re-entrant kind: "
                "enable_gradient_checkpointing() without arguments")
        # Under gradient checkpointing a layer runs again in the backward pass, to compute the tensors that the first
        # run didn't save. What is computed here is no part of that second run, so its tensors are saved as usual.
        with saved_as_usual() if again else nullcontext():
            found, _ = listener.shares(name, heard)
        attention[name] = found
        whole = found.shape == (*heard.query.shape[:3], heard.key.shape[2])
        exact = heard.plain and found.dtype == heard.value.dtype and not torch.is_autocast_enabled(found.device.type)
        return found @ heard.value if with_graph and not again and whole and exact else None

    with listener.listening(starts, hear, listener.check_heard):
        yield attention


@dataclass(frozen=True)
class LayerCall:
    """What a layer that looks at the text got and returned in one run.

    Attributes:
        pixels: the image's features at the layer, [batch, pixels, channels].
        text: (positional, named) arguments beside these: the text's embeddings and what goes with them.
        written: its output at the pixels, which is added to their features, [batch, pixels, channels].
        states: if text and image come in one sequence, the text's features, which stand before the pixels, [batch,
            columns, channels]; otherwise None.
    """

    pixels: torch.Tensor
    text: tuple[tuple[Any, ...], dict[str, Any]]
    written: torch.Tensor
    states: torch.Tensor | None = None

    def again(self, layer: torch.nn.Module) -> torch.Tensor:
        """What `layer`, as it is now, writes with the same arguments, [batch, pixels, channels]."""
        positional, named = self.text
        if self.states is None:
            return _at_pixels(layer(self.pixels, *positional, **named), 0)
        sequence = torch.cat([self.states, self.pixels], dim=1)  # [batch, columns + pixels, channels]
        return _at_pixels(layer(sequence, *positional, **named), self.states.shape[1])


def _at_pixels(output: torch.Tensor | tuple[torch.Tensor, ...], before: int) -> torch.Tensor:
    """A layer's output at the pixels, which stand after `before` columns of text or in a tensor of their own."""
    return output[0] if isinstance(output, tuple) else output[:, before:]


@contextmanager
def text_layer_calls(model: torch.nn.Module) -> Iterator[dict[str, LayerCall]]:
    """Keep the call of each layer of `model` that looks at the text, from its last run inside this `with` block.

    Yields:
        Layer -> its call, so that the layer can run again, alone, on other pixels or with another text.
    """
    calls: dict[str, LayerCall] = {}
    model = unwrapped(model)
    rules, signature, columns = text_layers(model), inspect.signature(model.forward), 0

    def starts(_model: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal columns
        columns = Arguments.of(signature, args, given).columns or 0

    def keep(name: str, _layer: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any],
             output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        pixels, *rest = args or (given["hidden_states"],)
        named = {key: value for key, value in given.items() if key != "hidden_states"}
        in_one = rules[name].text == "first" and not isinstance(output, tuple)  # Flux's single-stream blocks
        before = columns if in_one else 0
        calls[name] = LayerCall(pixels[:, before:], (tuple(rest), named), _at_pixels(output, before),
                                pixels[:, :before] if in_one else None)

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.callback(model.register_forward_pre_hook(starts, with_kwargs=True).remove)
        for name in rules:
            hook = model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True)
            stack.callback(hook.remove)
        yield calls
