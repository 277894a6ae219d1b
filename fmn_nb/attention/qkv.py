"""The QKV equations as functions, on tensors with a head axis.

    Q = W_q x        K = W_k c        V = W_v c                 (queries from the image, keys and values from the text)
    A = softmax(Q K^T / sqrt(d))                                (the attention map: each pixel's shares, summing to 1)
    O = A V                                                     (what the layer takes from the text)

Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, equation 1. Shapes below: B rows of the batch, H heads,
N queries (pixels), T keys (tokens), d channels of a head.
"""

from __future__ import annotations

import math

import torch

MOST_AT_ONCE = 2**27  # probabilities that `column_shares` computes in one go: half a gibibyte


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, H * d] -> [B, H, N, d].

    Raises:
        ValueError: the channels can't be split evenly.
    """
    if x.shape[-1] % heads:
        raise ValueError(f"{x.shape[-1]} channels can't be split over {heads} heads")
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, N, H * d] -> [B, N, H, d] -> [B, H, N, d]


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, d] -> [B, N, H * d], the reverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)  # [B, H, N, d] -> [B, N, H, d] -> [B, N, H * d]


def scores(query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Q K^T, scaled: query [B, H, N, d] and key [B, H, T, d] -> [B, H, N, T]; `scale` is 1 / sqrt(d) by default."""
    return (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)


def probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None,
                  scale: float | None = None) -> torch.Tensor:
    """The attention map A = softmax(Q K^T / sqrt(d)): [B, H, N, d] and [B, H, T, d] -> [B, H, N, T], rows sum to 1.

    Args:
        mask: broadcastable to [B, H, N, T]; True where a key may be looked at, or numbers that are added to the
            scores (0 to keep, -inf to hide), as in torch's scaled_dot_product_attention.
        scale: what the scores are multiplied by; 1 / sqrt(d) by default.

    Computed in float32 at least, whatever the inputs' precision. A row whose keys are all masked is 0 everywhere.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        logits = scores(query.to(dtype), key.to(dtype), scale)
        if mask is None:
            return logits.softmax(dim=-1)
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(dtype)
        return logits.softmax(dim=-1).nan_to_num(nan=0.0)


def column_shares(query: torch.Tensor, key: torch.Tensor, columns: slice, mask: torch.Tensor | None = None,
                  scale: float | None = None) -> torch.Tensor:
    """`probabilities(...)[..., columns]`, some heads at a time if all at once would take gigabytes, as in joint
    attention on large images; the mask is [B, H, N, T]."""
    heads = query.shape[1]
    at_once = max(1, MOST_AT_ONCE // (len(query) * query.shape[2] * key.shape[2]))
    if at_once >= heads:
        found = probabilities(query, key, mask, scale)
        return found if columns == slice(0, key.shape[2]) else found[..., columns]  # no slice for a graph to hold
    masks = [None] * -(-heads // at_once) if mask is None else mask.split(at_once, dim=1)
    parts = zip(query.split(at_once, dim=1), key.split(at_once, dim=1), masks, strict=True)
    return torch.cat([probabilities(q, k, m, scale)[..., columns] for q, k, m in parts], dim=1)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None,
           scale: float | None = None) -> torch.Tensor:
    """The layer's output before W_o: O = A V, [B, H, N, d]. This is scaled_dot_product_attention by hand."""
    return probabilities(query, key, mask, scale) @ value.to(torch.promote_types(value.dtype, torch.float32))
