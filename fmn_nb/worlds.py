"""What is known about a model's world beyond the model: names, a judge, a CLIP, and real images to compare with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from fmn_nb.concepts import Concept
from fmn_nb.emoji.judge import Judge, load_judge
from fmn_nb.emoji.scenes import Placed, Renderer, Scene
from fmn_nb.emoji.second_judge import SecondJudge, load_second_judge
from fmn_nb.emoji.world import AMBIGUOUS, BACKGROUNDS, IDENTITIES, IMAGE_SIZE, OBJECTS, STYLES
from fmn_nb.evaluation_clip import Clip
from fmn_nb.image_quality import Features, judge_features
from fmn_nb.models import without_bars
from fmn_nb.paths import data_dir
from fmn_nb.protocol import EMOJI, Drawing, draw, drawings


class NotThereError(FileNotFoundError):
    """What a figure needs isn't there; the text is the reason that stands under "skipped"."""


class EmojiWorld:
    """The emoji world's names, judges, CLIP and sprites, each loaded when first asked for."""

    vocabulary = EMOJI

    def __init__(self, data: Path) -> None:
        self.data = data

    @cached_property
    def judge(self) -> Judge:
        """The bundled judge; NotThereError where it has not been trained."""
        try:
            return load_judge(self.data / "emoji-judge")
        except FileNotFoundError as missing:
            raise NotThereError(str(missing)) from missing

    @cached_property
    def second_judge(self) -> SecondJudge:
        """A judge of another architecture, to check the first one's verdicts."""
        return load_second_judge(self.data / "emoji-second-judge")

    @cached_property
    def clip(self) -> CLIPModel:
        return self.scorer.model

    @cached_property
    def clip_tokenizer(self) -> CLIPTokenizer:
        with without_bars():
            return CLIPTokenizer.from_pretrained(self._clip_folder())

    @cached_property
    def scorer(self) -> Clip:
        """The bundled CLIP as a measure; NotThereError where it has not been trained."""
        return Clip.load(self._clip_folder())

    def _clip_folder(self) -> Path:
        if not (self.data / "emoji-clip" / "config.json").is_file():
            raise NotThereError("the bundled CLIP is not there; build it with: fmn-nb pretrain --stages clip")
        return self.data / "emoji-clip"

    @cached_property
    def features(self) -> Features:
        """What distances to real images are measured on."""
        return judge_features(self.judge)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.data / "sprites")

    def judge_for(self, concept: Concept) -> Judge:
        """The judge, which knows every concept of this world."""
        return self.judge

    def real_images(self, wanted: Sequence[Drawing]) -> np.ndarray:
        """One real scene for each drawing: the same label and style, sharp; [images, height, width, 3] uint8."""
        rng = random.Random("real images")
        return self.renderer.images([_scene(d, rng) for d in wanted])

    def real_set(self, concept: Concept) -> np.ndarray:
        """Real scenes of everything but the concept, each name and style several times, for distances to them."""
        return self.real_images([d for d in drawings(concept, size="full") if d.role == "retain"])

    def examples(self, name: str, kind: str) -> np.ndarray:
        """Real scenes of one name: an object in every style, a style on every object, a proper name's one drawing."""
        if kind == "style":
            return self.real_images([draw(label, name, "retain", kind) for label in OBJECTS])
        if kind == "identity":
            return self.real_images([draw(name, None, "retain", kind)])
        return self.real_images([draw(name, style, "retain", kind) for style in STYLES])


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
