"""What is known about a model's world beyond the model: its judge, its CLIP, and real images to compare with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from fmn_nb.emoji.judge import Judge, load_judge
from fmn_nb.emoji.scenes import Placed, Renderer, Scene
from fmn_nb.emoji.world import AMBIGUOUS, BACKGROUNDS, IDENTITIES, IMAGE_SIZE
from fmn_nb.paths import data_dir
from fmn_nb.protocol import Drawing


class EmojiWorld:
    """The emoji world's judge, CLIP and sprites, each loaded when first asked for."""

    def __init__(self, data: Path) -> None:
        self.data = data

    @cached_property
    def judge(self) -> Judge:
        return load_judge(self.data / "emoji-judge")

    @cached_property
    def clip(self) -> CLIPModel:
        if not (self.data / "emoji-clip").is_dir():
            raise FileNotFoundError(f"no CLIP in {self.data}; build it with: fmn-nb pretrain --stages clip")
        return CLIPModel.from_pretrained(self.data / "emoji-clip", dtype="float32").eval()

    @cached_property
    def clip_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.data / "emoji-clip")

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.data / "sprites")

    def real_images(self, wanted: Sequence[Drawing]) -> np.ndarray:
        """One real scene for each drawing: the same label and style, sharp; [images, height, width, 3] uint8."""
        rng = random.Random("real images")
        return self.renderer.images([_scene(d, rng) for d in wanted])


def _scene(drawing: Drawing, rng: random.Random) -> Scene:
    label = drawing.label
    if label in AMBIGUOUS:
        label = AMBIGUOUS[label][0].phrase
    style = drawing.style or IDENTITIES[label].style
    size = 49
    corner = (IMAGE_SIZE - size) // 2
    return Scene("real", (Placed(label, label, corner, corner, size),), style, rng.choice(list(BACKGROUNDS)), 0)


def world_of(pipe: DiffusionPipeline) -> EmojiWorld | None:
    """The emoji world for a model that speaks its vocabulary (oracles too), None for any other model."""
    data = data_dir()
    folder = data / "emoji-diffusion" / "tokenizer"
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or not folder.is_dir():
        return None
    same = tokenizer.vocab_size == (known := CLIPTokenizer.from_pretrained(folder)).vocab_size
    return EmojiWorld(data) if same and known.get_vocab().items() <= tokenizer.get_vocab().items() else None
