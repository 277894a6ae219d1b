"""Where things are in a drawn image, according to the judge alone: what a box shows, and where a thing is.

The judge learned images of one or two things on a plain background. So it gets the content of a box on the image's own
background, at the size of the things it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fmn_nb.control import Box
from fmn_nb.control.relations import centre
from fmn_nb.emoji.judges import Judge
from fmn_nb.emoji.world import IMAGE_SIZE
from fmn_nb.models import to_pixels

SHOWN = 44  # pixels of the longer side of what the judge is shown; the rest is background
MARGIN = 0.06  # of the image, around a box: a drawing may reach over its box by a few pixels
STRIDE = 5  # pixels between places that are looked at


@dataclass(frozen=True)
class Found:
    """Where a thing was found: its box (of the size asked for) and the judge's probability."""

    box: Box
    probability: float

    @property
    def there(self) -> bool:
        """Whether the judge believes that the thing is there."""
        return self.probability > 0.5


def cut_out(image: Image.Image | np.ndarray, box: Box) -> Image.Image:
    """The content of a box, a little wider, on the image's background (the median of its border)."""
    values = np.asarray(image)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(int(v) for v in np.median(border, axis=0)))
    height, width = values.shape[:2]
    x0, y0, x1, y1 = ((box[i] - MARGIN if i < 2 else box[i] + MARGIN) for i in range(4))
    x0, x1 = (min(max(x, 0.0), 1.0) * width for x in (x0, x1))
    y0, y1 = (min(max(y, 0.0), 1.0) * height for y in (y0, y1))
    scale = SHOWN * (1 + 2 * MARGIN) / max(x1 - x0, y1 - y0)
    size = (max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale)))
    part = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    canvas.paste(part, ((IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2))
    return canvas


def seen_in(judge: Judge, images: Sequence[Image.Image], boxes: Sequence[Box]) -> list[frozenset[str]]:
    """What the judge sees in each image's box."""
    return [verdict.seen for verdict in judge.verdicts([cut_out(*pair) for pair in zip(images, boxes, strict=True)])]


@torch.no_grad()
def find(judge: Judge, image: Image.Image, label: str, size: tuple[float, float]) -> Found:
    """Where in the whole image a thing of about this size (width and height, fractions) is most probable.

    Windows of this size stand every `STRIDE` pixels; the place is the middle of those that show most of the thing.
    """
    places = [_steps(1 - side) for side in size]
    boxes = [(x, y, x + size[0], y + size[1]) for y in places[1] for x in places[0]]
    pixels = to_pixels([cut_out(image, box) for box in boxes], IMAGE_SIZE)
    column = list(judge.config.labels).index(label)
    shares = torch.cat([judge(part.to(judge.dtype))[0][:, column].float().sigmoid() for part in pixels.split(128)])
    best = float(shares.max())
    weights = (shares >= 0.9 * best).float() * shares  # neighbours see the same thing: their middle is its place
    middle = (torch.tensor([centre(box) for box in boxes]) * weights[:, None]).sum(0) / weights.sum()
    x, y = (float(v) for v in middle)
    return Found((x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2), best)


def _steps(room: float) -> list[float]:
    """Where windows begin: every `STRIDE` pixels from 0 to `room`, which is included."""
    count = max(1, round(room * IMAGE_SIZE / STRIDE)) if room > 0 else 0
    return [room * number / count for number in range(count + 1)] if count else [0.0]
