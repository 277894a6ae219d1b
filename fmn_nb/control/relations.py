"""Relations between two boxes: what each action means in the picture, and where it puts things without a box.

A box is (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 from the left and 0 <= y0 < y1 <= 1 from the top. An action here is
geometry, so that whether a picture shows it can be checked exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Box = tuple[float, float, float, float]
APART, APART_SMALL = 0.2, 0.6  # side by side, centres are APART apart, or by this share of their mean size if less


def between(subject: Box, other: Box) -> Box:
    """The box of the action: the middle two of the boxes' four x's, and of their four y's.

    It is the gap between boxes that are apart and the common part of boxes that overlap. Source: Hoe et al.,
    InteractDiffusion, arXiv 2312.05849, section 3.
    """
    _, x0, x1, _ = sorted((subject[0], subject[2], other[0], other[2]))
    _, y0, y1, _ = sorted((subject[1], subject[3], other[1], other[3]))
    return x0, y0, x1, y1


def union(subject: Box, other: Box) -> Box:
    """The smallest box around both."""
    return (min(subject[0], other[0]), min(subject[1], other[1]), max(subject[2], other[2]), max(subject[3], other[3]))


def centre(box: Box) -> tuple[float, float]:
    """Its centre (x, y)."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def area(box: Box) -> float:
    """The share of the image that it covers."""
    return (box[2] - box[0]) * (box[3] - box[1])


@dataclass(frozen=True)
class Relation:
    """What an action means.

    Attributes:
        direction: "row" if the two stand side by side, "column" if one stands above the other, "nested" if the boxes
            overlap.
        test: (subject's box, object's box, slack) -> whether it holds; `slack` widens every limit.
        subject, other: their boxes in the unit square by default.
    """

    direction: Literal["row", "column", "nested"]
    test: Callable[[Box, Box, float], bool]
    subject: Box
    other: Box


def _apart(one: Box, other: Box, axis: int) -> float:
    """How far apart along an axis the centres of two boxes must be to count as beside each other."""
    return min(APART, APART_SMALL * (one[axis + 2] - one[axis] + other[axis + 2] - other[axis]) / 2)


def _above(one: Box, other: Box, slack: float) -> bool:
    (x, y), (u, v) = centre(one), centre(other)
    return v - y >= _apart(one, other, 1) - slack and abs(u - x) <= v - y


def _left_of(one: Box, other: Box, slack: float) -> bool:
    (x, y), (u, v) = centre(one), centre(other)
    return u - x >= _apart(one, other, 0) - slack and abs(v - y) <= u - x


def _inside(one: Box, other: Box, slack: float) -> bool:
    rim = 0.03 + slack
    within = all(one[i] >= other[i] - rim and one[i + 2] <= other[i + 2] + rim for i in (0, 1))
    return within and area(one) <= 0.5 * area(other)


def _carrying(one: Box, other: Box, slack: float) -> bool:
    """The object is smaller and overlaps the lower third of the subject."""
    x, y = centre(other)
    depth = (y - one[1]) / (one[3] - one[1])
    return (area(other) <= 0.6 * area(one) and one[0] - slack <= x <= one[2] + slack
            and 0.55 - 2 * slack <= depth <= 1.1 + 2 * slack)


def _chasing(one: Box, other: Box, slack: float) -> bool:
    """The subject is close behind, at the same height; everyone runs to the left, where most drawings look."""
    level = abs(centre(one)[1] - centre(other)[1]) <= 0.08 + slack
    return _left_of(other, one, slack) and level and -0.02 - slack <= one[0] - other[2] <= 0.2 + slack


def _holding_up(one: Box, other: Box, slack: float) -> bool:
    """The object stands on the subject's head."""
    aligned = abs(centre(one)[0] - centre(other)[0]) <= 0.12 + slack
    return _above(other, one, slack) and aligned and -0.12 - slack <= one[1] - other[3] <= 0.06 + slack


_LEFT, _RIGHT = (0.04, 0.30, 0.44, 0.70), (0.56, 0.30, 0.96, 0.70)
_UP, _DOWN = (0.30, 0.04, 0.70, 0.44), (0.30, 0.56, 0.70, 0.96)
#: action -> what it means
RELATIONS: dict[str, Relation] = {
    "above": Relation("column", _above, _UP, _DOWN),
    "below": Relation("column", lambda one, other, slack: _above(other, one, slack), _DOWN, _UP),
    "left of": Relation("row", _left_of, _LEFT, _RIGHT),
    "right of": Relation("row", lambda one, other, slack: _left_of(other, one, slack), _RIGHT, _LEFT),
    "inside": Relation("nested", _inside, (0.35, 0.35, 0.65, 0.65), (0.14, 0.14, 0.86, 0.86)),
    "carrying": Relation("nested", _carrying, (0.14, 0.14, 0.86, 0.86), (0.35, 0.65, 0.65, 0.95)),
    "chasing": Relation("row", _chasing, (0.52, 0.30, 0.92, 0.70), (0.08, 0.30, 0.48, 0.70)),
    "holding up": Relation("column", _holding_up, (0.30, 0.52, 0.70, 0.92), (0.30, 0.08, 0.70, 0.48)),
}
ACTIONS = tuple(RELATIONS)


def holds(action: str, subject: Box, other: Box, slack: float = 0.0) -> bool:
    """Whether the boxes stand as the action says; `slack` is for boxes that were found, not given."""
    return RELATIONS[action].test(subject, other, slack)
