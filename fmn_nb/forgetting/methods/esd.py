"""Erased Stable Diffusion: the concept's prediction is trained to point away from the concept (Gandikota, Materzynska,
Fiotto-Kaufman, Bau, arXiv 2303.07345).

With x_t on the way from noise to an image of the concept, e_0 the frozen model's prediction and e that of the model in
training, c the concept's prompt and n its guide (the empty prompt, as published),

    loss = mean |e(x_t, c) - target|^2,     target = e_0(x_t, n) - eta (e_0(x_t, c) - e_0(x_t, n))

with eta = `anchor_guidance`: at 0, the concept's prompt draws what its guide draws; at 1 (the paper's), the opposite of
what guidance to the concept adds. (The authors' script counts from the concept, e_0(c) - eta' (e_0(c) - e_0(n)), where
eta' = 1 + eta.) Nothing holds the rest in place.

`esd-x` trains the cross-attention, where the text comes in (their choice for styles), `esd-u` everything else (for
objects, whatever word asks for them). Published: 1000 steps of Adam at 1e-5, batch 1, x_t by sampling 50 steps with
guidance 3 and stopping at a random one, with the model in training; their later script samples with the frozen model.
This method does so, too, and only once: it keeps `reference_count` whole trajectories of `reference_steps` steps, and
the steps of the fine-tune draw from them (`noise_on` "trajectories"). AdamW without weight decay is Adam.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fmn_nb.forgetting.methods import Seen
    from fmn_nb.forgetting.settings import Settings


def objective(seen: Seen, settings: Settings) -> Tensor:
    """The mean squared distance of the concept's prediction from the target, a scalar."""
    guide, named = seen.frozen("guide"), seen.frozen("concept")
    return F.mse_loss(seen.predicted.float(), guide - settings.anchor_guidance * (named - guide))
