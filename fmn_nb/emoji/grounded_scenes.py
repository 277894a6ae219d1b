"""Scenes with known boxes and relations: who does what to whom, composed of sprites, so that the truth is exact.

A scene holds one thing in a box, or one to three interactions; a few are ordinary scenes without grounding. The boxes
fit the drawings' outlines, and each scene's relations hold for them by `relations.holds`. Some pairs of objects are
held out: no training scene shows them together.
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
SHARES = {"thing": 0.15, "one": 0.45, "two": 0.25, "three": 0.05, "plain": 0.1}
#: what a caption says: the things themselves, only style and background, other things than the boxes, nothing
CAPTIONS = {"named": 0.5, "neutral": 0.2, "conflicting": 0.15, "empty": 0.15}
FACES = tuple(action for action in ACTIONS if RELATIONS[action].direction != "nested")  # several of these fit an image
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

    `without` names objects and styles that must not appear (for an oracle).
    """
    rng, scenes = random.Random(f"grounded-{seed}"), []
    while len(scenes) < count:
        sort = rng.choices(list(sorts), list(sorts.values()))[0]
        if sort == "plain":
            plain = sample_scenes(1, rng.randrange(2**31), without=without, sorts={"single": 0.5, "pair": 0.5})[0]
            scenes.append(GroundedScene(plain, ()))
            continue
        scene = _sample(sort, rng, renderer, frozenset(without))
        if scene is not None and (sort == "thing" or is_held_out(scene.names) == held_out):
            scenes.append(scene)
    return scenes


def _sample(sort: str, rng: random.Random, renderer: Renderer, without: frozenset[str]) -> GroundedScene | None:
    """A scene of a sort; None if it would show something in `without`, or if a relation doesn't hold."""
    count = {"thing": 1, "one": 2, "two": 4, "three": 6}[sort]
    names, style = rng.sample(list(OBJECTS), count), rng.choice(list(STYLES))
    if {style, *names} & without:
        return None
    if sort == "thing":
        size = rng.randint(20, 50)
        actions, squares = [""], [(*(rng.randint(0, IMAGE_SIZE - size) for _ in range(2)), size)]
    else:
        actions = rng.choices(FACES if count > 2 else ACTIONS, k=count // 2)
        squares = _squares(actions, rng)
    placed = [Placed(name, name, *square) for name, square in zip(names, squares, strict=True)]
    boxes = [outline_box(renderer, one, style) for one in placed]
    if sort == "thing":
        interactions = [Interaction(names[0], subject_box=boxes[0])]
    else:
        interactions = [Interaction(names[2 * i], action, names[2 * i + 1], boxes[2 * i], boxes[2 * i + 1])
                        for i, action in enumerate(actions)]
        if not all(holds(one.action, one.subject_box, one.object_box) for one in interactions):
            return None
    items = tuple(sorted(placed, key=lambda one: -one.size) if count == 2 else placed)  # the small one in front
    return GroundedScene(Scene(sort, items, style, rng.choice(list(BACKGROUNDS)), rng.randint(-4, 4)),
                         tuple(interactions))


def outline_box(renderer: Renderer, item: Placed, style: str) -> Box:
    """The box of a drawing's outline in the image, as fractions, inside the image."""
    x0, y0, x1, y1 = renderer.extent(item.label, style)
    sides = (item.x + x0 * item.size, item.y + y0 * item.size, item.x + x1 * item.size, item.y + y1 * item.size)
    return tuple(round(min(max(side / IMAGE_SIZE, 0.0), 1.0), 4) for side in sides)


# ---- where things stand ----------------------------------------------------------------------------------------------


def _squares(actions: Sequence[str], rng: random.Random) -> list[Square]:
    """The squares of subject and object of each interaction, one after another, inside the image."""
    if len(actions) == 1:
        direction = RELATIONS[actions[0]].direction
        if direction == "nested":
            return _nested(actions[0], rng)
        return _line(actions[0], rng, (0, 0, IMAGE_SIZE, IMAGE_SIZE), (23, 29))
    directions = [RELATIONS[action].direction for action in actions]
    columns = directions.count("column")
    rows, found = len(actions) - columns, []
    wide = IMAGE_SIZE if not columns else 0 if not rows else IMAGE_SIZE - 21 * columns
    sizes = (23, 28) if len(actions) == 2 and len(set(directions)) == 1 else (18, 20)
    order = {"row": 0, "column": 0}
    for action, direction in zip(actions, directions, strict=True):
        number = order[direction]
        order[direction] += 1
        if direction == "row":
            high = IMAGE_SIZE // rows
            region = (0, number * high, wide, high)
        else:
            each = (IMAGE_SIZE - wide) // columns
            region = (wide + number * each, 0, each, IMAGE_SIZE)
        found += _line(action, rng, region, sizes)
    return found


def _line(action: str, rng: random.Random, region: tuple[int, int, int, int], sizes: tuple[int, int]) -> list[Square]:
    """Two squares side by side or one above the other, anywhere in the region (x, y, width, height)."""
    upright = RELATIONS[action].direction == "column"
    x, y, wide, high = region
    length, depth = (high, wide) if upright else (wide, high)
    most = min(sizes[1], depth, (length - 1) // 2)
    one, two = (rng.randint(min(sizes[0], most), most) for _ in range(2))
    gap = {"chasing": (1, 6), "holding up": (-3, 0)}.get(action, (2, 14))
    room = length - one - two
    apart = rng.randint(min(gap[0], room), max(min(gap[0], room), min(gap[1], room)))
    start = rng.randint(0, max(0, room - apart))
    across = rng.randint(0, max(0, depth - max(one, two)))
    jitter = 1 if action in ("chasing", "holding up") else 5
    sides = [min(max(across + rng.randint(-jitter, jitter), 0), depth - size) for size in (one, two)]
    first, second = (start, sides[0], one), (start + one + apart, sides[1], two)
    if upright:
        first, second = ((side, along, size) for along, side, size in (first, second))
    first, second = ((x + u, y + v, size) for u, v, size in (first, second))
    subject_comes_first = action in ("left of", "above")
    return [first, second] if subject_comes_first else [second, first]


def _nested(action: str, rng: random.Random) -> list[Square]:
    """A small square that overlaps a large one: in its middle, or at its lower third."""
    large, small = (rng.randint(50, 58), rng.randint(18, 22)) if action == "inside" else (
        rng.randint(38, 46), rng.randint(18, 22))
    x, y = (rng.randint(0, IMAGE_SIZE - large) for _ in range(2))
    down = rng.uniform(0.45, 0.55) if action == "inside" else rng.uniform(0.82, 0.98)
    across = rng.uniform(0.4, 0.6) if action == "inside" else rng.uniform(0.2, 0.8)
    u, v = (min(max(round(corner + share * large - small / 2), 0), IMAGE_SIZE - small)
            for corner, share in ((x, across), (y, down)))
    return [(u, v, small), (x, y, large)] if action == "inside" else [(x, y, large), (u, v, small)]
