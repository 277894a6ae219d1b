"""Whole pipelines in miniature: random weights from a fixed seed, real tokenizers, built in well under a second.

Each function returns a fresh pipeline that behaves like its full-size model in every way but the size:
`tiny_sd` (Stable Diffusion 1.x / 2.x), `tiny_sdxl` (two text encoders), `tiny_pixart` (T5, cross-attention
transformer), `tiny_sd3` (joint attention, two CLIPs and a T5), `tiny_flux` (double and single stream blocks).
"""

from __future__ import annotations

import json
from functools import cache

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fmn_nb.attention import record_attention

CORPUS = [
    "a photo of a cat and a dog",
    "a photo of a frog in the style of noto",
    "a picture of a penguin, a fish and an octopus on a blue background",
    "a birthday cake and an alarm clock",
]


@cache  # the training breaks ties between pairs at random, so two of them needn't share one vocabulary
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    trained = CLIPTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.backend_tokenizer.train_from_iterator(CORPUS, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    pieces += [left + right for left, right in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, merges


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary trained on CORPUS: "cat" is one token, "butterfly" several."""
    vocab, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=length)


def t5_tokenizer(length: int = 20) -> T5Tokenizer:
    """T5's unigram tokenizer that knows the words of CORPUS whole and everything else letter by letter."""
    words = sorted({word.strip(",") for sentence in CORPUS for word in sentence.split()})
    letters = "abcdefghijklmnopqrstuvwxyz,.!?'-0123456789"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [("▁" + word, -2.0) for word in words if len(word) > 1] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def clip_text_encoder(tokenizer: CLIPTokenizer, width: int = 16, projection: int | None = None) -> CLIPTextModel:
    """A two-layer CLIP text encoder; with `projection` the kind that also returns a pooled, projected embedding."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_text_encoder(tokenizer: T5Tokenizer, width: int = 16) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def tiny_vae(latent_channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    """An autoencoder that halves each side: 16 x 16 pixels are 8 x 8 latents."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=latent_channels, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, sample_size=16, shift_factor=shift,
        use_quant_conv=shift is None, use_post_quant_conv=shift is None).eval()


def tiny_unet(text_width: int = 16, **config: object) -> UNet2DConditionModel:
    """A U-Net with cross-attention at full, half and (middle block) half resolution: 16, 16 and 32 channels."""
    settings: dict = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text_width, attention_head_dim=2, norm_num_groups=8)
    return UNet2DConditionModel(**{**settings, **config}).eval()


def quiet(pipe):
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt: str | list[str] = "a photo of a cat", *, steps: int = 2, seed: int = 0, **arguments):
    """Images [n, height, width, 3] of any tiny pipeline, 16 pixels high and 24 wide unless said otherwise."""
    settings = {"num_inference_steps": steps, "height": 16, "width": 24, "output_type": "np",
                "generator": torch.Generator().manual_seed(seed)}
    if getattr(pipe, "tokenizer_3", None) is not None or not isinstance(pipe.tokenizer, CLIPTokenizer) \
            or isinstance(getattr(pipe, "tokenizer_2", None), T5Tokenizer):
        settings["max_sequence_length"] = 20
    if isinstance(pipe, PixArtSigmaPipeline):
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    return pipe(prompt, **{**settings, **arguments}).images


def recorded(pipe, *prompt: str | list[str], keeping: dict | None = None, **arguments):
    """The attention while `generate` draws with these arguments: all of it, or what `keeping` selects."""
    with record_attention(pipe, **keeping or {}) as attention:
        generate(pipe, *prompt, **arguments)
    return attention


def tiny_sd(seed: int = 0, **unet_config: object) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x in miniature: 16 tokens, 8 x 8 latents, 16 x 16 images."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    return quiet(StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=clip_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=tiny_unet(**unet_config), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False))


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """An SDXL in miniature: two text encoders, their embeddings side by side, size conditioning."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    unet = tiny_unet(text_width=32, addition_embed_type="text_time", addition_time_embed_dim=8,
                     projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(1, 2),
                     use_linear_projection=True)
    return quiet(StableDiffusionXLPipeline(
        vae=tiny_vae(), unet=unet, tokenizer=tokenizer, tokenizer_2=clip_tokenizer(),
        text_encoder=clip_text_encoder(tokenizer), text_encoder_2=clip_text_encoder(tokenizer, projection=16),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), add_watermarker=False))


def tiny_pixart(seed: int = 0) -> PixArtSigmaPipeline:
    """A PixArt-Sigma in miniature: a transformer with cross-attention (and an attention mask) to T5."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
        norm_type="ada_norm_single").eval()
    fill_zero_weights(transformer)
    return quiet(PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=t5_text_encoder(tokenizer), vae=tiny_vae(), transformer=transformer,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False)))


def tiny_sd3(seed: int = 0, dual_attention: bool = False) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 in miniature: 16 CLIP columns, then T5's; optionally with a dual-attention block."""
    torch.manual_seed(seed)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8, dual_attention_layers=(0,) if dual_attention else (),
        qk_norm="rms_norm" if dual_attention else None).eval()
    return quiet(StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(shift=0.0),
        text_encoder=clip_text_encoder(tokenizer, projection=16), tokenizer=tokenizer,
        text_encoder_2=clip_text_encoder(tokenizer, projection=16), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_encoder(t5, width=32), tokenizer_3=t5))


def tiny_flux(seed: int = 0) -> FluxPipeline:
    """A Flux in miniature: one double-stream and one single-stream block, packed latents, T5 columns only."""
    torch.manual_seed(seed)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8)).eval()
    return quiet(FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(shift=0.0),
        text_encoder=clip_text_encoder(tokenizer), tokenizer=tokenizer,
        text_encoder_2=t5_text_encoder(t5, width=32), tokenizer_2=t5, transformer=transformer))


def fill_zero_weights(module: torch.nn.Module) -> None:
    """Give weights that start at zero small random values, so that every part of a random model has an effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.1)
