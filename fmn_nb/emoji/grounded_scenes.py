"""Scenes with known boxes and relations: who does what to whom, composed of sprites, so that the truth is exact.

A scene holds one to three things, each in a box of its own, or one or two interactions; a few are ordinary scenes
without grounding. The boxes fit the drawings' outlines, and each scene's relations hold for them by `relations.holds`.
Some pairs of objects are held out: no training scene shows them together.

Sizes are those of the ordinary scenes, and many places lie on a coarse grid, since the frozen emoji model only ever
drew things of two sizes in three places. With free sizes and places throughout, the gated layers learned where things
stand, but hardly what they are.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fmn_nb.control import ACTIONS, RELATIONS, Box, Interaction, holds
from fmn_nb.emoji.scenes import Placed, Renderer, Scene, sample_scenes
from fmn_nb.emoji.world import BACKGROUNDS, IMAGE_SIZE, OBJECTS, OPENINGS, STYLES, caption

HELD_OUT_PAIRS = 0.12  # of all pairs of objects
#: how often a scene is of each sort; "plain" are ordinary scenes without grounding
SHARES = {"thing": 0.2, "things": 0.1, "one": 0.35, "two": 0.25, "plain": 0.1}
#: what a caption says: the things themselves, only style and background, other things than the boxes, nothing
CAPTIONS = {"named": 0.5, "neutral": 0.2, "conflicting": 0.15, "empty": 0.15}
MIDDLES = (16, 32, 48)  # pixels: a grid for things' middles, in either direction
BETWEEN = (24, 40)  # half-way between them
ON_GRID = 0.5  # how often a free thing's coordinate is on the grid; otherwise it is anywhere from the first to the last
CLOSE = (18, 46)  # where the middles of two lie along their line if one chases the other or holds it up
SMALL, LARGE, TINY = (29, 31), (47, 51), (20, 22)  # pixels: of several things, of one, of one inside another
LARGE_SHARE = 0.3  # of the scenes of one thing
Square = tuple[int, int, int]  # x, y, size in pixels


@dataclass(frozen=True)
class GroundedScene:
    """A scene, and the interactions that it shows with their exact boxes; none in an ordinary scene."""

    scene: Scene
    interactions: tuple[Interaction, ...]

    @property
    def names(self) -> list[str]:
        """The things that the interactions name, in their order."""
        return [name for one in self.interactions for name in (one.subject, one.object) if name]

    def image(self, renderer: Renderer) -> np.ndarray:
        """[height, width, 3] uint8; a thin rim separates overlapping things."""
        nested = any(one.action and RELATIONS[one.action].direction == "nested" for one in self.interactions)
        return renderer.image(self.scene, halo=1 if nested else 0)

    def caption(self, rng: random.Random, sort: str | None = None) -> str:
        """A random caption, or one of a sort (`CAPTIONS`)."""
        if not self.interactions:
            return self.scene.caption(rng) if rng.random() < 0.5 else ""
        sort = sort or rng.choices(list(CAPTIONS), list(CAPTIONS.values()))[0]
        if sort == "empty":
            return ""
        style = self.scene.style if rng.random() < 0.9 else None
        background = self.scene.background if rng.random() < 0.33 else None
        if sort == "neutral":
            return neutral_caption(style, background)
        names = self.names if sort == "named" else rng.sample([o for o in OBJECTS if o not in self.names], 2)
        return caption(names[:2], style, background, rng.choice(OPENINGS))


def neutral_caption(style: str | None = None, background: str | None = None) -> str:
    """A caption that names no thing: "a photo in the style of noto"."""
    return " ".join(["a photo", *([f"in the style of {style}"] if style else []),
                     *([f"on a {background} background"] if background else [])])


def is_held_out(names: Sequence[str]) -> bool:
    """Whether two of the names are a pair that no training scene shows together."""
    digests = (hashlib.sha256(f"pair {' and '.join(sorted(pair))}".encode()).digest()[0]
               for pair in combinations(names, 2))
    return any(first < 256 * HELD_OUT_PAIRS for first in digests)


def sample_grounded(count: int, seed: int, renderer: Renderer, *, held_out: bool = False,
                    without: Sequence[str] = (), sorts: dict[str, float] = SHARES) -> list[GroundedScene]:
    """`count` scenes, the same for the same arguments; with `held_out`, only pairs of objects never trained on.

    `without` names objects and styles that must not appear (for an oracle). `sorts` may also have "between": one thing
    half-way between the places of training.
    """
    rng, scenes = random.Random(f"grounded-{seed}"), []
    while len(scenes) < count:
        sort = rng.choices(list(sorts), list(sorts.values()))[0]
        if sort == "plain":
            plain = sample_scenes(1, rng.randrange(2**31), without=without, sorts={"single": 0.5, "pair": 0.5})[0]
            scenes.append(GroundedScene(plain, ()))
            continue
        scene = _sample(sort, rng, renderer, frozenset(without))
        if scene is not None and (len(scene.names) == 1 or is_held_out(scene.names) == held_out):
            scenes.append(scene)
    return scenes


def _sample(sort: str, rng: random.Random, renderer: Renderer, without: frozenset[str]) -> GroundedScene | None:
    """A scene of a sort; None if it would show something in `without`, or if a relation doesn't hold."""
    count = {"thing": 1, "between": 1, "things": rng.randint(2, 3), "one": 2, "two": 4}[sort]
    names, style = rng.sample(list(OBJECTS), count), rng.choice(list(STYLES))
    if {style, *names} & without:
        return None
    actions = _actions(sort, rng)
    if sort == "between":
        squares = [_square(rng, (rng.choice(BETWEEN), rng.choice(BETWEEN)))]
    else:
        squares = _squares(actions, rng) if actions else _alone(count, rng)
    placed = [Placed(name, name, *square) for name, square in zip(names, squares, strict=True)]
    boxes = [outline_box(renderer, one, style) for one in placed]
    interactions = [Interaction(names[2 * i], action, names[2 * i + 1], boxes[2 * i], boxes[2 * i + 1])
                    for i, action in enumerate(actions)]
    if not all(holds(one.action, one.subject_box, one.object_box) for one in interactions):
        return None
    interactions = interactions or [Interaction(n, subject_box=box) for n, box in zip(names, boxes, strict=True)]
    items = tuple(sorted(placed, key=lambda one: -one.size) if count == 2 else placed)  # the small one in front
    return GroundedScene(Scene(sort, items, style, rng.choice(list(BACKGROUNDS)), rng.randint(-4, 4)),
                         tuple(interactions))


