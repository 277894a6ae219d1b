"""Build up a picture turn by turn, "a cat", "add a frog chasing it", "move the cat up", and undo turns.

A turn is a line of text that changes a list of interactions. Where things stand follows from what they do until a turn
moves one of them; from then on, all that is there keeps its place. This is plain grammar over the words that a model
knows, not a language model: it refuses in one line what it doesn't understand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fmn_nb.control.interaction import Interaction, InteractionError, checked_box, laid_out, parse_interactions
from fmn_nb.control.relations import ACTIONS, Box, holds

TURNS = ('write "a cat", "add a frog chasing it", "move the cat up", "make the cat larger", "remove the frog", or '
         "cat=chasing=frog")
STEP, GROWTH = 0.1, 1.25  # of a move, in fractions of the image; of a size
LARGE, AMONG_OTHERS = 0.5, 0.6  # a lone thing beyond this size becomes so much smaller where another has no room
_DIRECTIONS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
_GROWTHS = {"larger": GROWTH, "bigger": GROWTH, "smaller": 1 / GROWTH}
_ARTICLE = r"(?:a|an|the|one)\s+"
_NAME = rf"(?:{_ARTICLE})?(.+?)"


@dataclass
class Turns:
    """The turns so far, and the interactions after each; the last of these are drawn.

    What has no box in `states` stands where its action puts it.
    """

    said: list[str] = field(default_factory=list)
    states: list[tuple[Interaction, ...]] = field(default_factory=lambda: [()])

    @property
    def interactions(self) -> list[Interaction]:
        """The current interactions, every thing with a box."""
        return laid_out(self.states[-1])

    def say(self, turn: str) -> list[Interaction]:
        """Take a turn; one that can't be understood raises InteractionError and leaves everything as it was."""
        self.put(after(self.states[-1], turn), " ".join(turn.split()))
        return self.interactions

    def put(self, interactions: Sequence[Interaction], said: str) -> None:
        """Make these the current interactions, as a turn of its own."""
        laid_out(interactions)  # refuses what has no place
        self.states.append(tuple(interactions))
        self.said.append(said)

    def undo(self) -> str:
        """Take back the last turn and return it; "" if there is none."""
        if not self.said:
            return ""
        self.states.pop()
        return self.said.pop()


def after(interactions: Sequence[Interaction], turn: str) -> list[Interaction]:
    """The interactions after a turn; a turn that moves or sizes something gives all of them boxes.

    Raises:
        InteractionError: it isn't understood, names a thing that isn't there, or says what is there already.
    """
    text = " ".join(str(turn).split()).rstrip(".")
    if "=" in text:
        return _joined(interactions, parse_interactions(text))
    if match := re.fullmatch(rf"move\s+{_NAME}\s+(up|down|left|right)(?:\s+by\s+(\d*\.?\d+))?", text, re.I):
        name, direction, by = match.groups()
        dx, dy = (side * (float(by) if by else STEP) for side in _DIRECTIONS[direction.lower()])
        return changed(laid_out(interactions), name, lambda box: moved(box, dx, dy))
    if match := re.fullmatch(rf"make\s+{_NAME}\s+(larger|bigger|smaller)", text, re.I):
        name, how = match.groups()
        return changed(laid_out(interactions), name, lambda box: grown(box, _GROWTHS[how.lower()]))
    if match := re.fullmatch(rf"(?:remove|delete|take away)\s+(?:{_ARTICLE})?(.+)", text, re.I):
        return _without(interactions, match[1])
    return _added(interactions, re.sub(r"^(?:add|draw|now)\s+", "", text, flags=re.I))


def _added(interactions: Sequence[Interaction], text: str) -> list[Interaction]:
    """Add "a cat", "a frog chasing it" or "a frog chasing the cat"."""
    for action in ACTIONS:
        match = re.fullmatch(rf"{_NAME}\s+(?:is\s+|that is\s+)?{action}\s+(.+)", text, re.I)
        if match is None:
            continue
        subject, other = (re.sub(f"^{_ARTICLE}", "", one, flags=re.I) for one in match.groups())
        if other.lower() == "it":
            if not interactions:
                raise InteractionError(f"'{text}': there is nothing yet that 'it' could mean; begin with a thing")
            other = list(things_of(laid_out(interactions)))[-1]
        return _with_action(interactions, Interaction(subject, action, other))
    match = re.fullmatch(rf"(?:{_ARTICLE})?([\w ]+)", text, re.I)
    if match is None or not match[1].strip() or len(match[1].split()) > 3:
        raise InteractionError(f"'{text}' is not understood: {TURNS}")
    return _with_thing(interactions, Interaction(match[1]))


def _joined(interactions: Sequence[Interaction], more: Sequence[Interaction]) -> list[Interaction]:
    """Add several interactions: as they are if each names what nothing else does, and otherwise one after another."""
    names = [name for one in more for name in (one.subject, one.object) if name]
    if not _named(interactions) & {*names} and len(names) == len({*names}):
        return [*interactions, *more]
    for new in more:
        interactions = (_with_action if new.action else _with_thing)(interactions, new)
    return list(interactions)


