"""Images and their latents: generated from prompts, encoded by the autoencoder, read from files, compared.

Every generated image has a seed of its own, so batch size and order don't change what is drawn (except for the last
bits on a CPU, where a convolution's rounding depends on how many images go through it).
"""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fmn_nb.files import one_at_a_time, write_tensors
from fmn_nb.models.arguments import checked_seed, finite_number, whole_number
from fmn_nb.models.denoising import Latents, borrowed, conditions, latent_grid, seeded, size_options
from fmn_nb.models.digests import digest, drawing_key
from fmn_nb.models.pipelines import UnsupportedPipelineError, denoiser, require_text_to_image, uncompiled

STEPS = 20
GUIDANCE = 4.0
LATENTS = "latents"  # the folder of a cache that holds them
PATIENCE = 1800  # seconds to wait for another process that draws the same; after that, both draw it
_GENERATED_AT_ONCE = 24
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
TAKEN = ("give a folder, or one or several of: a file, a PIL image, an array [height, width, 3], a tensor [3, height, "
         "width], of uint8 or of floats from 0 to 1")
NO_VAE = "the pipeline has no autoencoder (its vae is None)"
Images = str | Path | Image.Image | np.ndarray | Tensor | Sequence["str | Path | Image.Image | np.ndarray | Tensor"]


class ReferenceImageError(ValueError):
    """The reference images are missing, unreadable, or can't be used with this pipeline."""


class FilteredImageError(ValueError):
    """What the pipeline returned isn't a drawing: its safety checker blacked it out, or its latents are NaN."""


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = STEPS,
             guidance: float = GUIDANCE, batch: int = 72, **options) -> list[Image.Image]:
    """One image per (prompt, seed), in order; the pipeline's scheduler stays as it was.

    Each image's noise comes from its own generator. `options` go to the pipeline (`height`, `width`, ...).

    Raises:
        ValueError: not as many seeds as prompts, or a number that is invalid or too small.
        UnsupportedPipelineError: the pipeline needs a picture to draw, or has no autoencoder.
        FilteredImageError: a picture is black throughout or NaN, or the pipeline's safety checker flagged it.
    """
    prompts, seeds, settings = _checked(prompts, seeds, steps, guidance)
    batch = whole_number("batch", batch, 1)
    require_text_to_image(pipe)
    if getattr(pipe, "vae", None) is None and options.get("output_type") != "latent":
        raise UnsupportedPipelineError(f"{NO_VAE}, so nothing can be drawn from its latents: load it with its vae")
    images: list[Image.Image] = []
    with borrowed(pipe, silent=False):
        for start in range(0, len(prompts), batch):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start:start + batch]]
            drawn = pipe(prompts[start:start + batch], generator=generators, **settings, **options)
            _refuse_filtered(pipe, drawn, prompts[start:start + batch])
            images += list(drawn.images)  # an array, with output_type="np"
    return images


