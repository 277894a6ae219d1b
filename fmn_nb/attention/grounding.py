"""Does a word's attention map lie where the object is? Three scores of a map against a mask, and their intervals.

- Pointing game (Zhang et al., arXiv 1608.00507): is the map's maximum inside the mask?
- IoU at the best threshold: the largest overlap that any cut of this map reaches. It flatters a map, since the
  threshold is chosen with the mask in view; it flatters all maps alike.
- Attention inside: the share of the map's sum that lies inside the mask.

A map that says nothing (the same everywhere) scores, on average, the mask's own share of the image in each of them, so
every table has this share beside the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from fmn_nb.attention.record import AttentionRecord
from fmn_nb.attention.recorder import record_attention
from fmn_nb.models import Noising, as_image, conditions, denoiser, encode, pixel_size, predict, seeded
from fmn_nb.stats import mean_of_groups_interval, wilson

TIMESTEPS = (300, 500, 700)  # of 1000: the object is decided, its details are not
SCORES = {"pointing": "pointing game", "iou": "IoU at the best threshold", "inside": "attention inside"}


@dataclass(frozen=True)
class Grounding:
    """One map against one mask; all but `threshold` are fractions in [0, 1].

    Attributes:
        pointing: whether the maximum is inside.
        iou: the best intersection over union.
        threshold: the map's value that reaches it: the region is where the map is at least this.
        inside: the share of the map's sum inside the mask.
        area: the share of the image that the mask covers, which is what a map without information scores.
    """

    pointing: bool
    iou: float
    threshold: float
    inside: float
    area: float


def ground(attention_map: np.ndarray, mask: np.ndarray) -> Grounding:
    """Score an attention map [h, w] against a mask [height, width] of any size; the map is resized to the mask.

    Raises:
        ValueError: an array that isn't two-dimensional, a mask that is empty or covers everything, a map with negative
            or infinite values or one that is 0 everywhere.
    """
    mask = np.asarray(mask) > 0
    values = resized(attention_map, mask.shape)
    if mask.ndim != 2 or mask.all() or not mask.any():
        raise ValueError(f"a mask [height, width] with something inside and something outside is needed, "
                         f"not one of shape {mask.shape} that covers {mask.mean():.0%}")
    if values.min() < 0 or values.max() <= 0:
        raise ValueError("an attention map has no negative values and is not 0 everywhere")
    iou, threshold = best_iou(values, mask)
    pointing = bool(mask[np.unravel_index(values.argmax(), mask.shape)])
    return Grounding(pointing, iou, threshold, float(values[mask].sum() / values.sum()), float(mask.mean()))


def best_iou(values: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """The largest intersection over union of `mask` and {values >= threshold}, and that threshold; same shapes."""
    order = np.argsort(-values, axis=None, kind="stable")
    falling, hits = values.ravel()[order], np.cumsum(mask.ravel()[order])
    sizes = np.arange(1, len(order) + 1)
    ious = hits / (sizes + mask.sum() - hits)
    ious[:-1][falling[:-1] == falling[1:]] = 0  # a threshold takes all pixels of one value or none
    best = int(ious.argmax())
    return float(ious[best]), float(falling[best])


def resized(attention_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [h, w] at another height and width, bilinearly, float32."""
    values = np.asarray(attention_map, dtype=np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"an attention map is [height, width] with finite values, not of shape {values.shape}")
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))


