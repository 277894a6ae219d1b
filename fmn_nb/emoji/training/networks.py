"""The emoji model's parts, each new network beside the loss it learns from: tokenizer, autoencoder, denoiser, CLIP.

A loss here is a function of (step, generator) that returns named values, of which "loss" is minimised.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fmn_nb.attention import Listener, attention_with_graph
from fmn_nb.concepts import WORLD_KEY
from fmn_nb.emoji.scenes import Scene
from fmn_nb.emoji.training.word_masks import WordMasks
from fmn_nb.emoji.world import IMAGE_SIZE, LATENT_SIZE, MAX_TOKENS
from fmn_nb.models import to_pixels

Losses = dict[str, Tensor]
Loss = Callable[[int, torch.Generator], Losses]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# Small enough that only frequent words become one token; rarer names stay in pieces, as in real CLIP.
MERGES = 198
LATENT_CHANNELS = 8
KL_WEIGHT = 1e-6
TEXT_WIDTH = 128
EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance: how often the model learns to draw without a caption
MIN_SNR = 5.0
WORD_WEIGHT = 0.01  # of the divergence of words' attention from their things, beside the error of the noise
CAPTIONS_PER_SCENE = 6
NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                  "beta_end": 0.012, "steps_offset": 1}
CLIP_WIDTH, CLIP_PROJECTION = 128, 64


def train_tokenizer(captions: Iterable[str], folder: Path, merges: int = MERGES) -> CLIPTokenizer:
    """Train a byte-pair vocabulary on `captions` and return it as a CLIPTokenizer, saved in `folder`.

    The vocabulary is CLIP's layout: 256 bytes, the same 256 ending a word (`</w>`), the merges, begin and end of text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, use_regex=False)])
    learner.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=512 + merges, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=alphabet))
    pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:merges]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in pairs] + [BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=pairs, unk_token=END, bos_token=BEGIN, eos_token=END,
                              pad_token=END, model_max_length=MAX_TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_vae() -> AutoencoderKL:
    """An untrained AutoencoderKL with 0.7 million parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        sample_size=IMAGE_SIZE)


def vae_loss(vae: AutoencoderKL, images: np.ndarray, batch: int) -> Loss:
    """The loss of one step on random images: absolute and squared error, error of the image gradients, weak KL."""

    def loss(step: int, rng: torch.Generator) -> Losses:
        chosen = torch.randint(len(images), (batch,), generator=rng)
        target = to_pixels(images[chosen.numpy()], IMAGE_SIZE)
        posterior = vae.encode(target).latent_dist
        restored = vae.decode(posterior.sample(rng)).sample
        squared = F.mse_loss(restored, target)
        reconstruction = F.l1_loss(restored, target) + 2 * squared + sum(  # and of the image gradients:
            F.l1_loss(restored.diff(dim=dim), target.diff(dim=dim)) for dim in (-1, -2))
        psnr = 10 * torch.log10(4 / squared.detach())  # in dB, of values that span 2
        return {"loss": reconstruction + KL_WEIGHT * posterior.kl().mean(), "psnr": psnr}

    return loss


@torch.no_grad()
def through_vae(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """What the autoencoder restores of images, as uint8 like them."""
    restored = []
    for start in range(0, len(images), batch):
        decoded = vae.decode(vae.encode(to_pixels(images[start:start + batch], IMAGE_SIZE)).latent_dist.mode()).sample
        restored.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(restored)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder: causal, 3 layers, width 128, 32 positions."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


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
    scaling_factor: Tensor  # float64, one number, which makes the latents' standard deviation 1


@torch.no_grad()
def prepare_latents(vae: AutoencoderKL, tokenizer: CLIPTokenizer, scenes: Sequence[Scene], images: np.ndarray,
                    seed: int) -> Latents:
    """Encode images and tokenise `CAPTIONS_PER_SCENE` random captions of each scene.

    Raises ValueError for a caption that is too long for the text encoder.
    """
    parts = (to_pixels(images[start:start + 64], IMAGE_SIZE) for start in range(0, len(images), 64))
    posteriors = [vae.encode(part).latent_dist for part in parts]
    mean, std = (torch.cat([getattr(one, name) for one in posteriors]) for name in ("mean", "std"))
    rng = random.Random(f"captions-{seed}")
    captions = [scene.caption(rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS).input_ids
    too_long = [c for c, ids in zip(captions, encoded, strict=True) if len(ids) > MAX_TOKENS]
    if too_long:
        raise ValueError(f"{len(too_long)} captions need more than {MAX_TOKENS} tokens, the first is {too_long[0]!r}")
    tokens = torch.tensor(encoded).view(len(scenes), CAPTIONS_PER_SCENE, MAX_TOKENS)
    scaling_factor = torch.tensor(1 / mean.std().item(), dtype=torch.float64)
    return Latents(mean.half().contiguous(), std.half().contiguous(), tokens.short(), scaling_factor)


def min_snr_weights() -> Tensor:
    """How much the squared error of the noise counts at each timestep [1000]: min(SNR, 5) / SNR.

    Source: Hang et al., arXiv 2303.09556.
    """
    kept = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod
    snr = kept / (1 - kept)
    return snr.clamp(max=MIN_SNR) / snr


def denoising_loss(denoiser: Denoiser, data: Latents, words: WordMasks, empty: Tensor, batch: int) -> Loss:
    """The loss of one step: squared error of the noise, weighted by `min_snr_weights`, and 0.01 times the divergence of
    words' attention from their things (`WordMasks.divergence`).

    `empty` [32] are the token ids of the empty caption.
    """
    scheduler, weights, listener = DDPMScheduler(**NOISE_SCHEDULE), min_snr_weights(), Listener(denoiser.unet)

    def loss(step: int, rng: torch.Generator) -> Losses:
        chosen = torch.randint(len(data.mean), (batch,), generator=rng)
        which = torch.randint(data.tokens.shape[1], (batch,), generator=rng)
        mean, std = data.mean[chosen].float(), data.std[chosen].float()
        latents = data.scaling_factor * (mean + std * torch.randn(mean.shape, generator=rng))
        told = torch.rand(batch, generator=rng) >= EMPTY_CAPTION_SHARE
        tokens = torch.where(told[:, None], data.tokens[chosen, which].long(), empty)
        timesteps = torch.randint(len(weights), (batch,), generator=rng)
        noise = torch.randn(latents.shape, generator=rng)
        with attention_with_graph(listener) as attention:
            predicted = denoiser(scheduler.add_noise(latents, noise, timesteps), timesteps, tokens)
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        divergence = words.divergence(attention, chosen, which, told)
        return {"loss": (weights[timesteps] * errors).mean() + WORD_WEIGHT * divergence,
                "error": errors.mean().detach(), "divergence": divergence.detach()}

    return loss


def assemble(vae: AutoencoderKL, tokenizer: CLIPTokenizer, denoiser: Denoiser) -> StableDiffusionPipeline:
    """The parts as a StableDiffusionPipeline with DPM-Solver++ and no safety checker; it notes its world."""
    denoiser.unet.register_to_config(**{WORLD_KEY: "emoji"})
    return StableDiffusionPipeline(
        vae=vae, text_encoder=denoiser.text_encoder, tokenizer=tokenizer, unet=denoiser.unet,
        scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def new_clip(text_encoder: CLIPTextModel) -> CLIPModel:
    """A CLIPModel whose text side is `text_encoder`, frozen; only the projections and the image side will learn."""
    vision = {"hidden_size": CLIP_WIDTH, "intermediate_size": 2 * CLIP_WIDTH, "num_hidden_layers": 4,
              "num_attention_heads": 4, "image_size": IMAGE_SIZE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text_encoder.config.to_dict(), vision_config=vision,
                                projection_dim=CLIP_PROJECTION))
    clip.text_model.load_state_dict(text_encoder.state_dict())
    clip.text_model.requires_grad_(False)
    return clip


def clip_loss(clip: CLIPModel, images: np.ndarray, tokens: Tensor, batch: int) -> Loss:
    """The loss of one step: CLIP's symmetric cross-entropy (Radford et al., arXiv 2103.00020, section 2.3).

    `tokens` [images, captions, length]. Pairs of a batch with the same caption don't count as mismatches.
    """

    def loss(step: int, rng: torch.Generator) -> Losses:
        chosen = torch.randperm(len(images), generator=rng)[:batch]
        which = torch.randint(tokens.shape[1], (len(chosen),), generator=rng)
        captions = tokens[chosen, which].long()
        pixels = to_pixels(images[chosen.numpy()], IMAGE_SIZE)
        seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        said = clip.text_projection(clip.text_model(input_ids=captions).pooler_output)
        cosines = F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T  # [images, captions]
        logits = cosines * clip.logit_scale.exp()
        same = (captions[:, None] == captions[None]).all(-1) & ~torch.eye(len(chosen), dtype=torch.bool)
        logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(len(chosen))
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": value, "matched": (logits.argmax(1) == target).float().mean()}

    return loss