def _checked(prompts: Sequence[str], seeds: Sequence[int], steps: int,
             guidance: float) -> tuple[list[str], list[int], dict[str, Any]]:
    """Prompts, seeds, and the rest under the pipeline's own names; a ValueError says what is wrong."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a list of texts, not {shortened(prompts)}")
    if isinstance(seeds, str | bytes | numbers.Number):
        raise ValueError(f"seeds must be a list of whole numbers, one for each prompt, not {shortened(seeds)}")
    prompts, seeds = list(prompts), [checked_seed(seed) for seed in seeds]
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; every image needs one of each")
    return prompts, seeds, {"num_inference_steps": whole_number("steps", steps, 1),
                            "guidance_scale": finite_number("guidance", guidance, 0)}


def _refuse_filtered(pipe: DiffusionPipeline, drawn: Any, prompts: Sequence[str]) -> None:
    """Raise FilteredImageError unless everything that a call of the pipeline returned is a drawing."""
    flags = getattr(drawn, "nsfw_content_detected", None) or [False] * len(prompts)
    checker = "the pipeline's safety checker blacked out" if getattr(pipe, "safety_checker", None) is not None else ""
    for number, (image, flagged) in enumerate(zip(drawn.images, flags, strict=False)):
        prompt = prompts[number % len(prompts)]
        if flagged:
            raise FilteredImageError(f"{checker or 'the pipeline flagged'} the picture of '{prompt}', so it isn't "
                                     "a drawing: set pipe.safety_checker = None")
        if _is_empty(image):
            raise FilteredImageError(
                f"the picture of '{prompt}' is black throughout or NaN: "
                + (f"{checker} pictures, perhaps; set pipe.safety_checker = None, or " if checker else "")
                + "the model's numbers overflowed; load it with dtype='float32' or 'bfloat16'")


def _is_empty(image: Any) -> bool:
    """Whether a picture (PIL, array or tensor) is all black or holds NaN; latents count only for NaN."""
    if isinstance(image, Image.Image):
        return not np.asarray(image.convert("RGB")).any()
    values = torch.as_tensor(image).float()
    is_picture = values.ndim == 3 and 3 in (values.shape[0], values.shape[-1])
    return not bool(values.isfinite().all()) or (is_picture and not bool(values.any()))


# ---- latents --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(pipe: DiffusionPipeline, images: Sequence[Image.Image], size: tuple[int, int] | None = None) -> Latents:
    """Encode images with the pipeline's autoencoder, scaled for its denoiser.

    Each image, in any mode of PIL, is resized to cover `size` (height, width in pixels; the pipeline's default if
    None) and cropped to its centre; transparent parts become white.
    """
    if getattr(pipe, "vae", None) is None:
        raise ReferenceImageError(f"{NO_VAE}, so images can't be encoded: load it with its vae, or leave out the "
                                  "references and the model generates them as latents")
    height, width = size or pixel_size(pipe)
    vae, parts = pipe.vae, []
    if vae.dtype == torch.float16 and vae.device.type == "cpu":  # where half precision can't do all that it takes
        vae = copy.deepcopy(vae).float()
    shift, scale = _latent_scaling(pipe)
    for image in images:  # more at once hardly save time, and cost memory when all of the pipeline is there
        fitted = torch.from_numpy(np.array(ImageOps.fit(_upright_rgb(image), (width, height))))[None]
        pixels = (fitted.permute(0, 3, 1, 2).float() / 127.5 - 1).to(vae.device, vae.dtype)  # [1, 3, height, width]
        # Half precision overflows in some autoencoders (SDXL's says so); bfloat16 has float32's range.
        careful = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
        with torch.autocast(vae.device.type, torch.bfloat16) if careful else nullcontext():
            encoded = _encoded(vae, pixels)
        parts.append(Latents(_packed(pipe, (encoded.mean - shift) * scale), _packed(pipe, encoded.std * scale)))
    return Latents.joined(parts)


def _packed(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents [1, channels, height, width] as the denoiser takes them: for Flux a sequence of 2 x 2 patches."""
    if not _packs(pipe):
        return latents
    return pipe._pack_latents(latents, *latents.shape).contiguous()


def _packs(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline turns the latents into a sequence of 2 x 2 patches before its denoiser sees them."""
    return hasattr(pipe, "_pack_latents") and hasattr(pipe, "_prepare_latent_image_ids")


def _encoded(vae: torch.nn.Module, pixels: Tensor) -> Latents:
    """The autoencoder's encoding of pixels: a distribution, or latents themselves (AutoencoderTiny, AutoencoderDC)."""
    output = vae.encode(pixels)
    if posterior := getattr(output, "latent_dist", None):
        return Latents(posterior.mean.float().cpu(), posterior.std.float().cpu())
    for name in ("latents", "latent"):
        if isinstance(latents := getattr(output, name, None), Tensor):
            return Latents.exact(latents)
    raise ReferenceImageError(f"{type(vae).__name__} encodes images into latents of an unknown kind; leave out the "
                              "references and the model generates them")


def _latent_scaling(pipe: DiffusionPipeline) -> tuple[float | Tensor, float | Tensor]:
    """What is subtracted from encoded latents, and what the rest is multiplied by, before the denoiser sees them."""
    config = pipe.vae.config
    scale = 1.0 if config.get("scaling_factor") is None else config.scaling_factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None or not _knows_latents_mean(type(pipe)):
        return config.get("shift_factor") or 0.0, scale
    mean, std = (torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1) for values in (mean, std))
    return mean, scale / std


