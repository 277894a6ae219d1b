"""Which layers of a model look at the text, and which of their keys the text is: one table, a line per architecture.

Cross-attention has the text alone as keys. Joint attention (Stable Diffusion 3, Flux) has text and image in one
sequence, the text first or last. To support another model, add a line to ARCHITECTURES, or call `register`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class TextLayers:
    """A family of attention layers: `name` is a regular expression that a module's whole dotted name must match.

    `text` says which keys are text: "all" (cross-attention), or the "first" or "last" of a joint sequence. `extra`
    keys of no prompt stand before the text (AuraFlow's registers). `packed` says that each row has as many text keys
    as its encoder_attention_mask counts, then its pixels, then nothing (Lumina 2).
    """

    name: str
    text: Literal["all", "first", "last"]
    extra: int = 0
    packed: bool = False


@dataclass(frozen=True)
class Architecture:
    """Where a denoiser looks at the text, and whose tokens the text's columns are, tokenizer after tokenizer.

    No tokenizers: the pipeline wraps the prompt in a template of its own, so columns are known by position only.
    `beside` is the tokenizer of a further encoder whose tokens share the first tokenizer's columns; it counts where a
    prompt of its own was given (prompt_2).
    """

    layers: tuple[TextLayers, ...]
    tokenizers: tuple[str, ...] = ("tokenizer",)
    beside: str = ""


_CROSS = TextLayers(r".*\.attn[12]", "all")  # of these, the modules built for cross-attention

ARCHITECTURES: dict[str, Architecture] = {
    "UNet2DConditionModel": Architecture((_CROSS,), beside="tokenizer_2"),  # Stable Diffusion 1.x, 2.x, SDXL
    "PixArtTransformer2DModel": Architecture((_CROSS,)),
    "SanaTransformer2DModel": Architecture((_CROSS,), ()),
    "HunyuanDiT2DModel": Architecture((_CROSS,), ("tokenizer", "tokenizer_2")),
    "WanTransformer3DModel": Architecture((_CROSS,)),
    "SD3Transformer2DModel": Architecture(  # its attn2, where there is one, is image self-attention
        (TextLayers(r"transformer_blocks\.\d+\.attn", "last"),), ("tokenizer", "tokenizer_3"), "tokenizer_2"),
    "FluxTransformer2DModel": Architecture(
        (TextLayers(r"(single_)?transformer_blocks\.\d+\.attn", "first"),), ("tokenizer_2",)),
    "ChromaTransformer2DModel": Architecture((TextLayers(r"(single_)?transformer_blocks\.\d+\.attn", "first"),)),
    "AuraFlowTransformer2DModel": Architecture(
        (TextLayers(r"(joint|single)_transformer_blocks\.\d+\.attn", "first", extra=8),)),
    "QwenImageTransformer2DModel": Architecture((TextLayers(r"transformer_blocks\.\d+\.attn", "first"),), ()),
    "CogView4Transformer2DModel": Architecture((TextLayers(r"transformer_blocks\.\d+\.attn1", "first"),), ()),
    "Lumina2Transformer2DModel": Architecture((TextLayers(r"layers\.\d+\.attn", "first", packed=True),), ()),
}


class UnknownArchitectureError(ValueError):
    """The denoiser isn't in the table and has no layer that looks like cross-attention."""


def register(denoiser_class: str, architecture: Architecture) -> None:
    """Add a denoiser's class name to the table, or replace what it says."""
    ARCHITECTURES[denoiser_class] = architecture


def architecture_of(denoiser: torch.nn.Module) -> Architecture:
    """The table's line for a denoiser; one with `attn2` cross-attention layers needs none.

    Raises:
        UnknownArchitectureError: nothing is known about it.
    """
    for kind in type(denoiser).__mro__:
        if kind.__name__ in ARCHITECTURES:
            return ARCHITECTURES[kind.__name__]
    if any(getattr(module, "is_cross_attention", False) for _, module in denoiser.named_modules()):
        return Architecture((_CROSS,))
    raise UnknownArchitectureError(
        f"it isn't known where {type(denoiser).__name__} looks at the text; known are {', '.join(ARCHITECTURES)}. "
        "Say it with fmn_nb.attention.register(class name, Architecture(...))")


def text_layers(denoiser: torch.nn.Module) -> dict[str, TextLayers]:
    """Every layer of `denoiser` that looks at the text, by its dotted name, in the model's order.

    Raises:
        UnknownArchitectureError: nothing is known about the model.
    """
    rules = architecture_of(denoiser).layers
    found = {}
    for name, module in denoiser.named_modules():
        rule = next((rule for rule in rules if re.fullmatch(rule.name, name)), None)
        if rule is not None and (rule.text != "all" or getattr(module, "is_cross_attention", True)):
            found[name] = rule
    if not found:
        raise UnknownArchitectureError(f"this {type(denoiser).__name__} has no layer that looks at the text")
    return found


def choose_layers(names: Sequence[str], chosen: str | Sequence[str] | None) -> list[str]:
    """The names that match `chosen`: None for all, or names and shell patterns ("mid_block*", "*.attn2").

    Raises:
        ValueError: a pattern that matches no layer; the text lists the layers.
    """
    if chosen is None:
        return list(names)
    patterns = [chosen] if isinstance(chosen, str) else list(chosen)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no layer with text attention matches {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def text_columns(rule: TextLayers, keys: int, text_length: int | None) -> slice:
    """Which of a layer's `keys` are text, where the denoiser was given `text_length` text embeddings.

    Raises:
        ValueError: joint attention, and the number of text embeddings isn't known or more than there are keys.
    """
    if rule.text == "all":
        return slice(0, keys)
    if text_length is None or text_length + rule.extra > keys:
        raise ValueError(f"{keys} keys of text and image, {text_length} text embeddings: which keys are text?")
    return slice(rule.extra, rule.extra + text_length) if rule.text == "first" else slice(keys - text_length, keys)


def image_rows(rule: TextLayers, queries: int, text_length: int | None) -> slice:
    """Which of a layer's queries are pixels: all in cross-attention, what isn't text in joint attention."""
    if rule.text == "all":
        return slice(0, queries)
    if rule.text == "first":
        return slice(rule.extra + text_length, queries)
    return slice(0, queries - text_length)


def unpacked(query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor | None,
             columns: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and key [B, H, T, d] of packed rows as `columns` of text and then the pixels, in every row alike.

    Args:
        lengths: how many text keys each row has.

    Returns:
        Query, key, and a mask [B, 1, 1, columns + pixels] that is False at columns a row lacks.

    Raises:
        ValueError: the lengths aren't known.
    """
    if lengths is None or columns is None:
        raise ValueError("each row has its own number of text keys, and the denoiser wasn't told which: call it with "
                         "encoder_hidden_states and encoder_attention_mask")
    lengths, positions = lengths.to(key.device, torch.long)[:, None], key.shape[2]
    pixels = positions - int(lengths.max())
    text = torch.arange(columns, device=key.device).expand(len(key), -1)
    image = lengths + torch.arange(pixels, device=key.device)
    places = torch.cat([text.clamp(max=positions - 1), image], dim=1)[:, None, :, None]
    there = torch.cat([text < lengths, torch.ones_like(image, dtype=torch.bool)], dim=1)[:, None, None]
    places = places.expand(-1, key.shape[1], -1, key.shape[3])
    return query.gather(2, places), key.gather(2, places), there


def pixel_grid(pixels: int, height: int, width: int) -> tuple[int, int]:
    """The rows and columns of a layer that sees `height` x `width` latents as `pixels` positions.

    Every side is divided by one whole number (U-Nets round up, patches divide evenly).

    Raises:
        ValueError: no such number.
    """
    for factor in range(1, max(height, width) + 1):
        rows, columns = -(-height // factor), -(-width // factor)
        if rows * columns == pixels:
            return rows, columns
        if rows * columns < pixels:
            break
    raise ValueError(f"{pixels} positions are no whole reduction of {height} x {width} latents")


def image_grid(name: str, pixels: int, latents: tuple[int, int] | None, joint: bool) -> tuple[int, int]:
    """The rows and columns of layer `name`'s pixels; in joint attention further images may follow them.

    Raises:
        ValueError: no such grid.
    """
    if latents is None:
        side = round(pixels**0.5)
        if side * side != pixels:
            raise ValueError(f"{name} sees {pixels} pixels of latents of unknown size: teach "
                             "fmn_nb.attention_layers.latent_size to read this model's arguments")
        return side, side
    return latents if joint and pixels > latents[0] * latents[1] else pixel_grid(pixels, *latents)


def latent_size(denoiser: torch.nn.Module, arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the latents a denoiser was called with; None where its arguments don't tell."""
    if arguments.get("img_ids") is not None:  # Flux: the row and column of each position
        ids = arguments["img_ids"]
        first_image = ids.reshape(-1, ids.shape[-1])
        first_image = first_image[first_image[:, 0] == 0]
        return int(first_image[:, 1].max()) + 1, int(first_image[:, 2].max()) + 1
    if arguments.get("img_shapes"):  # Qwen-Image: (frames, rows, columns) of each image
        shape = arguments["img_shapes"][0]
        return tuple((shape[0] if isinstance(shape, list) else shape)[-2:])
    latents = arguments.get("sample", arguments.get("hidden_states"))
    return tuple(latents.shape[-2:]) if isinstance(latents, torch.Tensor) and latents.ndim >= 4 else None
