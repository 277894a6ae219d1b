"""Scenes: 64 x 64 images of one or two sprites on a coloured background, with captions and exact masks.

A scene is a small specification drawn from (seed, index), so every image, caption and mask can be made again.
Placement hardly varies: at this size a model learns objects many times faster when they stand where they always do.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fmn_nb.emoji.captions import random_caption
from fmn_nb.emoji.sprites import load_sprites
from fmn_nb.emoji.world import AMBIGUOUS, BACKGROUNDS, IDENTITIES, IMAGE_SIZE, OBJECTS, STYLES

#: how often a training scene is of each sort
SHARES = {"single": 0.47, "pair": 0.33, "identity": 0.06, "ambiguous": 0.14}
HELD_OUT_SHARE = 0.1
BARE_WORD_SHARE = 0.7  # of an ambiguous word's scenes; the others' captions say the reading


@dataclass(frozen=True)
class Placed:
    """One sprite in a scene: `label` is what it shows, `word` what the caption calls it; pixels from the top left."""

    label: str
    word: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image; `shade` shifts the background's grey level."""

    sort: str
    items: tuple[Placed, ...]
    style: str
    background: str
    shade: int

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(item.label for item in self.items)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(item.word for item in self.items)

    def caption(self, rng: random.Random) -> str:
        """A random caption; a proper name never goes with a style, for its drawing has only one."""
        style = None if self.sort == "identity" else self.style
        return random_caption(self.words, style, self.background, rng)

    @property
    def held_out(self) -> bool:
        """Whether this exact image belongs to the split that is never trained on."""
        drawn = repr((self.labels, [(i.x, i.y, i.size) for i in self.items], self.style, self.background, self.shade))
        return hashlib.sha256(drawn.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def sample_scenes(count: int, seed: int, *, held_out: bool = False, without: Sequence[str] = (),
                  sorts: dict[str, float] = SHARES) -> list[Scene]:
    """`count` scenes of one split, the same for the same arguments.

    `without` names objects, styles, identities, words or readings that must not appear (for an oracle).
    """
    stream = _stream(seed, sorts, frozenset(without))
    return [scene for scene, _ in zip(_of_split(stream, held_out), range(count), strict=False)]


def _of_split(stream: Iterator[Scene], held_out: bool) -> Iterator[Scene]:
    return (scene for scene in stream if scene.held_out == held_out)


def _stream(seed: int, sorts: dict[str, float], without: frozenset[str]) -> Iterator[Scene]:
    rng = random.Random(f"scenes-{seed}")
    names, weights = list(sorts), list(sorts.values())
    while True:
        sort = rng.choices(names, weights)[0]
        scene = _DRAW[sort](rng, without)
        if scene is not None:
            yield scene


def _single(rng: random.Random, without: frozenset[str]) -> Scene | None:
    name, style = rng.choice(list(OBJECTS)), rng.choice(list(STYLES))
    if {name, style} & without:
        return None
    return _scene("single", [_centred(rng, name, name)], style, rng)


def _pair(rng: random.Random, without: frozenset[str]) -> Scene | None:
    left, right = rng.sample(list(OBJECTS), 2)
    style = rng.choice(list(STYLES))
    if {left, right, style} & without:
        return None
    items = [_beside(rng, left, centre=IMAGE_SIZE // 4), _beside(rng, right, centre=3 * IMAGE_SIZE // 4)]
    return _scene("pair", items, style, rng)


def _identity(rng: random.Random, without: frozenset[str]) -> Scene | None:
    identity = rng.choice(list(IDENTITIES.values()))
    if {identity.name, identity.object, identity.style} & without:
        return None
    return _scene("identity", [_centred(rng, identity.name, identity.name)], identity.style, rng)


def _ambiguous(rng: random.Random, without: frozenset[str]) -> Scene | None:
    word, style = rng.choice(list(AMBIGUOUS)), rng.choice(list(STYLES))
    bare = rng.random() < BARE_WORD_SHARE
    reading = rng.choices(AMBIGUOUS[word], [r.share for r in AMBIGUOUS[word]] if bare else None)[0]
    if {word, reading.phrase, style} & without:
        return None
    return _scene("ambiguous", [_centred(rng, reading.phrase, word if bare else reading.phrase)], style, rng)


_DRAW = {"single": _single, "pair": _pair, "identity": _identity, "ambiguous": _ambiguous}


def _centred(rng: random.Random, label: str, word: str) -> Placed:
    size = rng.randint(47, 51)
    middle = (IMAGE_SIZE - size) // 2
    return Placed(label, word, middle + rng.randint(-2, 2), middle + rng.randint(-2, 2), size)


def _beside(rng: random.Random, label: str, centre: int) -> Placed:
    size = rng.randint(29, 31)
    top = (IMAGE_SIZE - size) // 2
    return Placed(label, label, centre - size // 2 + rng.randint(-1, 1), top + rng.randint(-2, 2), size)


def _scene(sort: str, items: list[Placed], style: str, rng: random.Random) -> Scene:
    return Scene(sort, tuple(items), style, rng.choice(list(BACKGROUNDS)), rng.randint(-4, 4))


class Renderer:
    """Draws scenes from the sprites of a folder; resized sprites are kept, which makes it about ten times faster."""

    def __init__(self, sprites: Path) -> None:
        self._sprites = load_sprites(sprites)
        self._resized = lru_cache(maxsize=None)(self._resize)
        self._silhouette = lru_cache(maxsize=None)(lambda label, style: silhouette(self._sprites[label, style]))

    def _resize(self, label: str, style: str, size: int) -> Image.Image:
        return self._sprites[label, style].resize((size, size), Image.Resampling.LANCZOS)

    def image(self, scene: Scene) -> np.ndarray:
        """The scene as [height, width, 3] uint8."""
        colour = tuple(int(np.clip(c + scene.shade, 0, 255)) for c in BACKGROUNDS[scene.background])
        canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour)
        for item in scene.items:
            sprite = self._resized(item.label, scene.style, item.size)
            canvas.paste(sprite, (item.x, item.y), sprite)
        return np.asarray(canvas)

    def masks(self, scene: Scene) -> np.ndarray:
        """The silhouette of each item, [items, height, width] bool, in the items' order.

        A pixel belongs to it when the drawing, or what its outline encloses, covers at least half of the pixel.
        """
        masks = np.zeros((len(scene.items), IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for mask, item in zip(masks, scene.items, strict=True):
            layer = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
            outline = self._silhouette(item.label, scene.style)
            layer.paste(outline.resize((item.size, item.size), Image.Resampling.BOX), (item.x, item.y))
            mask[:] = np.asarray(layer) >= 128
        return masks

    def images(self, scenes: Sequence[Scene]) -> np.ndarray:
        """Many scenes as [scenes, height, width, 3] uint8."""
        return np.stack([self.image(scene) for scene in scenes])


def silhouette(sprite: Image.Image) -> Image.Image:
    """255 where a sprite draws or encloses something, else 0: an outlined cat's face is part of the cat."""
    drawn = sprite.getchannel("A").point(lambda alpha: 255 if alpha >= 64 else 0)
    padded = Image.new("L", (sprite.width + 2, sprite.height + 2))
    padded.paste(drawn, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 128)  # from outside: what is still 0 then is enclosed
    return padded.point(lambda value: 0 if value == 128 else 255).crop((1, 1, sprite.width + 1, sprite.height + 1))
