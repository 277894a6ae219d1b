"""Reference images of a concept as latents: from a folder, from the model itself, or none at all (pure noise).

Images are encoded once. What is kept is the autoencoder's posterior, not one sample of it, so that every training
step can draw anew, as the published code does by encoding the image in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fmn_nb.denoising import borrowed, conditions, seeded, size_options
from fmn_nb.references_cache import shared_latents

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_ENCODED_AT_ONCE = 1  # more at once hardly save time, and cost memory when all of the pipeline is there
_GENERATED_AT_ONCE = 24

Images = str | Path | Sequence["str | Path | Image.Image"]


class ReferenceImageError(ValueError):
    """The reference images are missing, unreadable, or can't be used with this pipeline."""


@dataclass(frozen=True)
class Latents:
    """Latents as the denoiser takes them, each with a Gaussian spread: x = mean + std * noise.

    Attributes:
        mean, std: [images, channels, height, width] (or whatever shape the denoiser's samples have), float32, on
            the CPU; `std` is 0 where the latents are known exactly.
    """

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, index: Tensor, noise: Tensor) -> Tensor:
        """One draw for each image number in `index` [batch], from standard normal `noise` of the same shape."""
        return self.mean[index] + self.std[index] * noise

    @classmethod
    def exact(cls, latents: Tensor) -> Latents:
        """Latents without a spread."""
        latents = latents.detach().to("cpu", torch.float32)
        return cls(latents, torch.zeros_like(latents))

    @classmethod
    def joined(cls, parts: Sequence[Latents]) -> Latents:
        """All images of several, in their order."""
        return cls(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))


def load_images(source: Images) -> list[Image.Image]:
    """Reference images in RGB, upright: all image files of a folder (by name), or a list of files and images.

    Transparent parts become white.

    Raises:
        ReferenceImageError: no such folder, no image in it, or unreadable files, all named in one message.
    """
    items = _files(Path(source).expanduser()) if isinstance(source, (str, Path)) else list(source)
    images, unreadable = [], []
    for item in items:
        try:
            images.append(_upright_rgb(item))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(f"{item} ({error})")
    if unreadable:
        raise ReferenceImageError(
            f"{len(unreadable)} of {len(items)} reference images can't be read: {'; '.join(unreadable)}")
    if not images:
        raise ReferenceImageError(
            f"there is no image in '{source}'; known are files ending in {', '.join(sorted(_SUFFIXES))}")
    return images


def load_all(sources: Mapping[str, Images]) -> dict[str, list[Image.Image]]:
    """The reference images of several concepts, under the concepts' names.

    Raises:
        ReferenceImageError: what can't be read, of all of them in one message.
    """
    loaded, failures = {}, []
    for name, source in sources.items():
        try:
            loaded[name] = load_images(source)
        except ReferenceImageError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise ReferenceImageError("; ".join(failures))
    return loaded


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ReferenceImageError(f"the folder of reference images '{folder}' doesn't exist")
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())


def _upright_rgb(item: str | Path | Image.Image) -> Image.Image:
    if not isinstance(item, Image.Image):
        with Image.open(item) as opened:
            return _upright_rgb(opened)
    image = ImageOps.exif_transpose(item)
    if image.mode == "F" or image.mode.startswith("I"):  # PIL would clip more than 8 bits a pixel to white
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        image = Image.fromarray((values / _white(image.mode, values) * 255).clip(0, 255).astype(np.uint8))
    image = image.convert("LA") if image.mode == "La" else image  # the only mode that PIL converts no further
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _white(mode: str, values: np.ndarray) -> float:
    """What value is white: 16-bit files say so, others only by their largest value."""
    if mode.startswith("I;16") or values.max() > 255:
        return 65535.0
    return 1.0 if mode == "F" and values.max() <= 1 else 255.0


def pixel_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels of what the pipeline draws by default."""
    with borrowed(pipe):
        shape = conditions(pipe, ["a"]).latent_shape
    if len(shape) != 3:
        raise ReferenceImageError(
            f"{type(pipe).__name__} packs its latents, so images of your own can't be encoded for it; "
            "leave out the references and the model generates them"
        )
    return shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor


@torch.no_grad()
def encode(pipe: DiffusionPipeline, images: Sequence[Image.Image], size: tuple[int, int] | None = None) -> Latents:
    """Encode images with the pipeline's autoencoder, scaled as its denoiser takes them.

    Each image is resized to cover `size` (height, width in pixels; the pipeline's default if None) and cropped to
    its centre.
    """
    height, width = size or pixel_size(pipe)
    vae, parts = pipe.vae, []
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    for start in range(0, len(images), _ENCODED_AT_ONCE):
        fitted = [ImageOps.fit(image, (width, height)) for image in images[start : start + _ENCODED_AT_ONCE]]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted])).permute(0, 3, 1, 2)
        pixels = (pixels.float() / 127.5 - 1).to(vae.device, vae.dtype)
        # Half precision overflows in some autoencoders (SDXL's says so); bfloat16 has float32's range.
        careful = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
        with torch.autocast(vae.device.type, torch.bfloat16) if careful else nullcontext():
            posterior = vae.encode(pixels).latent_dist
        parts.append(Latents((posterior.mean.float().cpu() - shift) * scale, posterior.std.float().cpu() * scale))
    return Latents.joined(parts)


@torch.no_grad()
def generate_latents(
    pipe: DiffusionPipeline, prompts: Sequence[str], *, seed: int, steps: int, guidance: float,
    size: tuple[int, int] | None = None, cache: str | Path | None = None,
) -> Latents:
    """What the model draws for each prompt, as latents (they are never decoded).

    Each image has noise of its own from (seed, its number), so the batch size doesn't matter. With a folder `cache`
    they are kept there and taken from there; it can be shared by several processes.
    """
    def draw() -> Tensor:
        return _drawn(pipe, prompts, seed, steps, guidance, size)

    settings = (seed, steps, guidance, size, _GENERATED_AT_ONCE)
    return Latents.exact(shared_latents(cache, pipe, prompts, settings, draw) if cache else draw())


def _drawn(
    pipe: DiffusionPipeline, prompts: Sequence[str], seed: int, steps: int, guidance: float,
    size: tuple[int, int] | None,
) -> Tensor:
    """Latents as `Latents.exact` keeps them, [prompts, ...]."""
    options, parts = size_options(pipe, size), []
    with borrowed(pipe):
        for start in range(0, len(prompts), _GENERATED_AT_ONCE):
            chunk = list(prompts[start : start + _GENERATED_AT_ONCE])
            noise = [seeded(seed, start + number) for number in range(len(chunk))]
            drawn = pipe(chunk, generator=noise, num_inference_steps=steps, guidance_scale=guidance,
                         output_type="latent", **options).images
            parts.append(drawn.to("cpu", torch.float32))
    return torch.cat(parts)
