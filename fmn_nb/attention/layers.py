"""Which layers of a model look at the text, and which of their keys are text: a table with a line per architecture.

In cross-attention, all keys are text. Joint attention (Stable Diffusion 3, Flux) has text and image in one sequence,
the text first or last. To support another model, add a line to ARCHITECTURES, or call `register`.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class TextLayers:
    """A family of attention layers: `name` is a regular expression that a module's whole dotted name must match.

    `text` says which keys are text: "all" (cross-attention), or the "first" or "last" of a joint sequence. Before the
    text stand `extra` keys that belong to no prompt (AuraFlow's registers). `packed` says that each row has as many
    text keys as its encoder_attention_mask counts, then its pixels, then nothing (Lumina 2).
    """

    name: str
    text: Literal["all", "first", "last"]
    extra: int = 0
    packed: bool = False


@dataclass(frozen=True)
class Architecture:
    """Where a denoiser looks at the text, and which tokenizers' tokens the text's columns are, in order.

    No tokenizers: the pipeline wraps the prompt in a template of its own, so columns are known only by position.
    `beside` is the tokenizer of another encoder whose tokens share the first tokenizer's columns; it counts if it got a
    prompt of its own (prompt_2).
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
    """The table's line for a denoiser; one with `attn2` cross-attention layers needs none (see `text_layers`)."""
    for kind in type(denoiser).__mro__:
        if kind.__name__ in ARCHITECTURES:
            return ARCHITECTURES[kind.__name__]
    if any(getattr(module, "is_cross_attention", False) for _, module in denoiser.named_modules()):
        return Architecture((_CROSS,))
    raise UnknownArchitectureError(
        f"nobody knows where {type(denoiser).__name__} looks at the text; known are {', '.join(ARCHITECTURES)}. "
        "Say where with fmn_nb.attention.layers.register(class name, Architecture(...))")


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


def short_name(layer: str) -> str:
    """A layer's dotted name without the parts that most names share: "down 0.1", "mid", "transformer_blocks.3"."""
    parts = [part for part in layer.split(".") if part not in ("attn2", "attn1", "attn", "attentions")]
    blocks = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid"}
    if parts[0] not in blocks:
        return ".".join(parts)
    numbers = [part for part in parts[1:] if part.isdigit()]
    return f"{blocks[parts[0]]} {'.'.join(numbers[:-1] if numbers[-1:] == ['0'] and len(numbers) > 1 else numbers)}"


def choose_layers(names: Sequence[str], chosen: str | Sequence[str] | None) -> list[str]:
    """The names that match `chosen`: None for all, or names and shell patterns ("mid_block*", "*.attn2"), or the short
    names of tables and figures ("up 0.1", "down*"), which count if no dotted name matches.

    A pattern that matches none is a ValueError that lists the short names.
    """
    if chosen is None:
        return list(names)
    found, short = set(), {name: short_name(name) for name in names}
    patterns = [chosen] if isinstance(chosen, str) and chosen else list(chosen)
    if not patterns:
        raise ValueError("no layer is named, so nothing is chosen; leave it out for all")
    for pattern in patterns:
        text = pattern if isinstance(pattern, str) else ""
        matching = fnmatch.filter(names, text) or [name for name in names if fnmatch.fnmatchcase(short[name], text)]
        if not matching:
            close = difflib.get_close_matches(str(pattern), [*short.values(), *names], 1, 0.5)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"no layer with text attention matches {pattern!r}{hint}; there are "
                             f"{', '.join(short.values())}")
        found.update(matching)
    return [name for name in names if name in found]


def text_and_pixels(rule: TextLayers, queries: int, keys: int, text_length: int | None) -> tuple[slice, slice]:
    """Which of a layer's keys are text, and which of its queries are pixels: in cross-attention, all of both."""
    if rule.text == "all":
        return slice(0, keys), slice(0, queries)
    if text_length is None or text_length + rule.extra > keys:
        raise ValueError(f"{keys} keys of text and image, {text_length} text embeddings: which keys are text?")
    if rule.text == "last":
        return slice(keys - text_length, keys), slice(0, queries - text_length)
    end = rule.extra + text_length
    return slice(rule.extra, end), slice(end, queries)