@cache
def _knows_latents_mean(kind: type) -> bool:
    """Whether a pipeline's own code undoes the autoencoder's latents_mean; others (Stable Diffusion) ignore it."""
    for one in kind.__mro__:
        with suppress(OSError, TypeError):
            if issubclass(one, DiffusionPipeline) and "latents_mean" in inspect.getsource(one):
                return True
    return False


def pixel_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels of what the pipeline draws by default."""
    with borrowed(pipe):
        given = conditions(pipe, ["a"])
    grid, is_packed = latent_grid(given), len(given.latent_shape) == 2
    if grid is None or (is_packed and not _packs(pipe)):
        raise ReferenceImageError(f"{type(pipe).__name__} packs its latents, so images of your own can't be encoded "
                                  "for it; leave out the references and the model generates them")
    side = pipe.vae_scale_factor * (2 if is_packed else 1)  # pixels of a position
    return grid[0] * side, grid[1] * side


@torch.no_grad()
def generate_latents(pipe: DiffusionPipeline, prompts: Sequence[str], *, seed: int, steps: int, guidance: float,
                     size: tuple[int, int] | None = None, cache: str | Path | None = None) -> Latents:
    """What the model draws for each prompt, as latents (they are never decoded).

    Each image has noise of its own from (seed, its number), so the batch size doesn't matter. With a folder `cache`,
    latents are kept in its `latents/` and taken from there; several processes can share it.

    Raises:
        ValueError: a number that is invalid or too small, or prompts that aren't texts.
        UnsupportedPipelineError: the pipeline needs a picture to draw.
        FilteredImageError: latents became NaN or infinite.
    """
    return Latents.exact(_drawn_or_kept(pipe, prompts, (seed, steps, guidance, size), cache)["latents"])


@torch.no_grad()
def generate_trajectories(pipe: DiffusionPipeline, prompts: Sequence[str], *, seed: int, steps: int, guidance: float,
                          size: tuple[int, int] | None = None, cache: str | Path | None = None,
                          ) -> tuple[Latents, Tensor]:
    """What the denoiser gets on the way to each prompt's image: noisy latents, image after image, each from pure noise
    on, and the timestep of each, [images * calls]: some schedulers call the denoiser more than once for a step.

    Images and errors are those of `generate_latents` with the same arguments.
    """
    found = _drawn_or_kept(pipe, prompts, (seed, steps, guidance, size), cache, on_the_way=True)
    return Latents.exact(found["latents"].flatten(0, 1)), found["times"].flatten()


def _drawn_or_kept(pipe: DiffusionPipeline, prompts: Sequence[str], settings: tuple[Any, ...], cache: str | Path | None,
                   on_the_way: bool = False) -> dict[str, Tensor]:
    """What `_drawn` draws with these settings (seed, steps, guidance, size), once for all who share the cache."""
    seed, steps, guidance, size = settings
    prompts, _, _ = _checked(prompts, [seed := checked_seed(seed)] * len(prompts), steps, guidance)
    settings = seed, steps, guidance, size
    require_text_to_image(pipe)

    def draw() -> dict[str, Tensor]:
        return _drawn(pipe, prompts, *settings, on_the_way=on_the_way)

    if not cache:
        return draw()
    key = drawing_key(pipe, prompts, *settings, _GENERATED_AT_ONCE, *(["trajectories"] if on_the_way else []))
    return _kept(Path(cache), key, len(prompts), draw)


def _kept(cache: Path, key: str, count: int, draw: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the cache holds under this key, or what is drawn now and kept there."""
    file = cache / LATENTS / f"{key[:32]}.safetensors"
    found = _load(file, key, count)
    if found is None:
        with one_at_a_time(file.with_suffix(".lock"), PATIENCE):
            found = _load(file, key, count)
            if found is None:
                found = draw()
                write_tensors(file, {name: tensor.contiguous() for name, tensor in found.items()},
                              {"key": key, "sha256": digest(found.values())})
    return found


