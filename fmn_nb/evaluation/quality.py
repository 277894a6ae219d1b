"""How good images are, apart from what they show: Frechet and kernel distance to real images, and CLIP score.

A distance compares two sets of images *on named features*. Two distances on different features have nothing to do with
each other, and a report refuses to put them side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fmn_nb.concepts import Concept, NotThereError, World
from fmn_nb.evaluation.protocol import Drawing
from fmn_nb.models import digest_of, to_pixels

SUBSETS = 50  # of the kernel distance
SUBSET_SIZE = 100
AT_ONCE = 64  # images through the feature network
Pictures = Sequence[Image.Image] | np.ndarray


class FeatureMismatchError(ValueError):
    """Two distances are on different features and can't be compared."""


@dataclass(frozen=True)
class Features:
    """A network's features of images.

    Attributes:
        name: says which network with which weights; comparable distances must share it.
        module: [images, 3, size, size] uint8 to [images, features].
        size: pixels, height and width; images of another size are resized.
        own_scale: whether the kernel distance divides the features' inner products by the real images' mean squared
            norm, so that it is of order 1 whatever the features' scale; otherwise by the number of features, as
            published distances on Inception do.
    """

    name: str
    module: nn.Module
    size: int
    own_scale: bool = False

    def sides(self, real: Pictures, images: Pictures) -> list[tuple[Tensor, bool]]:
        """Two sets of images as the module takes them, in chunks, and whether each chunk holds real ones."""
        if min(len(real), len(images)) < 2:
            raise ValueError(f"a distance needs at least 2 images a side, not {len(real)} and {len(images)}")
        as_bytes = [((to_pixels(side, self.size) + 1) * 127.5).round().byte() for side in (real, images)]
        return [(chunk, side is as_bytes[0]) for side in as_bytes for chunk in side.split(AT_ONCE)]


class JudgeFeatures(nn.Module):
    """A judge's features [images, features] of uint8 images [images, 3, height, width]."""

    def __init__(self, judge: nn.Module) -> None:
        super().__init__()
        self.judge = judge
        self.num_features = judge.label_head.in_features

    def forward(self, images: Tensor) -> Tensor:
        return self.judge.features(images.float() / 127.5 - 1)


def judge_features(judge: nn.Module) -> Features:
    """The features of a judge before its heads."""
    return Features(f"emoji-judge {digest_of(judge)[:8]}", JudgeFeatures(judge), judge.config.image_size,
                    own_scale=True)


def inception_features() -> Features:
    """The 2048 Inception features that published Frechet distances use (Heusel et al., arXiv 1706.08500).

    Raises:
        NotThereError: torch-fidelity or its weights aren't there; the message says what to do.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        module = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # no package, no network for its weights
        raise NotThereError(
            f"the Inception features aren't available here ({type(error).__name__}): pip install torch-fidelity, and "
            "let it fetch its weights once") from error
    module.num_features = 2048
    return Features("inception-v3-compat 2048", module, 299)


@torch.no_grad()
def frechet_distance(features: Features, real: Pictures, images: Pictures) -> float:
    """The Frechet distance of two sets of images on the given features; 0 for equal sets, no upper limit.

    It is comparable only with distances on the same features and about the same number of images, since fewer images
    make it larger (Heusel et al., arXiv 1706.08500). Raises ValueError for fewer than two images on a side.
    """
    sides = features.sides(real, images)
    metric = FrechetInceptionDistance(feature=features.module, input_img_size=(3, features.size, features.size))
    for chunk, is_real in sides:
        metric.update(chunk, real=is_real)
    return max(0.0, float(metric.compute()))


@torch.no_grad()
def kernel_distance(features: Features, real: Pictures, images: Pictures, seed: int = 0) -> float:
    """The kernel distance of two sets of images (Binkowski et al., arXiv 1801.01401): the squared maximum mean
    discrepancy under a cubic kernel, unbiased, so about 0 (also below) for sets of one kind; no upper limit.

    The kernel is (x y / c + 1)^3 with c as `Features.own_scale` says. It is a mean over random subsets, the same for
    the same `seed`. Raises ValueError for fewer than two images on a side.
    """
    sides, size = features.sides(real, images), min(SUBSET_SIZE, len(real), len(images))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save", category=UserWarning)
        metric = KernelInceptionDistance(feature=features.module, subsets=SUBSETS, subset_size=size)
        torch.default_generator.manual_seed(seed)
        for chunk, is_real in sides:
            metric.update(chunk, real=is_real)
        if features.own_scale:
            norm = float(torch.cat(metric.real_features).square().sum(1).mean())
            metric.gamma = 1 / norm if norm else None
        return float(metric.compute()[0])


@dataclass(frozen=True)
class Quality:
    """The available yardsticks of image quality; `reasons` says for each missing figure why it is missing."""

    real: Pictures | None = None
    features: Features | None = None
    scorer: Any = None
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, world: World, concept: Concept) -> Quality:
        """What the world has.

        Raises:
            ReferenceImageError: real images were given, but can't be read.
            ModelLoadError: a CLIP was named, but can't be read.
            ValueError: a single real image, which has no spread to compare with.
        """
        real = features = scorer = None
        reasons: dict[str, str] = {}
        try:
            scorer = world.scorer
        except NotThereError as missing:
            reasons["clip_score"] = str(missing)
        try:
            real, features = world.real_set(concept), world.features
        except NotThereError as missing:
            reasons |= {"frechet": str(missing), "kernel": str(missing)}
        if features is not None and len(real) < 2:
            raise ValueError(f"a distance needs at least 2 real images, not {len(real)}; give more with real=FOLDER")
        return cls(real, features, scorer, reasons)

    def figures(self, wanted: Sequence[Drawing], images: Sequence[Image.Image], seed: int) -> dict[str, Any]:
        """The retain set's distances to real images and its CLIP score, by their names in `Measures`."""
        kept, found = [image for d, image in zip(wanted, images, strict=True) if d.role == "retain"], {}
        if self.features is not None:
            found = {"features": self.features.name, "frechet": frechet_distance(self.features, self.real, kept),
                     "kernel": kernel_distance(self.features, self.real, kept, seed)}
        if self.scorer is not None:
            found["clip_score"] = self.scorer.score(kept, [d.prompt for d in wanted if d.role == "retain"])
        return found
