"""The second judge: a small vision transformer, trained on the same scenes, that checks the first judge's verdicts.

Two judges of one architecture could share a blind spot; this one cuts the image into patches and lets them attend to
each other (Dosovitskiy et al., arXiv 2010.11929), where the first slides small filters over it. Attention learns less
from sharp scenes about drawn ones than filters do, so scenes that the diffusion model drew again (`redrawing`) and
shifts by some pixels are part of its training. No verdict of the first judge is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fmn_nb.emoji.judge import Judging
from fmn_nb.emoji.world import IMAGE_SIZE, LABELS, STYLES


class SecondJudge(Judging, ModelMixin, ConfigMixin):
    """Patches of 8 pixels as tokens, pre-norm transformer layers, the mean over tokens, the first judge's two heads.

    One small convolution before the cutting makes it learn fine strokes, and so styles, in fewer steps (Xiao et al.,
    arXiv 2106.14881).
    """

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
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens).mean(dim=1)


def load_second_judge(folder: Path) -> SecondJudge:
    """The second judge saved in `folder`, in evaluation mode; FileNotFoundError when there is none."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("the second judge is not there; build it with: fmn-nb pretrain --stages second-judge")
    return SecondJudge.from_pretrained(folder, dtype=torch.float32).eval()
