"""The emoji model's text encoder and U-Net, trained jointly to predict the noise in scenes' latents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fmn_nb.emoji.scenes import Scene
from fmn_nb.emoji.training import Losses
from fmn_nb.emoji.vae import LATENT_CHANNELS, encode
from fmn_nb.emoji.world import LATENT_SIZE, MAX_TOKENS

TEXT_WIDTH = 128
EMPTY_CAPTION_SHARE = 0.1  # classifier-free guidance: so often the model learns to draw without a caption
MIN_SNR = 5.0
CAPTIONS_PER_SCENE = 6
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder: causal, 3 layers, width 128, 32 positions."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))


def new_unet() -> UNet2DConditionModel:
    """An untrained U-Net with 4.3 million parameters and cross-attention at 16 x 16, 8 x 8 and 4 x 4 latents."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 4),  # despite its name, diffusers reads the number of heads here
        norm_num_groups=8,
    )


class Denoiser(nn.Module):
    """Text encoder and U-Net as one module: both learn from the same noise-prediction loss."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predicted noise [batch, 8, 16, 16] for noisy latents, timesteps [batch] and token ids [batch, 32]."""
        return self.unet(latents, timesteps, self.text_encoder(tokens).last_hidden_state).sample


@dataclass
class Latents:
    """Scenes as the denoiser sees them: posterior mean and deviation, several tokenised captions each."""

    mean: Tensor  # [scenes, 8, 16, 16] float16, unscaled
    std: Tensor
    tokens: Tensor  # [scenes, captions, 32] int16
    scaling_factor: float  # what makes the latents' standard deviation 1


def prepare_latents(vae: AutoencoderKL, tokenizer: CLIPTokenizer, scenes: Sequence[Scene], images: np.ndarray,
                    seed: int) -> Latents:
    """Encode images and tokenise `CAPTIONS_PER_SCENE` random captions of each scene."""
    mean, std = encode(vae, images)
    rng = random.Random(f"captions-{seed}")
    captions = [scene.caption(rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    tokens = tokenise(tokenizer, captions).view(len(scenes), CAPTIONS_PER_SCENE, MAX_TOKENS)
    return Latents(mean.half().contiguous(), std.half().contiguous(), tokens.short(), 1 / mean.std().item())


def tokenise(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids [captions, 32], padded with end of text; a caption that does not fit raises ValueError."""
    encoded = tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS).input_ids
    too_long = [c for c, ids in zip(captions, encoded, strict=True) if len(ids) > MAX_TOKENS]
    if too_long:
        raise ValueError(f"{len(too_long)} captions need more than {MAX_TOKENS} tokens, the first is {too_long[0]!r}")
    return torch.tensor(encoded)


def denoising_loss(denoiser: Denoiser, data: Latents, empty: Tensor, batch: int):
    """The loss of one step: squared error of the noise, weighted by min-SNR-5 (Hang et al., arXiv 2303.09556).

    `empty` [32] are the token ids of the empty caption.
    """
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=MIN_SNR) / snr

    def loss(step: int, rng: torch.Generator) -> Losses:
        chosen = torch.randint(len(data.mean), (batch,), generator=rng)
        which = torch.randint(data.tokens.shape[1], (batch,), generator=rng)
        mean, std = data.mean[chosen].float(), data.std[chosen].float()
        latents = data.scaling_factor * (mean + std * torch.randn(mean.shape, generator=rng))
        tokens = data.tokens[chosen, which].long()
        tokens[torch.rand(batch, generator=rng) < EMPTY_CAPTION_SHARE] = empty
        timesteps = torch.randint(len(snr), (batch,), generator=rng)
        noise = torch.randn(latents.shape, generator=rng)
        predicted = denoiser(scheduler.add_noise(latents, noise, timesteps), timesteps, tokens)
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        return {"loss": (weights[timesteps] * errors).mean(), "error": errors.mean().detach()}

    return loss


def assemble(vae: AutoencoderKL, tokenizer: CLIPTokenizer, denoiser: Denoiser) -> StableDiffusionPipeline:
    """The parts as a StableDiffusionPipeline with DPM-Solver++ and no safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