def unpacked(query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor | None,
             columns: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and key [B, H, T, d] of packed rows as `columns` of text and then the pixels, the same in every row, and a
    mask [B, 1, 1, columns + pixels] that is False at the columns that a row lacks: `lengths` says how many it has."""
    if lengths is None or columns is None:
        raise ValueError("each row has its own number of text keys, and the denoiser wasn't told which: call it with "
                         "encoder_hidden_states and encoder_attention_mask")
    lengths, positions = lengths.to(key.device, torch.long)[:, None], key.shape[2]
    pixels = positions - int(lengths.max())
    text = torch.arange(columns, device=key.device).expand(len(key), -1)  # [B, columns]
    image = lengths + torch.arange(pixels, device=key.device)  # [B, pixels]
    places = torch.cat([text.clamp(max=positions - 1), image], dim=1)[:, None, :, None]  # [B, 1, columns + pixels, 1]
    there = torch.cat([text < lengths, torch.ones_like(image, dtype=torch.bool)], dim=1)[:, None, None]
    places = places.expand(-1, key.shape[1], -1, key.shape[3])  # [B, H, columns + pixels, d]
    return query.gather(2, places), key.gather(2, places), there


def pixel_grid(pixels: int, height: int, width: int) -> tuple[int, int]:
    """The rows and columns of a layer that sees `height` x `width` latents as `pixels` positions.

    Both sides are divided by one whole number (U-Nets round up, patches divide evenly); a ValueError if there is none.
    """
    for factor in range(1, max(height, width) + 1):
        rows, columns = -(-height // factor), -(-width // factor)
        if rows * columns == pixels:
            return rows, columns
    raise ValueError(f"{pixels} positions are not a whole reduction of {height} x {width} latents")


def image_grid(name: str, pixels: int, latents: tuple[int, int] | None, joint: bool) -> tuple[int, int]:
    """The rows and columns of layer `name`'s pixels; in joint attention, other images' pixels may follow them."""
    if latents is None:
        side = round(pixels**0.5)
        if side * side != pixels:
            raise ValueError(f"{name} sees {pixels} pixels of latents of unknown size: teach "
                             "fmn_nb.attention.layers.Arguments to read this model's arguments")
        return side, side
    return latents if joint and pixels > latents[0] * latents[1] else pixel_grid(pixels, *latents)


@dataclass(frozen=True)
class Arguments:
    """What a denoiser was called with, whatever its architecture calls it.

    Attributes:
        batch: rows in the batch.
        text: the text embeddings [batch, columns, width], if there are any.
        text_lengths: how many of the columns are text in each row, [batch], if a mask says so.
        timestep: the (first row's) timestep.
        latents: their height and width, if the arguments tell.
        skips_layers: whether layers are left out on purpose (skip-layer guidance).
    """

    batch: int
    text: torch.Tensor | None
    text_lengths: torch.Tensor | None
    timestep: float
    latents: tuple[int, int] | None
    skips_layers: bool

    @property
    def columns(self) -> int | None:
        """How many text columns there are."""
        return None if self.text is None else self.text.shape[1]

    @classmethod
    def of(cls, signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a call with `args` and `kwargs`, for a denoiser whose forward has this signature."""
        given = signature.bind_partial(*args, **kwargs).arguments
        latents = given.get("sample", given.get("hidden_states"))
        text, mask, timestep = (given.get(name) for name in ("encoder_hidden_states", "encoder_attention_mask",
                                                             "timestep"))
        return cls(
            len(latents), text if isinstance(text, torch.Tensor) else None,
            mask.sum(dim=1) if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None,  # [batch, columns]
            0.0 if timestep is None else float(torch.as_tensor(timestep).flatten()[0]),
            _latent_size(given), bool(given.get("skip_layers")))


def _latent_size(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the latents that a denoiser was called with; None if its arguments don't tell."""
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
