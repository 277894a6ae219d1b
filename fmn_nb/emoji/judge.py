"""The judge: a small classifier that says which objects, readings, identities and style an image shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fmn_nb.emoji.world import IMAGE_SIZE, LABELS, STYLES

NOTHING = "nothing"


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one image; `label` is "nothing" where no probability exceeds one half."""

    label: str
    style: str
    seen: frozenset[str]
    probability: float  # of the most probable label


class Judging:
    """What every judge does with its logits: two heads on `features`, and verdicts in words.

    Labels are judged independently of each other (an image may hold two objects), styles exclude each other.
    """

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
            found += [self._verdict(p, s) for p, s in zip(labels.float().sigmoid(), styles.argmax(1), strict=True)]
        return found

    def _verdict(self, probabilities: Tensor, style: Tensor) -> Verdict:
        names = self.config.labels
        best = int(probabilities.argmax())
        seen = frozenset(names[i] for i in (probabilities > 0.5).nonzero().flatten().tolist())
        return Verdict(names[best] if probabilities[best] > 0.5 else NOTHING, self.config.styles[int(style)], seen,
                       float(probabilities[best]))


class Judge(Judging, ModelMixin, ConfigMixin):
    """A convolutional network: four blocks that halve the image, maximum over places, one head a question."""

    @register_to_config
    def __init__(self, labels: Sequence[str] = LABELS, styles: Sequence[str] = tuple(STYLES),
                 channels: Sequence[int] = (32, 64, 96, 128), image_size: int = IMAGE_SIZE) -> None:
        super().__init__()
        blocks, width = [], 3
        for channel in channels:
            blocks.append(_block(width, channel))
            width = channel
        self.blocks = nn.Sequential(*blocks)
        self.label_head = nn.Linear(width, len(labels))
        self.style_head = nn.Linear(width, len(styles))

    def features(self, images: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1] to the features before the heads, [batch, 128]."""
        return self.blocks(images).amax(dim=(2, 3))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def to_pixels(images: Sequence[Image.Image] | np.ndarray, size: int) -> Tensor:
    """Images as [images, 3, size, size] float32 in [-1, 1], resized where they are not that large."""
    if not isinstance(images, np.ndarray):
        images = np.stack([
            np.asarray(i.convert("RGB") if i.size == (size, size) else i.convert("RGB").resize((size, size)))
            for i in images
        ])
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_judge(folder: Path) -> Judge:
    """The judge saved in `folder`, in evaluation mode; FileNotFoundError when there is none."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no judge in {folder}; build it with: fmn-nb pretrain --stages judge")
    return Judge.from_pretrained(folder, dtype=torch.float32).eval()


def judge_loss(judge: nn.Module, images: np.ndarray, labels: Tensor, styles: Tensor, batch: int,
               shift: int = 0) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The loss of one step: binary cross-entropy of the labels plus cross-entropy of the styles.

    `labels` [images, labels] holds 0 and 1, `styles` [images] class numbers. Half the images are made noisy or a bit
    darker or brighter; one in sixteen is cut into shuffled tiles and labelled as showing nothing, so that rubble is
    not called an object. Each image is first moved by at most `shift` pixels to any side, its border repeated.
    """

    def loss(step: int, rng: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(images), (batch,), generator=rng)
        pixels = _disturb(_moved(to_pixels(images[chosen.numpy()], IMAGE_SIZE), shift, rng), rng)
        target = labels[chosen].clone()
        rubble = max(1, batch // 16)
        pixels[:rubble] = _shuffle_tiles(pixels[:rubble], rng)
        target[:rubble] = 0
        label_logits, style_logits = judge(pixels)
        label_loss = F.binary_cross_entropy_with_logits(label_logits, target) * 10
        style_loss = F.cross_entropy(style_logits[rubble:], styles[chosen][rubble:])
        return {"loss": label_loss + style_loss, "labels": label_loss.detach(), "styles": style_loss.detach()}

    return loss


def _moved(pixels: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    if not shift:
        return pixels
    size = pixels.shape[-1]
    wide = F.pad(pixels, [shift] * 4, mode="replicate")
    corners = torch.randint(2 * shift + 1, (len(pixels), 2), generator=rng).tolist()
    return torch.stack([image[:, y:y + size, x:x + size] for image, (y, x) in zip(wide, corners, strict=True)])


def _disturb(pixels: Tensor, rng: torch.Generator) -> Tensor:
    half = len(pixels) // 2
    strength = 0.1 * torch.rand(half, 1, 1, 1, generator=rng)
    shift = 0.1 * torch.randn(half, 1, 1, 1, generator=rng)
    changed = pixels[:half] + shift + strength * torch.randn(pixels[:half].shape, generator=rng)
    return torch.cat([changed, pixels[half:]])


def _shuffle_tiles(pixels: Tensor, rng: torch.Generator, tile: int = 8) -> Tensor:
    tiles = F.unfold(pixels, tile, stride=tile)
    order = torch.randperm(tiles.shape[-1], generator=rng)
    return F.fold(tiles[..., order], pixels.shape[-2:], tile, stride=tile)
