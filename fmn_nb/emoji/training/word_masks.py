"""A loss that draws the attention of words to the things they name, with the masks that the scenes know.

A text encoder and a U-Net that learn together from the error of the noise alone can end in a model that draws well, and
whose words attend everywhere: every column of the text then says what stands left and what stands right. A model for
the study of attention needs words that attend to their things. Wang et al. (TokenCompose, arXiv 2312.03626) train a
finished model with such masks, which a detector draws for them; here they are in the recipe, and known exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from fmn_nb.emoji.scenes import Renderer, Scene
from fmn_nb.emoji.world import IMAGE_SIZE, LATENT_SIZE

THINGS = 2  # at most, in a scene


@dataclass(frozen=True)
class WordMasks:
    """Where the words of scenes stand in their captions, and what they name in the images.

    Attributes:
        columns: [scenes, captions, things, columns] bool, the columns of each thing's word.
        masks: [scenes, things, 16, 16] bool, the latents of which a thing covers at least half. Both are False where a
            scene has fewer things.
    """

    columns: Tensor
    masks: Tensor

    def divergence(self, attention: Mapping[str, Tensor], scenes: Tensor, captions: Tensor, told: Tensor) -> Tensor:
        """How far words' attention is from lying evenly on their things: the mean over layers, words and images of the
        Kullback-Leibler divergence in nats, sum of t log(t / m) over pixels, where m is the share of a word's attention
        at a pixel, and t the pixel's share of the thing.

        Args:
            attention: layer -> probabilities [batch, heads, pixels, columns], as of `attention_with_graph`.
            scenes, captions: which scene and caption each image of the batch has, [batch].
            told: [batch] bool, whether the image comes with its caption at all.
        """
        columns, masks = self.columns[scenes, captions].float(), self.masks[scenes].float()
        there = columns.any(-1) & masks.flatten(2).any(-1) & told[:, None]  # [batch, things]
        parts = [torch.zeros(())]
        for probabilities in attention.values():
            target = F.adaptive_avg_pool2d(masks, isqrt(probabilities.shape[2])).flatten(2)[there]  # [words, pixels]
            maps = torch.einsum("bpc,btc->btp", probabilities.mean(1), columns)[there].clamp(min=1e-9)
            parts.append(F.kl_div((maps / maps.sum(-1, keepdim=True)).log(), target / target.sum(-1, keepdim=True),
                                  reduction="sum") / max(1, len(target)))
        return torch.stack(parts).sum() / len(attention)


def find_words(tokenizer: CLIPTokenizer, scenes: Sequence[Scene], tokens: Tensor, renderer: Renderer) -> WordMasks:
    """Find the scenes' words in the token ids of their captions [scenes, captions, columns].

    Raises ValueError for a caption that lacks a word of its scene.
    """
    columns = torch.zeros(*tokens.shape[:2], THINGS, tokens.shape[2], dtype=torch.bool)
    masks = torch.zeros(len(scenes), THINGS, LATENT_SIZE, LATENT_SIZE, dtype=torch.bool)
    known = sorted({word for scene in scenes for word in scene.words})
    # padded as everywhere: how a tokenizer padded last is saved with it, and an oracle's must equal the emoji model's
    padded = tokenizer(known, padding="max_length", max_length=tokens.shape[2]).input_ids
    ids = {word: row[1:row.index(tokenizer.eos_token_id)] for word, row in zip(known, padded, strict=True)}
    for number, scene in enumerate(scenes):
        masks[number, :len(scene.items)] = torch.from_numpy(_on_latents(renderer.masks(scene)))
        for thing, word in enumerate(scene.words):
            for caption, row in enumerate(tokens[number].tolist()):
                start, length = _start(row, ids[word]), len(ids[word])
                if start is None:
                    raise ValueError(f"caption {caption} of scene {number} doesn't say {word!r}")
                columns[number, caption, thing, start:start + length] = True
    return WordMasks(columns, masks)


def _on_latents(masks: np.ndarray) -> np.ndarray:
    """Masks [things, 64, 64] at the latents' resolution."""
    factor = IMAGE_SIZE // LATENT_SIZE
    return masks.reshape(len(masks), LATENT_SIZE, factor, LATENT_SIZE, factor).mean((2, 4)) >= 0.5


def _start(row: Sequence[int], ids: Sequence[int]) -> int | None:
    """Where `ids` begin in a row for the first time."""
    return next((start for start in range(len(row) - len(ids) + 1) if row[start:start + len(ids)] == ids), None)
