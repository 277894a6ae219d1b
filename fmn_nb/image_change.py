"""How far images moved, pixel by pixel: no judgement of what they show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def image_change(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    """Mean absolute difference of the pixels of two lists of images, from 0 (the same) to 1 (black against white).

    Raises:
        ValueError: no images, or lists or images of different sizes.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} images against {len(second)}; give as many on both sides, at least one")
    one, other = (np.stack([np.asarray(image.convert("RGB"), float) for image in images]) for images in (first, second))
    if one.shape != other.shape:
        raise ValueError(f"images of {one.shape[1:3]} against {other.shape[1:3]} pixels can't be compared")
    return float(np.abs(one - other).mean() / 255)
