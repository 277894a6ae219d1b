"""The images of an evaluation: each from its own seed, always drawn in batches of one size, kept on disk if wanted.

On a CPU the last bits of a convolution depend on how many images go through it together, and single pixels then differ
by one of 255 levels. So each call of the pipeline draws the same number of images: the last one is filled up. Neither
order nor interruption can then change an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin

from fmn_nb.digests import drawing_key
from fmn_nb.files import one_at_a_time, replacing
from fmn_nb.generation import GUIDANCE, STEPS, generate
from fmn_nb.models import denoiser
from fmn_nb.protocol import Drawing

SMALL_BATCH, LARGE_BATCH = 24, 4
PATIENCE = 60  # seconds to wait for another process that draws with the same model; then both draw
LARGE = 10**8  # parameters of the denoiser
_TEXT = "fmn-drawing"  # key of the PNG text that says what an image is

Progress = Callable[[int, int], None]


class ImageCache:
    """Drawn images of one model under fixed settings, a PNG file each, in `folder/KEY`.

    Each file says in its own text which model, prompt and seed it is of, and has a checksum of its pixels. One that is
    missing, damaged or another's is None to `load`, and so drawn anew.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder) / key[:16], key

    def alone(self) -> AbstractContextManager[None]:
        """A context in which no other process draws for this folder (unless one keeps it for all too long)."""
        return one_at_a_time(self.folder / ".lock", PATIENCE)

    def path(self, drawing: Drawing) -> Path:
        """Where a drawing's image lies."""
        name = hashlib.sha256(f"{drawing.seed}|{drawing.prompt}".encode()).hexdigest()[:24]
        return self.folder / f"{name}.png"

    def load(self, drawing: Drawing) -> Image.Image | None:
        """The image if it is there, whole, and of this model, prompt and seed."""
        try:
            with Image.open(self.path(drawing)) as file:
                image = file.convert("RGB") if file.mode != "RGB" else file.copy()
                file.load()  # text may stand after the pixels
                said = json.loads(file.text.get(_TEXT, "{}"))
        except (OSError, ValueError, SyntaxError, AttributeError):
            return None
        return image if said == self._text(drawing, image) else None

    def save(self, drawing: Drawing, image: Image.Image) -> None:
        """Keep an image; the file is whole or absent, whenever the process is killed."""
        text = PngImagePlugin.PngInfo()
        text.add_itxt(_TEXT, json.dumps(self._text(drawing, image)))
        with replacing(self.path(drawing)) as temporary:
            image.save(temporary, format="PNG", pnginfo=text)

    def _text(self, drawing: Drawing, image: Image.Image) -> dict[str, str | int]:
        pixels = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
        return {"model": self.key, "prompt": drawing.prompt, "seed": drawing.seed, "pixels": pixels}


def draw_images(pipe: DiffusionPipeline, wanted: Sequence[Drawing], *, steps: int = STEPS, guidance: float = GUIDANCE,
                batch: int | None = None, cache: str | Path | None = None,
                progress: Progress | None = None) -> list[Image.Image]:
    """One image for each drawing, in their order.

    Args:
        batch: how many images each call of the pipeline draws; by default 24, for large models 4. The same number
            gives the same images.
        cache: a folder that keeps the images; what it holds of this model (weights as they are now, settings and
            versions) is taken from there. Several processes can share it: what one draws the others find.
        progress: called with the number of finished images and of all.
    """
    batch = batch or images_at_once(pipe)
    kept = ImageCache(cache, drawing_key(pipe, steps, guidance, batch)) if cache else None
    found: dict[tuple[str, int], Image.Image] = {}
    missing = list({(d.prompt, d.seed): d for d in wanted}.values())
    while missing:
        with kept.alone() if kept else nullcontext():
            known = {(d.prompt, d.seed): kept.load(d) for d in missing} if kept else {}
            found |= {place: image for place, image in known.items() if image is not None}
            missing = [d for d in missing if (d.prompt, d.seed) not in found]
            chunk, missing = missing[:batch], missing[batch:]
            for drawing, image in zip(chunk, _draw(pipe, chunk, batch, steps, guidance), strict=False):
                found[drawing.prompt, drawing.seed] = image
                if kept:
                    kept.save(drawing, image)
        if progress and chunk:
            progress(len(wanted) - len(missing), len(wanted))
    return [found[d.prompt, d.seed] for d in wanted]


def _draw(pipe: DiffusionPipeline, chunk: Sequence[Drawing], batch: int, steps: int,
          guidance: float) -> list[Image.Image]:
    if not chunk:
        return []
    filled = [*chunk, *[chunk[-1]] * (batch - len(chunk))]
    return generate(pipe, [d.prompt for d in filled], [d.seed for d in filled], steps=steps, guidance=guidance,
                    batch=batch)


def images_at_once(pipe: DiffusionPipeline) -> int:
    """How many images one call of the pipeline draws, by the size of its denoiser."""
    parameters = sum(parameter.numel() for parameter in denoiser(pipe).parameters())
    return LARGE_BATCH if parameters > LARGE else SMALL_BATCH


