"""Images and their latents: generated from prompts, encoded by the autoencoder, read from files, compared.

Every generated image has a seed of its own, so that batch size and order don't decide what is drawn. (To the last bit
they do on a CPU, where a convolution rounds by how many images go through it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fmn_nb.files import one_at_a_time, replacing
from fmn_nb.models.denoising import Latents, borrowed, conditions, seeded, size_options
from fmn_nb.models.digests import digest, drawing_key

STEPS = 20
GUIDANCE = 4.0
LATENTS = "latents"  # the folder of a cache that holds them
PATIENCE = 1800  # seconds to wait for another process that draws the same; then it is drawn twice
_GENERATED_AT_ONCE = 24
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
Images = str | Path | Sequence["str | Path | Image.Image"]


class ReferenceImageError(ValueError):
    """The reference images are missing, unreadable, or can't be used with this pipeline."""


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = STEPS,
             guidance: float = GUIDANCE, batch: int = 72, **options) -> list[Image.Image]:
    """One image per (prompt, seed), in their order.

    Each image's noise comes from its own generator. `options` go to the pipeline (`height`, `width`, ...).
    Raises ValueError when there are not as many seeds as prompts.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; every image needs one of each")
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[start:start + batch]]
        images += pipe(list(prompts[start:start + batch]), generator=generators, num_inference_steps=steps,
                       guidance_scale=guidance, **options).images
    return images


# ---- latents --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(pipe: DiffusionPipeline, images: Sequence[Image.Image], size: tuple[int, int] | None = None) -> Latents:
    """Encode images with the pipeline's autoencoder, scaled as its denoiser takes them.

    Each image is resized to cover `size` (height, width in pixels; the pipeline's default if None) and cropped to
    its centre.
    """
    height, width = size or pixel_size(pipe)
    vae, parts = pipe.vae, []
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    for image in images:  # more at once hardly save time, and cost memory when all of the pipeline is there
        fitted = torch.from_numpy(np.array(ImageOps.fit(image, (width, height))))[None]
        pixels = (fitted.permute(0, 3, 1, 2).float() / 127.5 - 1).to(vae.device, vae.dtype)  # [1, 3, height, width]
        # Half precision overflows in some autoencoders (SDXL's says so); bfloat16 has float32's range.
        careful = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
        with torch.autocast(vae.device.type, torch.bfloat16) if careful else nullcontext():
            posterior = vae.encode(pixels).latent_dist
        parts.append(Latents((posterior.mean.float().cpu() - shift) * scale, posterior.std.float().cpu() * scale))
    return Latents.joined(parts)


def pixel_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels of what the pipeline draws by default."""
    with borrowed(pipe):
        shape = conditions(pipe, ["a"]).latent_shape
    if len(shape) != 3:
        raise ReferenceImageError(f"{type(pipe).__name__} packs its latents, so images of your own can't be encoded "
                                  "for it; leave out the references and the model generates them")
    return shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor


@torch.no_grad()
def generate_latents(pipe: DiffusionPipeline, prompts: Sequence[str], *, seed: int, steps: int, guidance: float,
                     size: tuple[int, int] | None = None, cache: str | Path | None = None) -> Latents:
    """What the model draws for each prompt, as latents (they are never decoded).

    Each image has noise of its own from (seed, its number), so the batch size doesn't matter. With a folder `cache`
    they are kept in its `latents/` and taken from there; several processes can share it.
    """
    settings = (seed, steps, guidance, size)
    if not cache:
        return Latents.exact(_drawn(pipe, prompts, *settings))
    key = drawing_key(pipe, list(prompts), *settings, _GENERATED_AT_ONCE)
    file = Path(cache) / LATENTS / f"{key[:32]}.safetensors"
    found = _load(file, key, len(prompts))
    if found is None:
        with one_at_a_time(file.with_suffix(".lock"), PATIENCE):
            found = _load(file, key, len(prompts))
            if found is None:
                found = _drawn(pipe, prompts, *settings)
                with replacing(file) as temporary:
                    save_file({"latents": found.contiguous()}, temporary, {"key": key, "sha256": digest([found])})
    return Latents.exact(found)


def _drawn(pipe: DiffusionPipeline, prompts: Sequence[str], seed: int, steps: int, guidance: float,
           size: tuple[int, int] | None) -> Tensor:
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


def _load(file: Path, key: str, count: int) -> Tensor | None:
    """The latents if the file is there, whole and the one that is wanted."""
    try:
        with safe_open(file, framework="pt") as opened:
            said, latents = opened.metadata() or {}, opened.get_tensor("latents")
    except (OSError, SafetensorError, ValueError):
        return None
    whole = len(latents) == count and said.get("key") == key and said.get("sha256") == digest([latents])
    return latents if whole else None


# ---- reference images -----------------------------------------------------------------------------------------------


def load_images(source: Images) -> list[Image.Image]:
    """Reference images in RGB, upright: all image files of a folder (by name), or a list of files and images.

    Transparent parts become white.

    Raises:
        ReferenceImageError: no such folder, no image in it, or unreadable files, all named in one message.
    """
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        if not folder.exists():
            raise ReferenceImageError(f"the folder of reference images '{folder}' doesn't exist")
        items = [folder] if folder.is_file() else sorted(
            file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
    else:
        items = list(source)
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


def _upright_rgb(item: str | Path | Image.Image) -> Image.Image:
    if not isinstance(item, Image.Image):
        with Image.open(item) as opened:
            return _upright_rgb(opened)
    image = ImageOps.exif_transpose(item)
    if image.mode == "F" or image.mode.startswith("I"):  # PIL would clip more than 8 bits a pixel to white
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if image.mode.startswith("I;16") or values.max() > 255:  # 16-bit files say what white is, others only by this
            white = 65535.0
        else:
            white = 1.0 if image.mode == "F" and values.max() <= 1 else 255.0
        image = Image.fromarray((values / white * 255).clip(0, 255).astype(np.uint8))
    image = image.convert("LA") if image.mode == "La" else image  # the only mode that PIL converts no further
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


# ---- pixels ---------------------------------------------------------------------------------------------------------


def image_change(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    """Mean absolute difference of the pixels of two lists of images, from 0 (the same) to 1 (black against white).

    Raises:
        ValueError: no images, or lists or images of different sizes.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} images against {len(second)}; give as many on both sides, at least one")
    one, other = (np.stack([np.asarray(image.convert("RGB"), float) for image in images]) for images in (first, second))
    if one.shape != other.shape:
        raise ValueError(f"images of {one.shape[1:3]} against {other.shape[1:3]} pixels can't be compared")
    return float(np.abs(one - other).mean() / 255)


def to_pixels(images: Sequence[Image.Image] | np.ndarray, size: int) -> Tensor:
    """Images as [images, 3, size, size] float32 in [-1, 1], resized where they are not that large."""
    if not isinstance(images, np.ndarray):
        images = np.stack([np.asarray(i.convert("RGB") if i.size == (size, size) else
                                      i.convert("RGB").resize((size, size))) for i in images])
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
