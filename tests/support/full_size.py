"""Whole pipelines in the sizes of well-known checkpoints, with random weights and small vocabularies.

No weights are downloaded: what a model draws is noise, but time and memory are those of the real one. `SMALLER` cuts
Flux, whose twelve billion weights fit few machines: blocks in their full width, fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import clip_tokenizer, quiet, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

SMALLER = {"num_layers": 2, "num_single_layers": 4, "t5_layers": 2}  # of 19, 38 and 24


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: 860 million weights in the U-Net, 512 pixels."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(77)
    return _stable_diffusion(UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
                             clip_text(tokenizer, 768, layers=12), tokenizer, "epsilon")


def sd21() -> StableDiffusionPipeline:
    """Stable Diffusion 2.1: 866 million weights, a wider text encoder, v-prediction, 768 pixels."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(77)
    unet = UNet2DConditionModel(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                                use_linear_projection=True)
    return _stable_diffusion(unet, clip_text(tokenizer, 1024, layers=23), tokenizer, "v_prediction")


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: 2.6 billion weights, two text encoders, 1024 pixels."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(77)
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    return quiet(StableDiffusionXLPipeline(
        vae=vae(), unet=unet.eval(), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=clip_text(tokenizer, 768, layers=12),
        text_encoder_2=clip_text(tokenizer, 1280, layers=32, projection=1280),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), add_watermarker=False))


def flux_small() -> FluxPipeline:
    """Flux with blocks of the full width 3072, two of 19 double-stream and four of 38 single-stream ones; a T5 with two
    of 24 layers, 1024 pixels."""
    torch.manual_seed(0)
    tokenizer, second = clip_tokenizer(77), t5_tokenizer(512)
    t5 = T5EncoderModel(T5Config(vocab_size=len(second), d_model=4096, d_kv=64, d_ff=10240, num_heads=64,
                                 num_layers=SMALLER["t5_layers"], feed_forward_proj="gated-gelu"))
    transformer = FluxTransformer2DModel(num_layers=SMALLER["num_layers"], guidance_embeds=True,
                                         num_single_layers=SMALLER["num_single_layers"])
    return quiet(FluxPipeline(
        vae=vae(16, 0.1159), transformer=transformer.eval(), tokenizer=tokenizer, tokenizer_2=second,
        text_encoder=clip_text(tokenizer, 768, layers=12), text_encoder_2=t5.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)))


def vae(latent_channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    """The autoencoder of Stable Diffusion; with 16 channels that of Flux."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=latent_channels, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=shift,
        use_quant_conv=shift is None, use_post_quant_conv=shift is None).eval()


def clip_text(tokenizer, width: int, layers: int, projection: int | None = None) -> CLIPTextModel:  # noqa: ANN001
    """A CLIP text encoder with 64 channels a head; with `projection` the kind that also projects what it pools."""
    config = CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                            num_attention_heads=width // 64, max_position_embeddings=77,
                            projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _stable_diffusion(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer, prediction: str,  # noqa: ANN001
                      ) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type=prediction), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False))


#: name -> how to build it, and the pixels a side that it was made for
FULL_SIZE: dict[str, tuple[Callable[[], DiffusionPipeline], int]] = {
    "sd15": (sd15, 512), "sd21": (sd21, 768), "sdxl": (sdxl, 1024), "flux-small": (flux_small, 1024)}