def _drawn(pipe: DiffusionPipeline, prompts: Sequence[str], seed: int, steps: int, guidance: float,
           size: tuple[int, int] | None, on_the_way: bool = False) -> dict[str, Tensor]:
    """The final "latents" as `Latents.exact` keeps them, [prompts, ...]; with `on_the_way` the denoiser's noisy
    "latents" instead, [prompts, steps, ...], and their "times" [prompts, steps]."""
    options, parts, ways = size_options(pipe, size), [], []
    with borrowed(pipe):
        for start in range(0, len(prompts), _GENERATED_AT_ONCE):
            chunk = list(prompts[start : start + _GENERATED_AT_ONCE])
            noise = [seeded(seed, start + number) for number in range(len(chunk))]
            with _watched(pipe, len(chunk)) if on_the_way else nullcontext([]) as way:
                drawn = pipe(chunk, generator=noise, num_inference_steps=steps, guidance_scale=guidance,
                             output_type="latent", **options).images
            if not bool(drawn.isfinite().all()):
                raise FilteredImageError(f"latents of {chunk} became NaN or infinite: the model's numbers overflowed; "
                                         "load it with dtype='float32' or 'bfloat16'")
            parts.append(drawn.to("cpu", torch.float32))
            ways.append(way)
    if not on_the_way:
        return {"latents": torch.cat(parts)}
    latents = [torch.stack([noisy for noisy, _ in way], dim=1) for way in ways]  # steps of [chunk, ...]
    times = [torch.stack([time for _, time in way], dim=1) for way in ways]
    return {"latents": torch.cat(latents), "times": torch.cat(times)}


@contextmanager
def _watched(pipe: DiffusionPipeline, count: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While open, collect what the denoiser gets at each step: `count` noisy latents, and the timestep of each.

    Guidance may call it twice on the same latents, once with each branch's text.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        noisy = given[next(iter(given))][-count:]  # with guidance the batch holds every image twice, both at one place
        time = torch.as_tensor(given["timestep"]).to("cpu", torch.float32).flatten()
        call = noisy.to("cpu", torch.float32), time[-1].expand(count)
        if not calls or not all(map(torch.equal, call, calls[-1])):
            calls.append(call)

    handle = denoiser(pipe).register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with uncompiled():
            yield calls
    finally:
        handle.remove()


def _load(file: Path, key: str, count: int) -> dict[str, Tensor] | None:
    """The tensors, if the file is there, whole, and the right one."""
    try:
        with safe_open(file, framework="pt") as opened:
            said, found = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError, ValueError):
        return None
    found = dict(sorted(found.items()))
    whole = ("latents" in found and all(len(tensor) == count and tensor.dtype == torch.float32
                                        for tensor in found.values())
             and said.get("key") == key and said.get("sha256") == digest(found.values()))
    return found if whole else None


# ---- reference images -----------------------------------------------------------------------------------------------


def load_images(source: Images) -> list[Image.Image]:
    """Images in RGB, upright: all image files of a folder (by name), or one or several files, images and arrays.

    Transparent parts become white.

    Raises:
        ReferenceImageError: no such folder, no image in it, or unreadable images, all named in one message.
    """
    items = _items(source)
    images, unreadable = [], []
    for item in items:
        try:
            images += [_upright_rgb(one) for one in (_from_array(item) if _is_array(item) else [item])]
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = item if isinstance(item, str | Path) else f"a {type(item).__name__}"
            unreadable.append(f"{name} ({error})")
    if unreadable:
        raise ReferenceImageError(
            f"{len(unreadable)} of {len(items)} reference images can't be read: {'; '.join(unreadable)}")
    if not images:
        inside = [f"'{folder}'" for folder in _folders(source) if _files(folder)]
        if inside:
            which = "that" if len(inside) == 1 else "one of them"
            raise ReferenceImageError(f"there is no image in '{source}' itself; images are in {', '.join(inside[:3])}"
                                      f"{' ...' if len(inside) > 3 else ''}: give {which}")
        raise ReferenceImageError(
            f"there is no image in '{source}'; known are files ending in {', '.join(sorted(_SUFFIXES))}")
    return images


