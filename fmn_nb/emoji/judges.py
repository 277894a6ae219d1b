"""The judges: small classifiers that say which objects, readings, identities and style an image shows.

There are two, a convolutional network and a vision transformer, so that one can check the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fmn_nb.concepts import NOTHING, NotThereError, Verdict
from fmn_nb.emoji.world import IMAGE_SIZE, LABELS, STYLES
from fmn_nb.models import to_pixels

TILE = 8  # pixels, height and width of the tiles of rubble


class Judging(ModelMixin, ConfigMixin):
    """What all judges share: two heads of logits on `features`, and verdicts in words.

    Labels are judged independently of each other (an image may hold two objects); styles exclude each other.
    """

    stage: str  # of the recipe, which trains it

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The judge saved in `folder`, in evaluation mode; NotThereError, a FileNotFoundError, when there is none."""
        if not (folder / "config.json").is_file():
            raise NotThereError(f"no {cls.stage.replace('-', ' ')} in {folder}; build it with: fmn-nb pretrain "
                                f"--stages {cls.stage}")
        return cls.from_pretrained(folder, dtype=torch.float32).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the labels [batch, labels] and of the styles [batch, styles]."""
        features = self.features(images)
        return self.label_head(features), self.style_head(features)

    @torch.no_grad()
    def verdicts(self, images: Sequence[Image.Image] | np.ndarray, batch: int = 128) -> list[Verdict]:
        """Judge PIL images of any size, or [images, height, width, 3] uint8."""
        pixels = to_pixels(images, self.config.image_size)
        found: list[Verdict] = []
        for start in range(0, len(pixels), batch):
            labels, styles = self(pixels[start:start + batch].to(self.dtype))
            for shares, style in zip(labels.float().sigmoid().tolist(), styles.argmax(1).tolist(), strict=True):
                named = dict(zip(self.config.labels, shares, strict=True))
                best = max(named, key=named.get)
                found.append(Verdict(best if named[best] > 0.5 else NOTHING, self.config.styles[style],
                                     frozenset(name for name in named if named[name] > 0.5), named[best]))
        return found


class Judge(Judging):
    """A convolutional network: four blocks that halve the image, maximum over places, one head per question."""

    stage = "judge"

    @register_to_config
    def __init__(self, labels: Sequence[str] = LABELS, styles: Sequence[str] = tuple(STYLES),
                 channels: Sequence[int] = (32, 64, 96, 128), image_size: int = IMAGE_SIZE) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(
            nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(),
        ) for before, after in zip((3, *channels), channels, strict=False)))
        self.label_head = nn.Linear(channels[-1], len(labels))
        self.style_head = nn.Linear(channels[-1], len(styles))

    def features(self, images: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1] to the features before the heads, [batch, 128]."""
        return self.blocks(images).amax(dim=(2, 3))


class SecondJudge(Judging):
    """Patches of 8 pixels as tokens, pre-norm transformer layers, the mean over tokens, the first judge's two heads.

    One small convolution before the patches makes it learn fine strokes, and so styles, in fewer steps (Xiao et al.,
    arXiv 2106.14881).
    """

    stage = "second-judge"

    @register_to_config
    def __init__(self, labels: Sequence[str] = LABELS, styles: Sequence[str] = tuple(STYLES), width: int = 128,
                 depth: int = 4, heads: int = 4, patch: int = 8, image_size: int = IMAGE_SIZE) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
                                     nn.Conv2d(32, width, patch // 2, stride=patch // 2))
        self.places = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.label_head = nn.Linear(width, len(labels))
        self.style_head = nn.Linear(width, len(styles))

    def features(self, images: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1] to the features before the heads, [batch, 128]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places  # [batch, patches, width]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens).mean(dim=1)


def judge_loss(judge: nn.Module, images: np.ndarray, labels: Tensor, styles: Tensor, batch: int,
               shift: int = 0) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The loss of one training step: binary cross-entropy of the labels plus cross-entropy of the styles.

    `labels` [images, labels] holds 0 and 1, `styles` [images] class numbers. Half the images are made noisy or a bit
    darker or brighter; one in sixteen is cut into shuffled tiles and labelled as showing nothing, so that the judge
    calls no rubble an object. Each image is first moved by at most `shift` pixels to any side, its border repeated.
    """

    def loss(step: int, rng: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(images), (batch,), generator=rng)
        pixels = to_pixels(images[chosen.numpy()], IMAGE_SIZE)
        if shift:
            size, wide = pixels.shape[-1], F.pad(pixels, [shift] * 4, mode="replicate")
            corners = torch.randint(2 * shift + 1, (batch, 2), generator=rng).tolist()
            pixels = torch.stack([one[:, y:y + size, x:x + size] for one, (y, x) in zip(wide, corners, strict=True)])
        half = batch // 2
        strength = 0.1 * torch.rand(half, 1, 1, 1, generator=rng)
        light = 0.1 * torch.randn(half, 1, 1, 1, generator=rng)
        noisy = pixels[:half] + light + strength * torch.randn(pixels[:half].shape, generator=rng)
        pixels = torch.cat([noisy, pixels[half:]])
        target, rubble = labels[chosen].clone(), max(1, batch // 16)
        tiles = F.unfold(pixels[:rubble], TILE, stride=TILE)  # [rubble, 3 * TILE * TILE, tiles]
        order = torch.randperm(tiles.shape[-1], generator=rng)
        pixels[:rubble] = F.fold(tiles[..., order], pixels.shape[-2:], TILE, stride=TILE)
        target[:rubble] = 0
        label_logits, style_logits = judge(pixels)
        label_loss = F.binary_cross_entropy_with_logits(label_logits, target) * 10
        style_loss = F.cross_entropy(style_logits[rubble:], styles[chosen][rubble:])
        return {"loss": label_loss + style_loss, "labels": label_loss.detach(), "styles": style_loss.detach()}

    return loss
