"""Hearing the gated layers: which boxes' tokens each pixel looks at while a grounded model draws.

In a gated layer, pixels and tokens attend to each other in one sequence; this keeps the pixels' shares of attention to
the tokens. It changes nothing of what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fmn_nb.attention.grounding import ground, resized
from fmn_nb.attention.layers import choose_layers, pixel_grid, short_name
from fmn_nb.attention.qkv import column_shares
from fmn_nb.attention.tap import AttentionCall, tap
from fmn_nb.control.grounding import ROLES, require_gated
from fmn_nb.control.interaction import Interaction, InteractionError, laid_out
from fmn_nb.control.relations import Box
from fmn_nb.models import denoiser

SCORED_AT = 64  # pixels, height and width at which maps are compared with boxes


@dataclass
class BoxAttention:
    """What gated layers looked at, as a mean over steps and heads.

    Attributes:
        sums: layer -> [images, tokens, rows, columns], summed over `steps[layer]` steps.
        gates: layer -> |tanh alpha|, by which the layer's attention output is multiplied before it is added.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    gates: dict[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers that were heard, in the order in which they run."""
        return list(self.sums)

    def map(self, role: str = "subject", instance: int = 0, image: int = 0,
            layers: str | Sequence[str] | None = None) -> np.ndarray:
        """Where the image looks at one token, [rows, columns] in [0, 1], as a mean over layers at the finest grid.

        Raises:
            ValueError: nothing was heard, or no such role, instance, image or layer.
        """
        if not self.sums:
            raise ValueError("no gated layer was heard: draw with interactions inside the 'with' block")
        chosen = choose_layers(self.layers, layers)
        images, tokens = next(iter(self.sums.values())).shape[:2]
        if role not in ROLES or not 0 <= instance < tokens // len(ROLES) or not 0 <= image < images:
            raise ValueError(f"there is no {role!r} of instance {instance} in image {image}: roles are "
                             f"{', '.join(ROLES)}, instances 0 to {tokens // len(ROLES) - 1}, images 0 to {images - 1}")
        token = instance * len(ROLES) + ROLES.index(role)
        maps = [(self.sums[name][image, token] / self.steps[name]).numpy() for name in chosen]
        finest = max((one.shape for one in maps), key=lambda shape: shape[0] * shape[1])
        return np.mean([resized(one, finest) for one in maps], axis=0)

    def scores(self, interactions: Sequence[Interaction], image: int = 0) -> pd.DataFrame:
        """How well each token's map points at its box: a row for each, with the fields of `attention.Grounding`."""
        rows = []
        for instance, one in enumerate(laid_out(interactions)):
            boxes = zip(ROLES, (one.subject, one.object, one.action),
                        (one.subject_box, one.object_box, one.between), strict=True)
            for role, word, box in boxes:
                if word and not (mask := box_mask(box, SCORED_AT)).all() and mask.any():
                    score = ground(self.map(role, instance, image), mask)
                    rows.append({"instance": instance, "role": role, "word": word, **asdict(score)})
        return pd.DataFrame(rows)

    def by_layer(self) -> pd.DataFrame:
        """A row for each layer: its gate, and the mean share of attention that falls on tokens."""
        return pd.DataFrame([{"layer": short_name(name), "gate": self.gates[name],
                              "on tokens": float((self.sums[name] / self.steps[name]).sum(1).mean())}
                             for name in self.layers]).set_index("layer")


def box_mask(box: Box, height: int, width: int | None = None) -> np.ndarray:
    """The pixels whose centres lie in a box, [height, width] bool; a square if only one side is given."""
    down, across = ((np.arange(count) + 0.5) / count for count in (height, width or height))
    return ((down >= box[1]) & (down < box[3]))[:, None] & ((across >= box[0]) & (across < box[2]))[None]


@contextmanager
def record_boxes(pipe: DiffusionPipeline) -> Iterator[BoxAttention]:
    """Hear the gated layers while `pipe` draws inside this `with` block; rows without grounding aren't kept.

    Raises:
        InteractionError: the model has no gated layers; or a second drawing begins in the block, as that of more images
            than are drawn at once does, since its images would be added to the first ones.
    """
    require_gated(pipe)
    unet = denoiser(pipe)
    layers = {name: module for name, module in unet.named_modules() if name.endswith(".fuser.attn")}
    heard, now = BoxAttention(), {"rows": None, "tokens": 0, "latents": (0, 0), "time": math.inf, "masks": None}
    for name in layers:
        heard.gates[name] = float(unet.get_parameter(name.removesuffix("attn") + "alpha_attn").detach().tanh().abs())

    def begins(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("cross_attention_kwargs") or {}).get("gligen")
        sample, time = args[0] if args else kwargs["sample"], args[1] if len(args) > 1 else kwargs["timestep"]
        if given is not None:
            time, masks = float(torch.as_tensor(time).max()), given["masks"]
            # a sampler of second order asks twice at one time, a second drawing of one step does with its own tokens
            if time > now["time"] or (time == now["time"] and masks is not now["masks"]):
                raise InteractionError("record_boxes hears one drawing, of images that are drawn at once: begin "
                                       "another 'with' block for the next ones")
            now["time"], now["masks"] = time, masks
        now["rows"] = None if given is None else given["masks"].any(dim=1).nonzero().flatten().tolist()
        now["tokens"] = 0 if given is None else given["masks"].shape[1]
        now["latents"] = tuple(sample.shape[-2:])

    def hear(name: str, call: AttentionCall) -> bool:
        if not now["rows"]:
            return True
        tokens, pixels = now["tokens"], call.query.shape[2] - now["tokens"]
        query, key = call.query[now["rows"]][:, :, :pixels], call.key[now["rows"]]  # [rows, heads, pixels or keys, d]
        shares = column_shares(query, key, slice(pixels, pixels + tokens), None, call.scale).mean(1)
        grid = pixel_grid(pixels, *now["latents"])
        maps = shares.transpose(1, 2).unflatten(2, grid).float().cpu()  # [rows, tokens, height, width]
        heard.sums[name] = heard.sums[name] + maps if name in heard.sums else maps
        heard.steps[name] = heard.steps.get(name, 0) + 1
        return True

    handle = unet.register_forward_pre_hook(begins, with_kwargs=True)
    try:
        with torch.no_grad(), tap(layers, hear, lambda _name, _heard: None, lambda: True):
            yield heard
    finally:
        handle.remove()
