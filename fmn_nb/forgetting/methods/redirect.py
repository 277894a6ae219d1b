"""Redirected attention: for the concept's prompt each layer writes what it would write without the concept.

Forget-Me-Not pushes the attention on the concept's columns to zero (`fmn`). A softmax only moves it to other columns,
which also know the concept in a causal text encoder, and the norm of A ignores what a column *writes*. This objective
takes everything that a cross-attention layer writes into the image,

    O(x, c) = W_o softmax(Q(x) K(c)^T / sqrt(d)) V(c)          [batch, pixels, channels],

for the text c of a prompt that names the concept and c' of the same prompt without it ("a photo" for "a photo of a
cat"). x is what the layer gets while the frozen model O_0 denoises the noised reference for c': what it will get once
all layers before it are redirected. Every layer learns alone, from x to O; no gradient goes back through the denoiser,
and no prediction is a target:

    loss = mean over layers of |O(x, c) - T|^2 / |O_0(x, c) - O_0(x, c')|^2
    T    = O_0(x, c') + g (O_0(x, c') - O_0(x, c))             g: `anchor_guidance`, 0 to stop at "without"

so that layers of any size count the same; it starts at (1 + g)^2. With g > 0, a layer writes the opposite of what the
concept adds, as negative guidance does for predictions (Gandikota et al., arXiv 2303.07345): if the model also draws
the concept unasked (a picture without the name of a style still has one), "without" alone is not enough.

The objective doesn't ask how much attention the concept's columns get, and that changes little: what they write does.

In joint attention (Flux, Stable Diffusion 3), a layer has the text's features of that block in the place of c, as they
are when the frozen model denoises with each prompt, and O is its output at the pixels alone. The objective doesn't ask
what the text's features become, or what a pooled vector of the text does outside attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmn_nb.attention import text_layer_calls
from fmn_nb.forgetting.methods.fmn import at_pixels

if TYPE_CHECKING:
    from fmn_nb.forgetting.methods import Seen
    from fmn_nb.forgetting.settings import Settings

THROUGH_THE_RUN = False  # the layers learn from runs of the frozen model


def objective(seen: Seen, settings: Settings) -> Tensor:
    """How far the layers are from writing what they should: a scalar of at least 0, with its graph."""
    model, distances = seen.weights.model, []
    with text_layer_calls(model) as without:
        seen.frozen("guide")
    with text_layer_calls(model) as named:
        seen.frozen("concept")
    for name, call in without.items():
        layer, there = model.get_submodule(name), replace(named[name], pixels=call.pixels)
        with seen.weights.frozen():
            before = there.again(layer)
        where = None if seen.region is None else at_pixels(seen.region, call.written.shape[1])
        distances.append(redirected(there.again(layer), before, call.written, settings.anchor_guidance, where))
    return torch.stack(distances).mean()


def redirected(written: Tensor, named: Tensor, without: Tensor, guidance: float, where: Tensor | None = None) -> Tensor:
    """One layer's distance to its target, in units of what the concept adds to it; all [batch, pixels, channels].

    Args:
        written: what the layer writes for the concept now.
        named, without: what it wrote before, with and without the concept.
        where: weights of the pixels, [batch, pixels]; None for equal weights.
    """
    weight = 1.0 if where is None else where[..., None]
    target = without + guidance * (without - named)
    missing, unit = (written - target).float().square(), (named - without).float().square()
    return (missing * weight).mean() / (unit * weight).mean().clamp_min(1e-12)  # a mask may leave nothing
