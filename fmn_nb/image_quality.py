"""How good images are apart from what they show: Frechet and kernel distance to real images, and CLIP score.

A distance is of two sets of images *on named features*. Two distances on different features have nothing to do with
each other, and `same_features` refuses them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fmn_nb.digests import digest_of
from fmn_nb.emoji.diffusion import tokenise
from fmn_nb.emoji.judge import Judge, to_pixels

SUBSETS = 50  # of the kernel distance
SUBSET_SIZE = 100
AT_ONCE = 64  # images through the feature network


class FeaturesMissingError(RuntimeError):
    """The features' network isn't installed here; the text says what to do."""


class FeatureMismatchError(ValueError):
    """Two distances are on different features and can't be compared."""


@dataclass(frozen=True)
class Features:
    """A network's features of images.

    Attributes:
        name: says which network with which weights; what two distances must share to be comparable.
        module: [images, 3, size, size] uint8 to [images, features].
        size: pixels, height and width; images of another size are resized.
        own_scale: whether the kernel distance divides the features' inner products by the real images' mean squared
            norm, so that it is of order 1 whatever the features' scale; else by their number, as published distances on
            Inception do.
    """

    name: str
    module: nn.Module
    size: int
    own_scale: bool = False

    def bytes_of(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """Images as the module takes them."""
        return ((to_pixels(images, self.size) + 1) * 127.5).round().byte()


class JudgeFeatures(nn.Module):
    """A judge's features [images, features] of uint8 images [images, 3, height, width]."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        self.num_features = judge.label_head.in_features

    def forward(self, images: Tensor) -> Tensor:
        return self.judge.features(images.float() / 127.5 - 1)


def judge_features(judge: Judge) -> Features:
    """The features of a judge before its heads."""
    return Features(f"emoji-judge {digest_of(judge)[:8]}", JudgeFeatures(judge), judge.config.image_size,
                    own_scale=True)


def inception_features() -> Features:
    """The 2048 Inception features that published Frechet distances use (Heusel et al., arXiv 1706.08500).

    Raises:
        FeaturesMissingError: torch-fidelity or its weights aren't there.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        module = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # no package, no network for its weights
        raise FeaturesMissingError(
            f"the Inception features can't be had here ({type(error).__name__}): pip install torch-fidelity, and let "
            "it fetch its weights once") from error
    module.num_features = 2048
    return Features("inception-v3-compat 2048", module, 299)


def same_features(first: str | None, second: str | None) -> None:
    """Raise FeatureMismatchError unless two distances are on the same named features."""
    if first != second:
        raise FeatureMismatchError(
            f"distances on the features {first!r} and {second!r} can't be compared; measure both on the same")


@torch.no_grad()
def frechet_distance(features: Features | Judge, real: Sequence[Image.Image] | np.ndarray,
                     images: Sequence[Image.Image] | np.ndarray) -> float:
    """The Frechet distance of two sets of images on the given features; 0 for equal sets, no upper limit.

    Comparable only with distances on the same features and about the same number of images, for it is larger for
    fewer (Heusel et al., arXiv 1706.08500). Raises ValueError for fewer than two images on a side.
    """
    features = _named(features)
    _check_counts("Frechet", real, images)
    metric = FrechetInceptionDistance(feature=features.module, input_img_size=(3, features.size, features.size))
    return max(0.0, float(_updated(metric, features, real, images).compute()))


@torch.no_grad()
def kernel_distance(features: Features | Judge, real: Sequence[Image.Image] | np.ndarray,
                    images: Sequence[Image.Image] | np.ndarray, seed: int = 0) -> float:
    """The kernel distance of two sets of images (Binkowski et al., arXiv 1801.01401): the squared maximum mean
    discrepancy under a cubic kernel, unbiased, so about 0 for sets of one kind, also below it; no upper limit.

    The kernel is (x y / c + 1)^3 with c as `Features.own_scale` says. The mean over random subsets, the same for the
    same `seed`. Raises ValueError for fewer than two images on a side.
    """
    features = _named(features)
    _check_counts("kernel", real, images)
    size = min(SUBSET_SIZE, len(real), len(images))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save", category=UserWarning)
        metric = KernelInceptionDistance(feature=features.module, subsets=SUBSETS, subset_size=size)
        torch.manual_seed(seed)
        _updated(metric, features, real, images)
        if features.own_scale:
            norm = float(torch.cat(metric.real_features).square().sum(1).mean())
            metric.gamma = 1 / norm if norm else None
        return float(metric.compute()[0])


def _named(features: Features | Judge) -> Features:
    return features if isinstance(features, Features) else judge_features(features)


def _check_counts(name: str, real: Sequence, images: Sequence) -> None:
    if min(len(real), len(images)) < 2:
        raise ValueError(f"a {name} distance needs at least 2 images a side, not {len(real)} and {len(images)}")


def _updated(metric: Any, features: Features, real: Any, images: Any) -> Any:
    for side, is_real in ((features.bytes_of(real), True), (features.bytes_of(images), False)):
        for start in range(0, len(side), AT_ONCE):
            metric.update(side[start:start + AT_ONCE], real=is_real)
    return metric


@torch.no_grad()
def clip_score(clip: nn.Module, tokenizer, images: Sequence[Image.Image] | np.ndarray,
               prompts: Sequence[str]) -> float:
    """Mean cosine, times 100, of each image with its prompt on a CLIPModel (Hessel et al., arXiv 2104.08718), >= 0.

    For the bundled CLIP and others that take pixels in [-1, 1]; `fmn_nb.evaluation_clip.Clip` reads any CLIPModel.
    """
    pixels = to_pixels(images, clip.config.vision_config.image_size)
    seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    asked = clip.text_projection(clip.text_model(input_ids=tokenise(tokenizer, prompts)).pooler_output)
    return float(100 * F.cosine_similarity(seen, asked).clamp(min=0).mean())