def load_masks(source: Images) -> list[Image.Image]:
    """Masks as `load_images` reads images, in RGB, white where something is: transparent parts become black, and arrays
    of whole numbers 0 and 1 count as off and on."""
    masks = []
    for item in _items(source):
        if isinstance(item, np.ndarray | Tensor):
            whole = not torch.as_tensor(item).is_floating_point()
            item = item > 0 if whole and item.max() <= 1 else item
        elif isinstance(item, str | Path):
            with suppress(OSError, UnidentifiedImageError), Image.open(item) as opened:
                item = _on_black(opened)
        elif isinstance(item, Image.Image):
            item = _on_black(item)
        masks += load_images([item])
    return masks or load_images(source)  # which says that there is none


def _on_black(image: Image.Image) -> Image.Image:
    """The picture with black in place of what is transparent; others as they are."""
    if not image.has_transparency_data:
        return image.copy()
    rgba = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")


def _items(source: Any) -> list[Any]:
    """The files, images or arrays that `load_images` reads."""
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        if not str(source).strip() or not folder.exists():
            raise ReferenceImageError(f"the folder of reference images '{source}' doesn't exist")
        return [folder] if folder.is_file() else _files(folder)
    if isinstance(source, Image.Image) or _is_array(source):
        return [source]
    if not isinstance(source, Iterable) or isinstance(source, bytes | Mapping):
        raise ReferenceImageError(f"images can't be read from the {type(source).__name__} {shortened(source)}: {TAKEN}")
    return list(source)


def _files(folder: Path) -> list[Path]:
    """A folder's images by name; hidden files (a Mac's "._photo.jpg") don't count."""
    return sorted(file for file in folder.iterdir()
                  if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file())


def _folders(source: Any) -> list[Path]:
    """The folders inside, if a folder was given."""
    if not isinstance(source, str | Path):
        return []
    return sorted(inside for inside in Path(source).expanduser().iterdir()
                  if inside.is_dir() and not inside.name.startswith("."))


def _is_array(item: Any) -> bool:
    return isinstance(item, np.ndarray | Tensor)


def _from_array(values: np.ndarray | Tensor) -> list[Image.Image]:
    """The image or images in an array as pipelines return it, [.., height, width, channels], or in a tensor,
    [.., channels, height, width]."""
    array = values
    if isinstance(values, Tensor):
        array = (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
        array = np.moveaxis(array, -3, -1) if array.ndim > 2 else array
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    kind, whole = array.dtype, array.ndim == 4 and array.size and array.shape[-1] in (1, 3, 4)
    if whole and kind == np.bool_:
        array = array.astype(np.uint8) * 255
    elif whole and np.issubdtype(kind, np.floating) and array.min() >= 0 and array.max() <= 1:  # NaN is neither
        array = (array * 255).round().astype(np.uint8)
    if not whole or array.dtype != np.uint8:
        raise ValueError(f"{type(values).__name__} of shape {tuple(values.shape)} and type {values.dtype}: {TAKEN}")
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in array]


def as_image(value: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """One image in RGB from whatever pipelines return.

    Raises:
        ReferenceImageError: it isn't an image, or is several.
    """
    images = load_images(value)
    if len(images) != 1:
        raise ReferenceImageError(f"{len(images)} images where one is wanted; give one of them")
    return images[0]


def load_all(sources: Mapping[str, Images]) -> dict[str, list[Image.Image]]:
    """The reference images of several concepts, under the concepts' names.

    Raises:
        ReferenceImageError: images that can't be read, all named in one message.
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
        if not isinstance(item, str | Path) and not hasattr(item, "read"):
            raise ValueError(f"not an image but {type(item).__name__}: {TAKEN}")
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
    """Images as [images, 3, size, size] float32 in [-1, 1], resized if they have another size.

    Raises:
        ValueError: an array that is no images (uint8, or floats in [0, 1], in [images, height, width, channels]).
    """
    if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.shape[1:] != (size, size, 3)):
        images = _from_array(images)
    if not isinstance(images, np.ndarray):
        images = np.stack([np.asarray(i.convert("RGB") if i.size == (size, size) else
                                      i.convert("RGB").resize((size, size))) for i in images])
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
