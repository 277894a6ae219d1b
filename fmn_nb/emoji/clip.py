"""The emoji world's CLIP: an image encoder trained to match the pipeline's own text encoder, for the CLIP score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from fmn_nb.emoji.judge import to_pixels
from fmn_nb.emoji.training import Losses
from fmn_nb.emoji.world import IMAGE_SIZE

WIDTH = 128
PROJECTION = 64


def new_clip(text_encoder: CLIPTextModel) -> CLIPModel:
    """A CLIPModel whose text side is `text_encoder`, frozen; only the projections and the image side will learn."""
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
              "image_size": IMAGE_SIZE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text_encoder.config.to_dict(), vision_config=vision,
                                projection_dim=PROJECTION))
    clip.text_model.load_state_dict(text_encoder.state_dict())
    clip.text_model.requires_grad_(False)
    return clip


def clip_loss(clip: CLIPModel, images: np.ndarray, tokens: Tensor, batch: int):
    """The loss of one step: CLIP's symmetric cross-entropy (Radford et al., arXiv 2103.00020, section 2.3).

    `tokens` [images, captions, length]. Pairs of a batch with the same caption don't count as mismatches.
    """

    def loss(step: int, rng: torch.Generator) -> Losses:
        chosen = torch.randperm(len(images), generator=rng)[:batch]
        which = torch.randint(tokens.shape[1], (len(chosen),), generator=rng)
        captions = tokens[chosen, which].long()
        pixels = to_pixels(images[chosen.numpy()], IMAGE_SIZE)
        logits = similarity(clip, pixels, captions) * clip.logit_scale.exp()
        same = (captions[:, None] == captions[None]).all(-1) & ~torch.eye(len(chosen), dtype=torch.bool)
        logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(len(chosen))
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": value, "matched": (logits.argmax(1) == target).float().mean()}

    return loss


def similarity(clip: CLIPModel, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Cosines of every image with every caption, [images, captions]."""
    image = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    text = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)
    return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
