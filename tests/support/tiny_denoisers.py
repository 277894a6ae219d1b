"""Denoisers in miniature for the rest of the architecture table: each with arguments to call it with, one row.

All see 8 x 12 latents (8 x 6 positions a side where they are packed or patched) and `TOKENS` text embeddings, and are
called as `model(**arguments)`; `arguments["encoder_hidden_states"]` is the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    HunyuanDiT2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
)
from tiny import fill_zero_weights

TOKENS = 6
Denoiser = tuple[torch.nn.Module, dict[str, Any]]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def sana() -> Denoiser:
    """Linear self-attention, ordinary cross-attention."""
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8)
    return model, {"hidden_states": noise(1, 4, 8, 12), "encoder_hidden_states": noise(1, TOKENS, 16),
                   "timestep": torch.tensor([500])}


def hunyuan() -> Denoiser:
    """Cross-attention to two encoders' columns one after another: here 4 and 2."""
    model = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=2, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=4,
        text_len_t5=2, use_style_cond_and_image_meta_size=False)
    return model, {"hidden_states": noise(1, 4, 8, 12), "encoder_hidden_states": noise(1, 4, 16),
                   "text_embedding_mask": torch.ones(1, 4), "encoder_hidden_states_t5": noise(1, 2, 16),
                   "text_embedding_mask_t5": torch.ones(1, 2), "timestep": torch.tensor([500.0]),
                   "image_rotary_emb": tuple(noise(24, 8) for _ in range(2))}


def wan() -> Denoiser:
    """A video model, called with a single frame."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    return model, {"hidden_states": noise(1, 4, 1, 8, 12), "encoder_hidden_states": noise(1, TOKENS, 16),
                   "timestep": torch.tensor([500])}


def chroma() -> Denoiser:
    model = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1)
    return model, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, TOKENS, 16),
                   "timestep": torch.tensor([0.5]), "img_ids": positions(4, 6), "txt_ids": torch.zeros(TOKENS, 3)}


def aura_flow() -> Denoiser:
    """Eight registers stand before the text."""
    model = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64)
    return model, {"hidden_states": noise(1, 4, 8, 12), "encoder_hidden_states": noise(1, TOKENS, 16),
                   "timestep": torch.tensor([0.5])}


def qwen_image() -> Denoiser:
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8))
    return model, {"hidden_states": noise(1, 24, 16), "encoder_hidden_states": noise(1, TOKENS, 16),
                   "encoder_hidden_states_mask": torch.ones(1, TOKENS, dtype=torch.bool),
                   "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 6)]]}


def cogview4() -> Denoiser:
    model = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16, sample_size=8,
        rope_axes_dim=(16, 16))
    size = torch.tensor([[16.0, 24.0]])
    return model, {"hidden_states": noise(1, 4, 8, 12), "encoder_hidden_states": noise(1, TOKENS, 16),
                   "timestep": torch.tensor([500]), "original_size": size, "target_size": size,
                   "crop_coords": torch.zeros(1, 2)}


def positions(rows: int, columns: int) -> torch.Tensor:
    """Flux's image ids: (0, row, column) of each packed position."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros(rows, columns), *grid], dim=-1).reshape(-1, 3)


MAKERS: dict[str, Callable[[], Denoiser]] = {
    "sana": sana, "hunyuan": hunyuan, "wan": wan, "chroma": chroma, "aura_flow": aura_flow, "qwen_image": qwen_image,
    "cogview4": cogview4}


def make(name: str) -> Denoiser:
    """A denoiser by name, with random weights from a fixed seed, none of them zero."""
    torch.manual_seed(0)
    model, arguments = MAKERS[name]()
    fill_zero_weights(model)
    return model.eval(), arguments
