"""Hearing what a model's attention layers compute, where they compute it.

Every attention layer of diffusers hands its query, key and value to torch's `scaled_dot_product_attention`. While a tap
is open, another function takes its place: it tells the tap what goes in, if the call comes from inside a layer that the
tap listens to, then calls the original with the same arguments and returns its result untouched. A listener that has
computed the layer's attention itself may return the result instead, so that nothing is computed twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AttentionCall:
    """What one layer gave to scaled_dot_product_attention: query [B, H, N, d], key and value [B, H, T, d], mask, scale.

    `plain` says whether the result is softmax(Q K^T scale + mask) V and nothing else (no dropout).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    plain: bool = True


Hear = Callable[[str, AttentionCall], bool | torch.Tensor]


@dataclass(eq=False)
class _Frame:
    """A layer whose forward is running: who listens to it, and whether its attention was heard."""

    name: str
    module: torch.nn.Module
    hear: Hear
    heard: bool = False


class _Running(threading.local):
    """The layers whose forward is running in this thread, the innermost last."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_RUNNING = _Running()
_LOCK = threading.Lock()
_open_taps = 0
_original = F.scaled_dot_product_attention
_buried_under: Callable[..., torch.Tensor] | None = None


def _relay(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
           dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **more: Any) -> torch.Tensor:
    """torch's function, which also tells those who listen to the innermost running layer."""
    frames, result = _RUNNING.frames, None
    listeners = [f for f in frames if f.module is frames[-1].module and not f.heard] if frames else []
    if listeners:
        call = _call(query, key, value, attn_mask, scale, is_causal, dropout_p == 0.0)
    for frame in listeners:  # up to a layer's attention to the text: an IP-Adapter's further calls have no text keys
        frame.heard = True  # also where hear raises
        said = frame.hear(frame.name, call)
        frame.heard = said is not False
        if isinstance(said, torch.Tensor):
            result = said
    if result is not None:
        return result
    return _original(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                     **more)


def _call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None,
          is_causal: bool, plain: bool) -> AttentionCall:
    """The call with a head of keys for each head of queries, and a mask for what is causal."""
    if key.ndim == 4 and key.shape[1] != query.shape[1]:  # grouped-query attention: fewer key heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if is_causal:
        mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    return AttentionCall(query, key, value, mask, scale, plain)


@contextmanager
def tap(layers: Mapping[str, torch.nn.Module], hear: Hear,
        finished: Callable[[str, bool], None], active: Callable[[], bool]) -> Iterator[None]:
    """While open, `hear(name, call)` is called for the attention of each run of each of `layers`.

    Args:
        layers: name -> module.
        hear: returns whether that was the layer's attention to the text; if not, it also hears the run's next one.
            Or it returns a result in place of torch's, and the layer continues with that.
        finished: called after each run of a layer with its name and whether any attention was heard.
        active: runs that start while this is False are ignored (gradient checkpointing runs layers a second time).

    Taps may be nested, and open on several models and in several threads. When the last tap closes, also after an
    exception, all hooks are removed and torch's function is restored.
    """

    def before(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _args: Any) -> None:
            if active():
                _RUNNING.frames.append(_Frame(name, module, hear))
        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _args: Any, _output: Any) -> None:
            own = next((f for f in reversed(_RUNNING.frames) if f.module is module and f.hear is hear), None)
            if own is not None:
                _RUNNING.frames.remove(own)
                finished(name, own.heard)
        return hook

    with ExitStack() as stack:
        _replace()
        stack.callback(_restore)
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(before(name)).remove)
            stack.callback(module.register_forward_hook(after(name), always_call=True).remove)
        try:
            yield
        finally:
            _RUNNING.frames[:] = [frame for frame in _RUNNING.frames if frame.hear is not hear]


def _replace() -> None:
    global _open_taps, _original
    with _LOCK:
        current = F.scaled_dot_product_attention
        if _open_taps == 0 and current is not _relay and current is not _buried_under:
            _original = current
            F.scaled_dot_product_attention = _relay
        _open_taps += 1


def _restore() -> None:
    """Restore torch's function, unless someone has wrapped ours meanwhile: then ours stays and passes calls on."""
    global _open_taps, _buried_under
    with _LOCK:
        _open_taps -= 1
        if _open_taps:
            return
        current = F.scaled_dot_product_attention
        _buried_under = None if current is _relay else current
        if current is _relay:
            F.scaled_dot_product_attention = _original
