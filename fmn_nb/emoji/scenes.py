"""Scenes: 64 x 64 images of one or two sprites on a coloured background, with captions and exact masks.

A sprite is one emoji in one style; `data/sprites/` holds them, and `build_sprites` makes them again from the npm
packages of the emoji sets. A scene is a small specification; the same seed gives the same scenes, so every image and
mask can be made again. Placement hardly varies: at this size, a model learns objects many times faster when they always
stand in the same place.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fmn_nb.emoji.world import AMBIGUOUS, BACKGROUNDS, IDENTITIES, IMAGE_SIZE, OBJECTS, STYLES, random_caption
from fmn_nb.files import read_json

SPRITE_SIZE = 128  # pixels, height and width
#: how often a training scene is of each sort
SHARES = {"single": 0.47, "pair": 0.33, "identity": 0.06, "ambiguous": 0.14}
HELD_OUT_SHARE = 0.1
BARE_WORD_SHARE = 0.7  # of an ambiguous word's scenes; the captions of the others say the reading


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
        """What the scene shows, left to right."""
        return tuple(item.label for item in self.items)

    @property
    def words(self) -> tuple[str, ...]:
        """What the caption calls them."""
        return tuple(item.word for item in self.items)

    def caption(self, rng: random.Random) -> str:
        """A random caption; a proper name never goes with a style, since its drawing has only one."""
        style = None if self.sort == "identity" else self.style
        return random_caption(self.words, style, self.background, rng)

    @property
    def held_out(self) -> bool:
        """Whether this exact image belongs to the split that is never trained on."""
        content = repr((self.labels, [(i.x, i.y, i.size) for i in self.items], self.style, self.background, self.shade))
        return hashlib.sha256(content.encode()).digest()[0] < 256 * HELD_OUT_SHARE


MOST_TRIED = 50_000  # for each scene that is found


def sample_scenes(count: int, seed: int, *, held_out: bool = False, without: Sequence[str] = (),
                  sorts: dict[str, float] = SHARES) -> list[Scene]:
    """`count` scenes of one split, the same for the same arguments.

    `without` names objects, styles, identities, words or readings that must not appear (for an oracle).

    Raises:
        ValueError: without these, hardly any such scene is left, or none.
    """
    rng = random.Random(f"scenes-{seed}")
    scenes: list[Scene] = []
    tried = 0
    while len(scenes) < count:
        tried += 1
        if tried > MOST_TRIED * (len(scenes) + 1):
            raise ValueError(f"of {tried} scenes, {len(scenes)} are without {', '.join(without)}: leave less out")
        scene = _sample(rng.choices(list(sorts), list(sorts.values()))[0], rng, frozenset(without))
        if scene is not None and scene.held_out == held_out:
            scenes.append(scene)
    return scenes


def _sample(sort: str, rng: random.Random, without: frozenset[str]) -> Scene | None:
    """The next scene of a sort; None if it would show something in `without`."""
    if sort == "identity":
        identity = rng.choice(list(IDENTITIES.values()))
        style, held, shown = identity.style, {identity.name, identity.object}, [(identity.name, identity.name)]
    elif sort == "ambiguous":
        word, style = rng.choice(list(AMBIGUOUS)), rng.choice(list(STYLES))
        bare = rng.random() < BARE_WORD_SHARE
        reading = rng.choices(AMBIGUOUS[word], [r.share for r in AMBIGUOUS[word]] if bare else None)[0].phrase
        held, shown = {word, reading}, [(reading, word if bare else reading)]
    else:
        names = rng.sample(list(OBJECTS), 2 if sort == "pair" else 1)
        style, held, shown = rng.choice(list(STYLES)), set(names), [(name, name) for name in names]
    if {style, *held} & without:
        return None
    items = []
    for label, word in shown:
        size = rng.randint(29, 31) if sort == "pair" else rng.randint(47, 51)
        left = top = (IMAGE_SIZE - size) // 2
        if sort == "pair":
            left = IMAGE_SIZE * (2 * len(items) + 1) // 4 - size // 2
        aside = 1 if sort == "pair" else 2
        items.append(Placed(label, word, left + rng.randint(-aside, aside), top + rng.randint(-2, 2), size))
    return Scene(sort, tuple(items), style, rng.choice(list(BACKGROUNDS)), rng.randint(-4, 4))


class Renderer:
    """Paints scenes from the sprites of a folder; resized sprites are kept, which makes it about ten times faster."""

    def __init__(self, sprites: Path) -> None:
        self._sprites = load_sprites(sprites)
        self._resized = lru_cache(maxsize=None)(lambda label, style, size: self._sprites[label, style].resize(
            (size, size), Image.Resampling.LANCZOS))
        self._silhouette = lru_cache(maxsize=None)(lambda label, style: silhouette(self._sprites[label, style]))

    def image(self, scene: Scene, halo: int = 0) -> np.ndarray:
        """The scene as [height, width, 3] uint8; from the second thing on, each has `halo` pixels of background around
        it, so that overlapping things stay apart."""
        colour = tuple(int(np.clip(c + scene.shade, 0, 255)) for c in BACKGROUNDS[scene.background])
        canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour)
        for item in scene.items:
            sprite = self._resized(item.label, scene.style, item.size)
            if halo and item is not scene.items[0]:
                rim = Image.new("L", (item.size + 2 * halo,) * 2)
                rim.paste(self._silhouette(item.label, scene.style).resize((item.size,) * 2), (halo, halo))
                rim = rim.filter(ImageFilter.MaxFilter(2 * halo + 1))
                canvas.paste(Image.new("RGB", rim.size, colour), (item.x - halo, item.y - halo), rim)
            canvas.paste(sprite, (item.x, item.y), sprite)
        return np.asarray(canvas)

    def masks(self, scene: Scene) -> np.ndarray:
        """The silhouette of each item, [items, height, width] bool, in the items' order.

        A pixel belongs to an item if the drawing, or what its outline encloses, covers at least half of the pixel.
        """
        masks = np.zeros((len(scene.items), IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for mask, item in zip(masks, scene.items, strict=True):
            layer = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
            outline = self._silhouette(item.label, scene.style)
            layer.paste(outline.resize((item.size, item.size), Image.Resampling.BOX), (item.x, item.y))
            mask[:] = np.asarray(layer) >= 128
        return masks

    def extent(self, label: str, style: str) -> tuple[float, float, float, float]:
        """The box of a drawing's outline (x0, y0, x1, y1), as fractions of its square."""
        outline = self._silhouette(label, style)
        x0, y0, x1, y1 = outline.getbbox()
        return x0 / outline.width, y0 / outline.height, x1 / outline.width, y1 / outline.height

    def images(self, scenes: Sequence[Scene]) -> np.ndarray:
        """Many scenes as [scenes, height, width, 3] uint8."""
        return np.stack([self.image(scene) for scene in scenes])