def _named(interactions: Sequence[Interaction]) -> set[str]:
    return {name for one in interactions for name in (one.subject, one.object) if name}


def _with_thing(interactions: Sequence[Interaction], new: Interaction) -> list[Interaction]:
    """Add a thing that isn't there yet."""
    if new.subject in _named(interactions):
        raise InteractionError(f"there is {new.subject} already; move it, or add something else")
    return [*interactions, new]


def _with_action(interactions: Sequence[Interaction], new: Interaction) -> list[Interaction]:
    """Add an interaction: a lone thing that it names becomes part of it, smaller if it leaves no room for the other,
    and one that already does something keeps its place, as all others do then."""
    names = (new.subject, new.object)
    if new.subject == new.object:
        raise InteractionError(f"'{new}': in turns, {new.subject} is one thing and can't be both; give "
                               "draw_interactions boxes for two of them")
    if any(str(one) == str(new) for one in interactions):
        raise InteractionError(f"{new.subject} is {new.action} {new.object} already; say something else")
    if any(one.action and {one.subject, one.object} & {*names} for one in interactions):
        interactions = laid_out(interactions)
    boxes = things_of(interactions)
    rest = [one for one in interactions if one.action or one.subject not in names]
    new = replace(new, subject_box=boxes.get(new.subject), object_box=boxes.get(new.object))
    if new.object_box is not None and new.subject not in things_of(rest):  # the subject goes to its place
        new = replace(new, subject_box=None)
    lone = {one.subject for one in interactions if not one.action}
    smaller = {f"{side}_box": grown(box, AMONG_OTHERS) for side in ("subject", "object")
               if getattr(new, side) in lone and (box := getattr(new, f"{side}_box")) and min(_sides(box)) > LARGE}
    for tried in (new, replace(new, **smaller)):
        placed = laid_out([*rest, tried])[-1]
        if tried == placed or holds(placed.action, placed.subject_box, placed.object_box):  # boxes that are all given
            return [*rest, tried]
    there, missing = (new.subject, new.object) if new.subject_box else (new.object, new.subject)
    raise InteractionError(f"'{new}': there is no room for {missing} there; move {there}, or make it smaller")


def _sides(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def _without(interactions: Sequence[Interaction], name: str) -> list[Interaction]:
    _check_there(laid_out(interactions), name)
    kept, there = [], _named([one for one in interactions if name not in (one.subject, one.object)])
    for one in interactions:
        if name not in (one.subject, one.object):
            kept.append(one)
        elif one.action:  # the other one stays, alone, unless it does something else
            alone = (one.object, one.object_box) if name == one.subject else (one.subject, one.subject_box)
            if alone[0] not in there:
                kept.append(Interaction(alone[0], subject_box=alone[1]))
                there.add(alone[0])
    return kept


# ---- things and their boxes ------------------------------------------------------------------------------------------


def things_of(interactions: Sequence[Interaction]) -> dict[str, Box]:
    """Every thing that has a box, with this box, in the order of naming."""
    return {name: box for one in interactions
            for name, box in ((one.subject, one.subject_box), (one.object, one.object_box)) if name and box}


def changed(interactions: Sequence[Interaction], name: str, change: Callable[[Box], Box]) -> list[Interaction]:
    """The interactions with the box of one thing changed (`change`: box -> box), wherever it is named.

    Raises:
        InteractionError: it isn't there, or the new box is invalid.
    """
    _check_there(interactions, name)
    new = []
    for one in interactions:
        if one.subject == name and one.subject_box:
            one = replace(one, subject_box=checked_box(change(one.subject_box), f"the box of {name}"))
        if one.object == name and one.object_box:
            one = replace(one, object_box=checked_box(change(one.object_box), f"the box of {name}"))
        new.append(one)
    return new


def moved(box: Box, dx: float, dy: float) -> Box:
    """A box moved, as far as the image allows."""
    dx, dy = (min(max(d, -box[i]), 1 - box[i + 2]) for i, d in ((0, dx), (1, dy)))
    return tuple(round(v, 4) for v in (box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy))


def grown(box: Box, times: float) -> Box:
    """A box grown or shrunk about its centre, as far as the image allows."""
    sides = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        half, middle = (high - low) * times / 2, (low + high) / 2
        sides.append((max(0.0, middle - half), min(1.0, middle + half)))
    (x0, x1), (y0, y1) = sides
    return tuple(round(v, 4) for v in (x0, y0, x1, y1))


def _check_there(interactions: Sequence[Interaction], name: str) -> None:
    if name not in (things := things_of(interactions)):
        raise InteractionError(f"there is no {name}; there is {', '.join(things) or 'nothing yet'}")