@torch.no_grad()
def attention_on_images(pipe: DiffusionPipeline, images: Sequence[Image.Image], prompts: Sequence[str], *,
                        timesteps: Sequence[int] = TIMESTEPS, seed: int = 0, size: tuple[int, int] | None = None,
                        **selection: Any) -> AttentionRecord:
    """Attention while the model looks at given images: each is noised to each timestep and denoised one step.

    Args:
        images: PIL images; each is resized to cover `size` and cropped to its centre.
        prompts: one for each image.
        timesteps: of the training schedule, 0 (hardly any noise) to 999; each is a step of the record.
        seed: of the noise, the same for all timesteps.
        size: height and width in pixels; None for what the pipeline draws by default.
        selection: layers, heads, phrases and so on, as for `record_attention`.

    Returns:
        A record with one image for each given image and one step for each timestep.

    Raises:
        ValueError: no images, or not one prompt for each; timesteps that aren't in the schedule or repeat.
    """
    if not images or len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one prompt for each image")
    noising, model = Noising(pipe), denoiser(pipe)
    if not timesteps or len(set(timesteps)) < len(timesteps) or not set(timesteps) <= set(range(noising.steps)):
        raise ValueError(f"timesteps {list(timesteps)}: give different ones from 0 to {noising.steps - 1}")
    size = size or pixel_size(pipe)
    latents = encode(pipe, images, size).mean
    texts, each = conditions(pipe, prompts, size=size), torch.arange(len(images))
    noise = torch.randn(latents.shape, generator=seeded(seed))
    with record_attention(pipe, prompts=prompts, **selection) as attention:
        for timestep in timesteps:
            times = torch.full((len(images),), timestep)
            predict(model, noising.noisy(latents, noise, times).to(model.device), times, texts, each)
    return attention


def ground_images(pipe: DiffusionPipeline, images: Sequence[Image.Image], prompts: Sequence[str],
                  masks: Sequence[Mapping[str, np.ndarray]], *, batch: int = 16, seed: int = 0,
                  size: tuple[int, int] | None = None, **options: Any) -> pd.DataFrame:
    """Score the maps of phrases on images for which masks say where things are.

    Args:
        images: PIL images, and a prompt for each.
        masks: for each image, phrase of its prompt -> mask [height, width] of the image's own height and width, upright
            if the image says how it was held.
        batch: images at a time.
        options: timesteps, layers, heads, ..., as for `attention_on_images`.

    Returns:
        A row for each image and phrase: image (its number), phrase, and the fields of `Grounding`.

    Raises:
        ValueError: lengths that differ, or a mask of another size than its image.
        PhraseNotFoundError: a phrase that isn't in its prompt.
    """
    if not len(images) == len(prompts) == len(masks):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(masks)} sets of masks: "
                         "give as many of each")
    size, rows, images = size or pixel_size(pipe), [], [as_image(image) for image in images]
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        phrases = list(dict.fromkeys(phrase for known in masks[part] for phrase in known))
        if not phrases:
            continue
        attention = attention_on_images(pipe, images[part], prompts[part], seed=seed + start, size=size,
                                        phrases=phrases, **options)
        for number, (image, known) in enumerate(zip(images[part], masks[part], strict=True)):
            for phrase, mask in known.items():
                mask = np.asarray(mask) > 0
                if mask.shape != image.size[::-1]:
                    raise ValueError(f"a mask of {mask.shape} for an image of {image.size[::-1]} (height, width)")
                area = Image.fromarray(mask.astype(np.uint8))  # resized and cropped as `encode` does with its image
                fitted = np.asarray(ImageOps.fit(area, size[::-1], Image.Resampling.NEAREST))
                score = ground(attention.map(phrase, image=number), fitted)
                rows.append({"image": start + number, "phrase": phrase, **asdict(score)})
    return pd.DataFrame(rows, columns=["image", "phrase", *Grounding.__dataclass_fields__])


def summarise(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The mean of each score with its 95% interval.

    Args:
        scores: rows with the fields of `Grounding`, as from `ground_images`; rows of one "image" belong together.
        seed: of the bootstrap.

    Returns:
        Rows named as in `SCORES`; columns mean, low, high (Wilson's interval for the pointing game, a percentile
        bootstrap over images for the others), flat_map (what a map without information scores on average), count.

    Raises:
        ValueError: no rows.
    """
    if scores.empty:
        raise ValueError("there are no scores to summarise")
    table, images = {}, scores["image"] if "image" in scores else scores.index
    for name, title in SCORES.items():
        values = scores[name].to_numpy(dtype=float)
        interval = (wilson(int(values.sum()), len(values)) if name == "pointing"
                    else mean_of_groups_interval(pd.Series(values).groupby(np.asarray(images)), seed))
        table[title] = {"mean": values.mean(), "low": interval[0], "high": interval[1],
                        "flat_map": scores["area"].mean(), "count": len(values)}
    return pd.DataFrame.from_dict(table, orient="index").astype({"count": int})
