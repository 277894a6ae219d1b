"""Sprites: one emoji in one style, 128 x 128 pixels with alpha.

They are committed in `data/sprites/`; `build_sprites` makes them again from the npm packages of the emoji sets.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fmn_nb.emoji.world import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES

SPRITE_SIZE = 128  # pixels, height and width


def sprite_names() -> Iterator[tuple[str, str, str]]:
    """(name, style, drawing) of every sprite the world needs; identities have one style each."""
    for style in STYLES:
        for name, drawing in OBJECTS.items():
            yield name, style, drawing
        for readings in AMBIGUOUS.values():
            for reading in readings:
                yield reading.phrase, style, reading.drawing
    for identity in IDENTITIES.values():
        yield identity.name, identity.style, identity.drawing


def sprite_path(folder: Path, name: str, style: str) -> Path:
    return folder / style / f"{name.lower().replace(' ', '-')}.png"


def load_sprites(folder: Path) -> dict[tuple[str, str], Image.Image]:
    """All sprites as RGBA images by (name, style).

    Raises FileNotFoundError that lists what is missing and the command that rebuilds it.
    """
    paths = {(name, style): sprite_path(folder, name, style) for name, style, _ in sprite_names()}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} sprites are missing, the first is {missing[0]}; "
            "rebuild them with: fmn-nb pretrain --stages sprites"
        )
    return {key: Image.open(path).convert("RGBA") for key, path in paths.items()}


def build_sprites(packages: Path, folder: Path) -> int:
    """Rasterise every sprite from the emoji packages under `packages` (a `node_modules` folder); returns how many.

    Install the packages first: `npm install` with the names in `world.STYLES`. Needs `resvg_py`.
    """
    sets = {style: _read_set(packages / package) for style, package in STYLES.items()}
    count = 0
    for name, style, drawing in sprite_names():
        path = sprite_path(folder, name, style)
        path.parent.mkdir(parents=True, exist_ok=True)
        rasterise(svg_of(sets[style], drawing), SPRITE_SIZE).save(path, optimize=True)
        count += 1
    return count


def _read_set(package: Path) -> dict:
    icons = package / "icons.json"
    if not icons.is_file():
        raise FileNotFoundError(
            f"no emoji set at {icons}; run: npm install --prefix FOLDER {' '.join(STYLES.values())} "
            "and name FOLDER/node_modules"
        )
    return json.loads(icons.read_text(encoding="utf-8"))


def svg_of(icon_set: dict, drawing: str) -> str:
    """The drawing as an SVG document; `icon_set` is an Iconify JSON set. Raises KeyError for an unknown drawing."""
    name = icon_set.get("aliases", {}).get(drawing, {}).get("parent", drawing)
    if name not in icon_set["icons"]:
        raise KeyError(f"the set {icon_set.get('prefix')!r} has no drawing {drawing!r}")
    icon = icon_set["icons"][name]
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    body = icon["body"].replace("currentColor", "#000")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{box}">{body}</svg>'
    )


def rasterise(svg: str, size: int) -> Image.Image:
    """An SVG document as a square RGBA image of `size` pixels, a drawing that is not square centred in it."""
    import resvg_py  # only rebuilding needs it

    drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))))
    square = Image.new("RGBA", (size, size))
    square.paste(drawing.convert("RGBA"), ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return square
