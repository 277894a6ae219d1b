"""The losses of a fine-tune, as functions of attention probabilities and predictions alone.

Shapes: a layer's attention probabilities A are [batch, heads, pixels, columns], with a graph; columns are all text
columns. `concept` [batch, columns] says for each row which of them count as the concept, so every image of a batch
has its own positions and concepts of different lengths go together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.attention_layers import pixel_grid

Attention = Mapping[str, Tensor]


def resteering_loss(attention: Attention, concept: Tensor, norm: str, region: Tensor | None = None) -> Tensor:
    """How much attention the concept gets: what Forget-Me-Not drives to zero (arXiv 2303.17591, section 3.2).

    Args:
        attention: layer name -> A [batch, heads, pixels, columns].
        concept: bool [batch, columns].
        norm: "published": the Frobenius norm of all chosen probabilities of all layers, neither squared nor
            averaged; "mean_square": per layer the mean of their squares, then the mean over layers, so that
            layers and token counts weigh equally; "mass": per layer the mean square of each pixel's sum over
            the concept's columns, then the mean over layers.
        region: weights [batch, height, width] in [0, 1] of where in the image the concept is; None for everywhere.

    Returns a scalar: from 0; at most 1 for "mean_square" and "mass".
    """
    chosen = {name: _chosen(a, concept, region) for name, a in attention.items()}
    if norm == "published":
        return torch.sqrt(sum(values.square().sum() for values in chosen.values()))
    if norm == "mass":
        return torch.stack([values.sum(-1).square().mean() for values in chosen.values()]).mean()
    columns = concept.sum(1)
    means = []
    for values in chosen.values():
        per_row = values.square().sum((1, 2, 3)) / (values.shape[1] * values.shape[2] * columns.to(values))
        means.append(per_row.mean())
    return torch.stack(means).mean()


@torch.no_grad()
def concept_mass(attention: Attention, concept: Tensor) -> float:
    """The share of their attention that pixels give to the concept's columns: mean over layers, in [0, 1]."""
    masses = [_chosen(a.detach(), concept, None).sum(-1).mean() for a in attention.values()]
    return float(torch.stack(masses).mean())


def retain_loss(now: Tensor, frozen: Tensor) -> Tensor:
    """Mean squared difference of the model's and the frozen model's predictions for the same noisy latents."""
    return F.mse_loss(now.float(), frozen.float())


def retain_attention_loss(now: Attention, frozen: Attention) -> Tensor:
    """The same for attention: mean over layers of the summed squared difference of each pixel's distribution."""
    differences = [(now[name] - frozen[name]).square().sum(-1).mean() for name in now]
    return torch.stack(differences).mean()


def _chosen(probabilities: Tensor, concept: Tensor, region: Tensor | None) -> Tensor:
    """The probabilities of the concept's columns, all others set to 0: [batch, heads, pixels, columns]."""
    weight = concept[:, None, None, :].to(probabilities)
    if region is not None:
        rows, columns = pixel_grid(probabilities.shape[2], *region.shape[-2:])
        small = F.interpolate(region[:, None].to(probabilities), (rows, columns), mode="area")
        weight = weight * small.reshape(len(region), 1, -1, 1)
    return probabilities * weight
