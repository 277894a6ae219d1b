"""Images with known answers: real scenes as a model without a fault would draw them, and what forgetting may do."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fmn_nb.emoji.scenes import Placed, Scene
from fmn_nb.emoji.world import IDENTITIES, IMAGE_SIZE


def faultless(world, wanted) -> list[Image.Image]:
    """The scene that each drawing asks for."""
    return [Image.fromarray(world.renderer.image(_scene(drawing))) for drawing in wanted]


def noise(wanted) -> list[Image.Image]:
    """Nothing but noise."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)) for _ in wanted]


def without(world, wanted, label: str, instead: str) -> list[Image.Image]:
    """A faultless model that draws `instead` wherever `label` is asked for."""
    return [Image.fromarray(world.renderer.image(_scene(drawing, {label: instead}))) for drawing in wanted]


def _scene(drawing, renamed=None) -> Scene:
    labels = [drawing.label, *drawing.other] if drawing.domain == "object" else drawing.other or [drawing.label]
    style = drawing.style or (IDENTITIES[drawing.label].style if drawing.label in IDENTITIES else "noto")
    size = 49 if len(labels) == 1 else 30
    centres = [32] if len(labels) == 1 else [16, 48]
    items = tuple(Placed((renamed or {}).get(label, label), label, centre - size // 2, 32 - size // 2, size)
                  for label, centre in zip(labels, centres, strict=True))
    return Scene("test", items, style, "blue", 0)
