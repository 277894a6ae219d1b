"""Judges whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from PIL import Image

from fmn_nb.concepts import Concept, Verdict
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import Drawing, drawings, judge_images

Seen = tuple[str | Sequence[str], str]  # a label or several, and a style


class Puppet:
    """A judge that sees what a function says of (the number of the call, the number of the image)."""

    def __init__(self, sees: Callable[[int, int], Seen]) -> None:
        self.sees, self.calls = sees, 0

    def verdicts(self, images: Sequence[Any]) -> list[Verdict]:
        answers = [self.sees(self.calls, i) for i in range(len(images))]
        self.calls += 1
        labels = [[label] if isinstance(label, str) else label for label, _ in answers]
        return [Verdict(seen[0], style, frozenset(seen), 1.0)
                for seen, (_, style) in zip(labels, answers, strict=True)]


def cats(*calls: int | set[int]) -> Puppet:
    """Sees a cat in the first so many images of each call, or in those that a set lists, and a dog in the rest."""
    def sees(call: int, image: int) -> Seen:
        there = calls[call]
        return ("cat" if (image in there if isinstance(there, set) else image < there) else "dog"), "noto"

    return Puppet(sees)


def outcomes(concept: Concept, sees: Callable[[Drawing], Seen], wanted: Sequence[Drawing] | None = None,
             ) -> pd.DataFrame:
    """What a judge saw that sees in each drawing's image what a function says of it; by default the full protocol."""
    wanted = drawings(concept, VOCABULARY, size="full") if wanted is None else wanted
    judge = Puppet(lambda call, image: sees(wanted[image]))
    return judge_images(judge, concept, wanted, [picture()] * len(wanted), VOCABULARY)


def picture(number: int = 0) -> Image.Image:
    """A small image of two colours, its own for each number: of one colour it would be nothing to judge."""
    image = Image.new("RGB", (4, 4), (number % 256, number // 256 % 256, 128))
    image.putpixel((1, 2), (255, 255, 255))
    return image


def faithful(drawing: Drawing) -> Seen:
    """What a drawing asks for."""
    labels = [drawing.label, *drawing.other] if drawing.domain == "object" else [drawing.label or "nothing"]
    return labels, drawing.style or "noto"