def silhouette(sprite: Image.Image) -> Image.Image:
    """255 where a sprite paints or encloses something, else 0: an outlined cat's face is part of the cat."""
    painted = sprite.getchannel("A").point(lambda alpha: 255 if alpha >= 64 else 0)
    padded = Image.new("L", (sprite.width + 2, sprite.height + 2))
    padded.paste(painted, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 128)  # from outside: what is still 0 then is enclosed
    return padded.point(lambda value: 0 if value == 128 else 255).crop((1, 1, sprite.width + 1, sprite.height + 1))


# --- the sprites ------------------------------------------------------------------------------------------------------

def sprite_names() -> Iterator[tuple[str, str, str]]:
    """(name, style, drawing) of every sprite the world needs; identities have one style each."""
    drawings = OBJECTS | {reading.phrase: reading.drawing for pair in AMBIGUOUS.values() for reading in pair}
    for style in STYLES:
        for name, drawing in drawings.items():
            yield name, style, drawing
    for identity in IDENTITIES.values():
        yield identity.name, identity.style, identity.drawing


def sprite_path(folder: Path, name: str, style: str) -> Path:
    """Where a sprite's file is."""
    return folder / style / f"{name.lower().replace(' ', '-')}.png"


def load_sprites(folder: Path) -> dict[tuple[str, str], Image.Image]:
    """All sprites as RGBA images by (name, style).

    Raises FileNotFoundError that lists what is missing and the command that rebuilds it.
    """
    paths = {(name, style): sprite_path(folder, name, style) for name, style, _ in sprite_names()}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} sprites are missing, the first is {missing[0]}; "
                                "rebuild them with: fmn-nb pretrain --stages sprites")
    return {key: Image.open(path).convert("RGBA") for key, path in paths.items()}


def build_sprites(packages: Path, folder: Path) -> int:
    """Rasterise every sprite from the emoji packages under `packages` (a `node_modules` folder); returns how many.

    Install the packages first: `npm install` with the names in `world.STYLES`. Needs `resvg_py`.
    """
    icons = {style: packages / package / "icons.json" for style, package in STYLES.items()}
    if missing := [str(path) for path in icons.values() if not path.is_file()]:
        raise FileNotFoundError(f"no emoji set at {missing[0]}; run: npm install --prefix FOLDER "
                                f"{' '.join(STYLES.values())} and name FOLDER/node_modules")
    import resvg_py  # only rebuilding needs it

    sets = {style: read_json(path) for style, path in icons.items()}
    for name, style, drawing in sprite_names():
        path = sprite_path(folder, name, style)
        path.parent.mkdir(parents=True, exist_ok=True)
        svg = resvg_py.svg_to_bytes(svg_string=svg_of(sets[style], drawing), width=SPRITE_SIZE, height=SPRITE_SIZE)
        image = Image.open(io.BytesIO(bytes(svg)))
        square = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))  # a drawing that isn't square is centred in it
        square.paste(image.convert("RGBA"), ((SPRITE_SIZE - image.width) // 2, (SPRITE_SIZE - image.height) // 2))
        square.save(path, optimize=True)
    return len(list(sprite_names()))


def svg_of(icon_set: dict, drawing: str) -> str:
    """The drawing as an SVG document; `icon_set` is an Iconify JSON set. Raises KeyError for an unknown drawing."""
    name = icon_set.get("aliases", {}).get(drawing, {}).get("parent", drawing)
    if name not in icon_set["icons"]:
        raise KeyError(f"the set {icon_set.get('prefix')!r} has no drawing {drawing!r}")
    icon = icon_set["icons"][name]
    width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    body = icon["body"].replace("currentColor", "#000")
    return ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{box}">{body}</svg>')
