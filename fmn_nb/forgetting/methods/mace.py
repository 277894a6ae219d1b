"""MACE: what other columns carry of the concept goes first, then attention on its own (Lu, Wang, Li, Liu, Kong, arXiv
2403.06135). Forget-Me-Not's nearest relative: its norm, after the leak is closed.

1. Closed form (`edit`). A causal text encoder carries the concept into every later column, so pushing attention off
   its own columns moves it to others that know it as well. Keys and values of all columns but the concept's own are
   edited, as in UCE, to say what the same columns say in its prompt with something else in its place (`guide`).
2. Attention (`objective`). On the edited model a LoRA of rank 1 on `to_k` and `to_v` is trained for each concept alone:

       loss = sum over layers of |A[pixels in the concept's mask, its columns and the end-of-text token]|_F

   with timesteps where objects take form (`time_density` "middle"). No target for the prediction, no retain term.
3. Fusion (`fmn_nb.patches.fuse`). One W' for all concepts: by least squares, it does on each concept's prompts what its
   two changes make of W, and on the retain prompts what W does.

Published: 30 templates, ridge 10 (bird) to 1000 (ship) in step 1, 8 images, 50 steps of one image at 1e-5 (1e-4 for
many concepts), gradient norm clipped at 1, masks by a detector; the first step is solved for all concepts together.
Here it is solved for each concept and joined in the third. `scenes` takes images with exact masks from the model's
world; without a world, the model draws the images, and they count as a whole unless masks are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fmn_nb.forgetting.methods.fmn import resteering_loss
from fmn_nb.forgetting.methods.uce import solved_for

if TYPE_CHECKING:
    from fmn_nb.forgetting.data import Task
    from fmn_nb.forgetting.methods import Edit, Seen
    from fmn_nb.forgetting.settings import Settings


def edit(task: Task) -> Edit:
    """Step 1: all columns except the concept's own say what they say without it."""
    return solved_for(task, "others", every=True)


def objective(seen: Seen, settings: Settings) -> Tensor:
    """Step 2: the sum over layers of the Frobenius norm of the concept's attention, a scalar."""
    return sum(resteering_loss({layer: shares}, seen.concept, "published", seen.region)
               for layer, shares in seen.attention.items())
