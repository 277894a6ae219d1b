"""How good images are apart from what they show: Frechet distance and CLIP score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from fmn_nb.emoji.diffusion import tokenise
from fmn_nb.emoji.judge import Judge, to_pixels


class JudgeFeatures(nn.Module):
    """The judge's features [images, 128] of uint8 images [images, 3, height, width]."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        self.num_features = judge.label_head.in_features

    def forward(self, images: Tensor) -> Tensor:
        return self.judge.features(images.float() / 127.5 - 1)


@torch.no_grad()
def frechet_distance(judge: Judge, real: Sequence[Image.Image] | np.ndarray, images: Sequence[Image.Image]) -> float:
    """The Frechet distance of two sets of images on the judge's features; 0 for equal sets, no upper limit.

    Comparable only with distances on the same features and about the same number of images (Heusel et al.,
    arXiv 1706.08500). Raises ValueError for fewer than two images on a side.
    """
    if min(len(real), len(images)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images a side, not {len(real)} and {len(images)}")
    size = judge.config.image_size
    metric = FrechetInceptionDistance(feature=JudgeFeatures(judge), input_img_size=(3, size, size))
    metric.update(_as_bytes(real, size), real=True)
    metric.update(_as_bytes(images, size), real=False)
    return max(0.0, float(metric.compute()))


def _as_bytes(images: Sequence[Image.Image] | np.ndarray, size: int) -> Tensor:
    return ((to_pixels(images, size) + 1) * 127.5).round().byte()


@torch.no_grad()
def clip_score(clip: nn.Module, tokenizer, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """Mean cosine, times 100, of each image with its prompt on a CLIPModel (Hessel et al., arXiv 2104.08718), >= 0."""
    pixels = to_pixels(images, clip.config.vision_config.image_size)
    seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    asked = clip.text_projection(clip.text_model(input_ids=tokenise(tokenizer, prompts)).pooler_output)
    return float(100 * F.cosine_similarity(seen, asked).clamp(min=0).mean())