def outline_box(renderer: Renderer, item: Placed, style: str) -> Box:
    """The box of a drawing's outline in the image, as fractions, inside the image."""
    x0, y0, x1, y1 = renderer.extent(item.label, style)
    sides = (item.x + x0 * item.size, item.y + y0 * item.size, item.x + x1 * item.size, item.y + y1 * item.size)
    return tuple(round(min(max(side / IMAGE_SIZE, 0.0), 1.0), 4) for side in sides)


# ---- where things stand ----------------------------------------------------------------------------------------------


def _actions(sort: str, rng: random.Random) -> list[str]:
    """What is done in a scene of a sort: nothing, one action, or two that are both rows or both columns."""
    if sort not in ("one", "two"):
        return []
    actions = [rng.choice(ACTIONS)]
    if sort == "two":
        direction = rng.choice(("row", "column"))
        actions = rng.choices([action for action in ACTIONS if RELATIONS[action].direction == direction], k=2)
    return actions


def _alone(count: int, rng: random.Random) -> list[Square]:
    """The squares of things that do nothing: one large in the middle or small anywhere, several in different corners.
    """
    if count == 1 and rng.random() < LARGE_SHARE:
        return [_square(rng, (IMAGE_SIZE // 2,) * 2, LARGE, 2)]
    if count == 1:
        return [_square(rng, (_place(rng), _place(rng)))]
    corners = [(x, y) for x in MIDDLES[::2] for y in MIDDLES[::2]]
    return [_square(rng, corner) for corner in rng.sample(corners, count)]


def _squares(actions: Sequence[str], rng: random.Random) -> list[Square]:
    """The squares of subject and object of each interaction, one after another."""
    if RELATIONS[actions[0]].direction == "nested":
        return _nested(actions[0], rng)
    if len(actions) == 1:
        one = _place(rng)
        close = actions[0] in ("chasing", "holding up")
        other = one if close else min(max(one + rng.choice((-16, 0, 16)), MIDDLES[0]), MIDDLES[-1])
        return _line(actions[0], rng, (one, other))
    sides = rng.sample(MIDDLES[::2], 2)
    return [square for action, side in zip(actions, sides, strict=True) for square in _line(action, rng, (side, side))]


def _line(action: str, rng: random.Random, across: tuple[int, int]) -> list[Square]:
    """Two squares side by side or one above the other; `across` are their middles in the other direction."""
    along = CLOSE if action in ("chasing", "holding up") else MIDDLES[::2]
    upright = RELATIONS[action].direction == "column"
    first, second = (_square(rng, middle[::-1] if upright else middle) for middle in zip(along, across, strict=True))
    return [first, second] if action in ("left of", "above") else [second, first]


def _nested(action: str, rng: random.Random) -> list[Square]:
    """A small square that overlaps a large one: in its middle, or at its lower third."""
    x, y, size = large = _square(rng, (IMAGE_SIZE // 2,) * 2, LARGE, 2)
    right, down = (0.5, 0.5) if action == "inside" else (rng.choice((0.2, 0.5, 0.8)), 0.88)
    small = _square(rng, (round(x + right * size), round(y + down * size)), TINY)
    return [small, large] if action == "inside" else [large, small]


def _place(rng: random.Random) -> int:
    """A coordinate of a free thing's middle."""
    return rng.choice(MIDDLES) if rng.random() < ON_GRID else rng.randint(MIDDLES[0], MIDDLES[-1])


def _square(rng: random.Random, middle: tuple[int, int], sizes: tuple[int, int] = SMALL, jitter: int = 1) -> Square:
    """A square inside the image around a middle, about that large and about there."""
    size = rng.randint(*sizes)
    x, y = (min(max(at - size // 2 + rng.randint(-jitter, jitter), 0), IMAGE_SIZE - size) for at in middle)
    return x, y, size
