"""Forget-Me-Not's objective: attention re-steered away from a concept (Zhang, Wang, Xu, Wang, Shi, arXiv 2303.17591).

In a cross-attention layer, every pixel divides its attention among the prompt's text columns,

    A = softmax(Q K^T / sqrt(d))         [batch, heads, pixels, columns], each row of columns sums to 1.

Images of the concept are noised, and the denoiser runs on a prompt that names it. The loss is how much of this
attention the concept's own columns get; once it is driven to zero, no pixel looks at the concept's words any more.
Nothing is denoised for it, and no label is needed. This file is all of it: which columns count (`concept_mask`), where
in the image (`region`), and three norms of what is chosen (`resteering_loss`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.attention import architecture_of, pixel_grid, read_columns, text_parts
from fmn_nb.models import UnsupportedPipelineError, denoiser

if TYPE_CHECKING:
    from fmn_nb.forgetting.methods import Seen
    from fmn_nb.forgetting.settings import Settings


def objective(seen: Seen, settings: Settings) -> Tensor:
    """The re-steering loss of one step, a scalar."""
    return resteering_loss(seen.attention, seen.concept, settings.norm, seen.region)


def resteering_loss(attention: Mapping[str, Tensor], concept: Tensor, norm: str,
                    region: Tensor | None = None) -> Tensor:
    """How much attention the concept gets: what Forget-Me-Not drives to zero (section 3.2 of the paper).

    Args:
        attention: layer name -> A [batch, heads, pixels, columns].
        concept: bool [batch, columns]: which columns are the concept's in each row, so every image of a batch has its
            own positions and concepts of different lengths go together.
        norm: "published": the Frobenius norm of all chosen probabilities of all layers, neither squared nor
            averaged; "mean_square": per layer the mean of their squares, then the mean over layers, so that
            layers and token counts weigh equally; "mass": per layer the mean square of each pixel's sum over
            the concept's columns, then the mean over layers.
        region: weights [batch, height, width] in [0, 1] of where in the image the concept is; None for everywhere.

    Returns a scalar: from 0; at most 1 for "mean_square" and "mass".
    """
    chosen = _chosen(attention, concept, region)  # of each layer: [batch, heads, pixels, chosen]
    if norm == "published":
        return torch.linalg.vector_norm(torch.cat([values.flatten() for values in chosen]))
    if norm == "mass":
        return torch.stack([values.sum(-1).square().mean() for values in chosen]).mean()
    columns = concept.sum(1)  # [batch]
    means = []
    for values in chosen:
        counted = values.shape[1] * values.shape[2] * columns.to(values)  # heads * pixels * columns: [batch]
        means.append((values.square().sum((1, 2, 3)) / counted).mean())  # [batch] -> scalar
    return torch.stack(means).mean()


@torch.no_grad()
def concept_mass(attention: Mapping[str, Tensor], concept: Tensor) -> float:
    """The share of attention that pixels give to the concept's columns: mean over layers, in [0, 1]."""
    own = concept[:, None, :, None].float()  # [batch, 1, columns, 1]
    return float(torch.stack([(values.detach().float() @ own).mean() for values in attention.values()]).mean())


def _chosen(attention: Mapping[str, Tensor], concept: Tensor, region: Tensor | None) -> list[Tensor]:
    """Each layer's probabilities of the columns that are the concept's in any row: [batch, heads, pixels, chosen].

    Columns that aren't the concept's in a row are 0 there; the region's weights are multiplied in.
    """
    columns = concept.any(0).nonzero().flatten()  # few of all columns: [chosen]
    own = concept[:, None, None, columns]  # [batch, 1, 1, chosen]
    alike, chosen = bool(own.all()), []
    for values in attention.values():
        values = values.index_select(-1, columns)
        values = values if alike else values * own.to(values)
        if region is not None:
            values = values * at_pixels(region.to(values), values.shape[2])[:, None, :, None]
        chosen.append(values)
    return chosen


def at_pixels(region: Tensor, pixels: int) -> Tensor:
    """A region [batch, height, width] at the pixels of a layer with this many: [batch, pixels]."""
    grid = pixel_grid(pixels, *region.shape[-2:])  # rows and columns of the layer's pixels
    return F.interpolate(region[:, None], grid, mode="area").flatten(1)  # [batch, 1, rows, columns] -> [batch, pixels]


def concept_mask(pipe: DiffusionPipeline, prompt: str, phrase: str, parts: Sequence[str], length: int) -> Tensor:
    """Which of a prompt's `length` text columns count as the concept: bool [length].

    Args:
        parts: "words" (the phrase's own columns), "later" (words after it), "first_eot", "padding", or "every_eot", as
            the published code counts: each end-of-text token, so also the padding of a tokenizer that pads with it.

    Raises:
        PhraseNotFoundError: the prompt doesn't hold the phrase; the message lists its words.
        UnsupportedPipelineError: the phrase's columns lie beyond `length`.
    """
    read = read_columns(pipe, prompt, length)
    own = read.find(phrase).columns
    columns = set(own) if "words" in parts else set()
    for part in parts:
        if part == "every_eot":
            names = architecture_of(denoiser(pipe)).tokenizers
            for tokenizer, its in zip((getattr(pipe, name) for name in names), text_parts(pipe, length), strict=True):
                pads_with_it = tokenizer.pad_token_id == tokenizer.eos_token_id
                columns |= {*read.first_eot, *(read.padding if pads_with_it else ())} & set(its)
        elif part != "words":
            columns |= set(read.part(part, phrase))
    if columns and max(columns) >= length:
        raise UnsupportedPipelineError(f"{type(denoiser(pipe)).__name__} joins its encoders' columns itself: which "
                                       f"of the {length} given ones hold the concept can't be told")
    mask = torch.zeros(length, dtype=torch.bool)
    mask[sorted(columns)] = True
    return mask
