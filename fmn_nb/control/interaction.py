"""An interaction: who does what to whom, and where. Its text form, and boxes if none are given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fmn_nb.control.relations import ACTIONS, RELATIONS, Box, area, between, centre, holds
from fmn_nb.models.arguments import finite_number

FORM = "write SUBJECT=ACTION=OBJECT, several with ; between them, such as cat=chasing=frog; dog=above=key"
ALONE: Box = (0.15, 0.15, 0.85, 0.85)  # of one thing without a box
SHRUNK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # how much smaller a box may be to fit beside another one


class InteractionError(ValueError):
    """An interaction can't be drawn because of a word, a box or their number; the message says which and what to do."""


@dataclass(frozen=True)
class Interaction:
    """Who does what to whom: "cat", "chasing", "frog". A subject alone, `Interaction("cat")`, is a thing in a box.

    Attributes:
        subject, action, object: words; action and object are both there or both "".
        subject_box, object_box: (x0, y0, x1, y1) in [0, 1] from the top left, or None: `laid_out` finds places.

    Raises:
        InteractionError: a word is missing; a box isn't four numbers, lies outside [0, 1] or is turned inside out; an
            object's box is given without an object.
    """

    subject: str
    action: str = ""
    object: str = ""
    subject_box: Box | None = None
    object_box: Box | None = None

    def __post_init__(self) -> None:
        for name in ("subject", "action", "object"):
            word = getattr(self, name)
            if not isinstance(word, str):
                raise InteractionError(f"the {name} must be a word, not {word!r}")
            object.__setattr__(self, name, " ".join(word.split()))
        if not self.subject or bool(self.action) != bool(self.object):
            said = "=".join((self.subject, self.action, self.object))
            raise InteractionError(f"'{said}' lacks a word: {FORM}")
        if self.object_box is not None and not self.object:
            raise InteractionError(f"a box for the object of '{self.subject}', which has none: name action and object")
        for name in ("subject_box", "object_box"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_box(getattr(self, name), f"the {name.replace('_', ' ')}"))

    @property
    def between(self) -> Box | None:
        """The box of the action; None if a box is missing."""
        if not self.action or self.subject_box is None or self.object_box is None:
            return None
        return between(self.subject_box, self.object_box)

    def __str__(self) -> str:
        return "=".join((self.subject, self.action, self.object)) if self.action else self.subject

    @property
    def words(self) -> str:
        """In words, with the boxes: "cat (x 0.10 to 0.50, y 0.30 to 0.70) chasing frog (...)"."""
        parts = [self.subject, _in_words(self.subject_box)]
        if self.action:
            parts += [self.action, self.object, _in_words(self.object_box)]
        return " ".join(part for part in parts if part)


def _in_words(box: Box | None) -> str:
    return "" if box is None else f"(x {box[0]:.2f} to {box[2]:.2f}, y {box[1]:.2f} to {box[3]:.2f})"


def checked_box(box: Any, name: str) -> Box:
    """(x0, y0, x1, y1) as floats; InteractionError names what is wrong with it."""
    try:
        values = tuple(box)
    except TypeError:
        values = ()
    if len(values) != 4 or isinstance(box, str | dict):
        raise InteractionError(f"{name} must be four numbers (x0, y0, x1, y1), not {box!r}")
    try:
        x0, y0, x1, y1 = (finite_number(f"each side of {name}", value) for value in values)
    except ValueError as error:
        raise InteractionError(str(error)) from None
    said = f"{name} ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if min(x0, y0, x1, y1) < 0 or max(x0, y0, x1, y1) > 1:
        raise InteractionError(f"{said} reaches out of the image: its sides are fractions from 0 to 1")
    if x0 >= x1 or y0 >= y1:
        raise InteractionError(f"{said} is turned inside out: x0 must be below x1 and y0 below y1")
    return x0, y0, x1, y1


def parse_interactions(text: str) -> list[Interaction]:
    """The interactions of a text such as "cat=chasing=frog; dog=above=key"; a word alone is a thing ("cat").

    Raises:
        InteractionError: no interaction, or a part with another number of words.
    """
    if not isinstance(text, str):
        raise InteractionError(f"give interactions as a text, not {text!r}: {FORM}")
    found = []
    for part in filter(str.strip, re.split(r"[;\n]", text)):
        words = [word.strip() for word in part.split("=")]
        if len(words) not in (1, 3) or not all(words):
            raise InteractionError(f"'{part.strip()}' is not an interaction: {FORM}")
        found.append(Interaction(*words))
    if not found:
        raise InteractionError(f"there is no interaction in '{text}': {FORM}")
    return found


def as_text(interactions: Sequence[Interaction]) -> str:
    """The text form, without boxes."""
    return "; ".join(map(str, interactions))


# ---- places for what has none ----------------------------------------------------------------------------------------


