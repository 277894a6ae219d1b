"""The emoji model's autoencoder: 64 x 64 images to 8 x 16 x 16 latents and back."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.emoji.training import Losses
from fmn_nb.emoji.world import IMAGE_SIZE

LATENT_CHANNELS = 8
KL_WEIGHT = 1e-6


def new_vae() -> AutoencoderKL:
    """An untrained AutoencoderKL with 0.7 million parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """[images, height, width, 3] uint8 to [images, 3, height, width] float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae: AutoencoderKL, images: np.ndarray, batch: int):
    """The loss of one step on random images: absolute and squared error, error of the image gradients, weak KL."""

    def loss(step: int, rng: torch.Generator) -> Losses:
        chosen = torch.randint(len(images), (batch,), generator=rng)
        target = to_tensor(images[chosen.numpy()])
        posterior = vae.encode(target).latent_dist
        restored = vae.decode(posterior.sample(rng)).sample
        squared = F.mse_loss(restored, target)
        reconstruction = F.l1_loss(restored, target) + 2 * squared + _gradient_loss(restored, target)
        return {"loss": reconstruction + KL_WEIGHT * posterior.kl().mean(), "psnr": psnr(squared.detach())}

    return loss


def _gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    return sum(F.l1_loss(a.diff(dim=dim), b.diff(dim=dim)) for dim in (-1, -2))


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images whose values span 2 (from -1 to 1)."""
    return 10 * torch.log10(4 / mean_squared_error)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of many images, each [images, 8, 16, 16] float32, unscaled."""
    posteriors = [vae.encode(to_tensor(images[i:i + batch])).latent_dist for i in range(0, len(images), batch)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def through_vae(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """What the autoencoder gives back for images, uint8 as they came."""
    restored = []
    for start in range(0, len(images), batch):
        decoded = vae.decode(vae.encode(to_tensor(images[start:start + batch])).latent_dist.mode()).sample
        restored.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(restored)
