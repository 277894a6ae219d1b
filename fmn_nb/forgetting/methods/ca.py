"""Concept ablation: the concept's prompt is trained to draw its anchor (Kumari, Zhang, Wang, Shechtman, Zhang, Zhu,
arXiv 2303.13516; the model-based loss).

It noises images of the anchor: of something wider, of another of its kind ("another") or of the prompt without the
concept. With c the prompt that names the concept, a the same with the anchor, n the noise,

    loss = mean |e(x_t, c) - sg e(x_t, a)|^2  +  prior_weight * mean |e(x_t, a) - n|^2

sg stops the gradient: both predictions come from the model in training, so the anchor is what the model makes of it at
that step, and the second term, the ordinary training loss, keeps that in place.

Published: 1000 images from about 200 prompts, keys and values of the cross-attention alone, 100 steps of AdamW at 2e-6
times batch and devices (8), prior weight 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fmn_nb.forgetting.methods import Seen
    from fmn_nb.forgetting.settings import Settings


def objective(seen: Seen, settings: Settings) -> Tensor:
    """The distance from the anchor's prediction plus the weighted training loss of the anchor itself: a scalar."""
    anchor = seen.present("guide")
    loss = F.mse_loss(seen.predicted.float(), anchor.detach())
    if settings.prior_weight:
        loss = loss + settings.prior_weight * F.mse_loss(anchor, seen.target)
    return loss