def laid_out(interactions: Sequence[Interaction]) -> list[Interaction]:
    """The interactions with a box for everything: given boxes stay, the others are placed as the action says.

    Several share the image: rows one below the other, columns side by side; a row beside a column takes the left two
    thirds. If only one box is given, the missing one has its size and is placed as the action says; where the image has
    too little room for it there, it is smaller, and where it has none, the missing box lies at the rim, whatever the
    action (`holds` tells).

    Raises:
        InteractionError: a box is missing and the action doesn't say where things stand.
    """
    places = _regions([RELATIONS[one.action].direction if one.action in RELATIONS else "row" for one in interactions])
    return [_with_boxes(one, place) for one, place in zip(interactions, places, strict=True)]


def _regions(directions: Sequence[str]) -> list[Box]:
    """A part of the image for each interaction."""
    rows, columns = (sum(d == wanted for d in directions) for wanted in ("row", "column"))
    nested = len(directions) - rows - columns
    rows += nested
    width = 1.0 if not columns else 0.0 if not rows else 0.67  # of what stands in rows
    regions, row, column = [], 0, 0
    for direction in directions:
        if direction == "column":
            each = (1 - width) / columns
            regions.append((width + column * each, 0.0, width + (column + 1) * each, 1.0))
            column += 1
        else:
            regions.append((0.0, row / rows, width, (row + 1) / rows))
            row += 1
    return regions


def _with_boxes(one: Interaction, region: Box) -> Interaction:
    if one.subject_box is not None and (not one.action or one.object_box is not None):
        return one
    if not one.action:
        return replace(one, subject_box=_within(ALONE, region, "nested"))
    if one.action not in RELATIONS:
        raise InteractionError(f"nobody knows where things stand for the action '{one.action}': give both boxes, or "
                               f"use one of {', '.join(ACTIONS)}")
    relation = RELATIONS[one.action]
    subject, other = (_within(box, region, relation.direction) for box in (relation.subject, relation.other))
    if one.subject_box is None and one.object_box is None:
        return replace(one, subject_box=subject, object_box=other)
    given, known, missing = ((one.object_box, other, subject) if one.subject_box is None
                             else (one.subject_box, subject, other))
    tried = [_beside(given, known, _shrunk(missing, known, times)) for times in SHRUNK]
    name = "object_box" if one.subject_box is not None else "subject_box"
    fitting = [new for box in tried if holds(one.action, *_boxes(new := replace(one, **{name: box})))]
    if relation.direction != "nested":  # beside it, not on it
        fitting = [new for most in (0.1, 0.5) for new in fitting if _common(*_boxes(new)) <= most]
    return fitting[0] if fitting else replace(one, **{name: tried[0]})


def _boxes(one: Interaction) -> tuple[Box, Box]:
    return one.subject_box, one.object_box


def _common(one: Box, other: Box) -> float:
    """The area that two boxes share, as a part of the smaller one's."""
    sides = [max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1)]
    return sides[0] * sides[1] / min(area(one), area(other))


def _shrunk(box: Box, to: Box, times: float) -> Box:
    """A box `times` as large, about the point of the box `to` that is nearest to its centre."""
    nearest = [min(max(middle, to[axis]), to[axis + 2]) for axis, middle in enumerate(centre(box))]
    return tuple(nearest[i % 2] + (side - nearest[i % 2]) * times for i, side in enumerate(box))


def _within(box: Box, region: Box, direction: str) -> Box:
    """A box of the unit square placed in a part of the image: along a row or a column it keeps its share of the length,
    and nothing is stretched."""
    wide, high = region[2] - region[0], region[3] - region[1]
    length = {"row": wide, "column": high, "nested": min(wide, high)}[direction]
    room = 0.94 * min(wide, high) if direction != "nested" else length
    shrink = min(1.0, room / (max(box[2] - box[0], box[3] - box[1]) * length))  # across, a row has less room
    cx, cy = centre(box)
    middle = (region[0] + wide / 2, region[1] + high / 2)
    along = {"row": (wide, length), "column": (length, high), "nested": (length, length)}[direction]
    cx, cy = middle[0] + (cx - 0.5) * along[0], middle[1] + (cy - 0.5) * along[1]
    half = [(box[i + 2] - box[i]) * length * shrink / 2 for i in (0, 1)]
    if direction == "row":  # what stands close goes on standing close
        cx, cy = middle[0] + (cx - middle[0]) * shrink, middle[1]
    if direction == "column":
        cx, cy = middle[0], middle[1] + (cy - middle[1]) * shrink
    return _kept((cx - half[0], cy - half[1], cx + half[0], cy + half[1]))


def _kept(box: Sequence[float]) -> Box:
    """The part of a box that lies in the image, rounded."""
    return tuple(round(min(max(value, 0.0), 1.0), 4) for value in box)


def _beside(given: Box, known: Box, missing: Box) -> Box:
    """Where `missing` stands if `known` stands at `given`: moved and scaled with it, and kept in the image."""
    sx, sy = ((given[i + 2] - given[i]) / (known[i + 2] - known[i]) for i in (0, 1))
    found = []
    for axis, scale in ((0, sx), (1, sy)):
        low = given[axis] + (missing[axis] - known[axis]) * scale
        size = min((missing[axis + 2] - missing[axis]) * scale, 1.0)
        low = min(max(low, 0.0), 1.0 - size)
        found.append((low, low + size))
    (x0, x1), (y0, y1) = found
    return tuple(round(v, 4) for v in (x0, y0, x1, y1))
