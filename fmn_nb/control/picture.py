"""Interactions to look at: their boxes as a drawing, over an image or on white, and a table in words."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from PIL import Image, ImageDraw

from fmn_nb.control.interaction import Interaction, laid_out

COLOURS = {"subject": "#c1121f", "object": "#1d4ed8", "action": "#333333"}


def boxes_picture(interactions: Sequence[Interaction], image: Image.Image | None = None,
                  size: int = 256) -> Image.Image:
    """The boxes with their names, `size` pixels high and wide: subjects red, objects blue, the box between dashed."""
    canvas = Image.new("RGB", (size, size), "white")
    if image is not None:
        canvas = image.convert("RGB").resize((size, size), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for one in laid_out(interactions):
        for role, name, box in (("subject", one.subject, one.subject_box), ("object", one.object, one.object_box),
                                ("action", one.action, one.between)):
            if not name or box is None:
                continue
            x0, y0, x1, y1 = (round(side * (size - 1)) for side in box)
            if role == "action":
                _dashed(pen, (x0, y0, x1, y1), COLOURS[role])
            else:
                pen.rectangle((x0, y0, x1, y1), outline=COLOURS[role], width=2)
                pen.text((x0 + 4, y0 + 3), name, fill=COLOURS[role])
    return canvas


def _dashed(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str, dash: int = 4) -> None:
    x0, y0, x1, y1 = box
    for x in range(x0, x1, 2 * dash):
        for y in (y0, y1):
            pen.line((x, y, min(x + dash, x1), y), fill=colour, width=2)
    for y in range(y0, y1, 2 * dash):
        for x in (x0, x1):
            pen.line((x, y, x, min(y + dash, y1)), fill=colour, width=2)


def boxes_table(interactions: Sequence[Interaction]) -> pd.DataFrame:
    """The boxes in words: a row for each thing and each action, its role, and the four sides of its box."""
    rows = []
    for number, one in enumerate(laid_out(interactions), start=1):
        for role, name, box in (("subject", one.subject, one.subject_box), ("object", one.object, one.object_box),
                                ("action", one.action, one.between)):
            if name and box is not None:
                rows.append({"interaction": number, "role": role, "word": name,
                             **dict(zip(("left", "top", "right", "bottom"), (round(v, 2) for v in box), strict=True))})
    return pd.DataFrame(rows, columns=["interaction", "role", "word", "left", "top", "right", "bottom"])
