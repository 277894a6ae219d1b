"""Any CLIPModel as a measure: features of images and texts, the CLIP score, and a judge without training (zero-shot).

Radford et al., arXiv 2103.00020 (zero-shot classification); Hessel et al., arXiv 2104.08718 (CLIP score).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from fmn_nb.concepts import NOTHING, Concept, NotThereError, Verdict, Vocabulary, World, with_article
from fmn_nb.evaluation.quality import Features, Pictures
from fmn_nb.models import ModelLoadError, digest_of, without_bars

AT_ONCE = 32  # images or texts through CLIP
SEEN_FROM = 0.25  # the least share of the judge's belief for a label that counts as seen
#: texts for an image that shows none of the labels
NOTHINGS = ("random noise", "an abstract texture", "a blurry image of nothing", "a plain background")


class Clip:
    """A CLIPModel with its tokenizer and image processor.

    Args:
        name: what it is called in results, without its folder.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, processor: Any, name: str) -> None:
        self.model, self.tokenizer, self.processor, self.name = model.eval(), tokenizer, processor, name

    @classmethod
    def load(cls, source: str | Path) -> Clip:
        """A CLIPModel from a folder (or a hub id) with tokenizer and preprocessor; only safetensors weights.

        Raises:
            ModelLoadError: there is none, or it can't be read.
        """
        try:
            with without_bars():
                model = CLIPModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
                return cls(model, AutoTokenizer.from_pretrained(source), AutoImageProcessor.from_pretrained(source),
                           Path(str(source)).name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelLoadError(
                f"no CLIPModel could be read from '{source}' (a folder with config.json, model.safetensors, tokenizer "
                f"and preprocessor_config.json): {error}") from error

    @torch.no_grad()
    def images(self, images: Pictures) -> Tensor:
        """Projected image features of length 1, [images, dimensions]."""
        pictures = [Image.fromarray(i) if isinstance(i, np.ndarray) else i.convert("RGB") for i in images]
        batches = (self.processor(images=pictures[start:start + AT_ONCE], return_tensors="pt")["pixel_values"]
                   for start in range(0, len(pictures), AT_ONCE))
        return torch.cat([F.normalize(self.pixels_to_features(pixels), dim=-1) for pixels in batches])

    def pixels_to_features(self, pixels: Tensor) -> Tensor:
        """Projected features of pixels that the processor has prepared."""
        pixels = pixels.to(self.model.device)
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Projected text features of length 1, [texts, dimensions]; longer texts are cut."""
        parts = []
        for start in range(0, len(texts), AT_ONCE):
            read = self.tokenizer(list(texts[start:start + AT_ONCE]), padding="max_length", truncation=True,
                                  max_length=self.model.config.text_config.max_position_embeddings,
                                  return_tensors="pt")
            pooled = self.model.text_model(input_ids=read["input_ids"].to(self.model.device)).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled), dim=-1))
        return torch.cat(parts)

    def score(self, images: Pictures, prompts: Sequence[str]) -> float:
        """The CLIP score: mean cosine of each image with its prompt, times 100, negative ones counted as 0.

        Raises:
            ValueError: not one prompt for each image.
        """
        if len(images) != len(prompts) or not len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts; give one for each")
        return float(100 * (self.images(images) * self.texts(prompts)).sum(-1).clamp(min=0).mean())

    @cached_property
    def features(self) -> Features:
        """Its image features, for distances."""
        size = self.model.config.vision_config.image_size
        return Features(f"{self.name} {digest_of(self.model.vision_model)[:8]}", _ClipFeatures(self), size)


class _ClipFeatures(nn.Module):
    """Projected features of uint8 images [images, 3, size, size], scaled as the processor says."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self._clip = [clip]  # in a list: no submodule of torchmetrics' metric, which would copy it
        self.num_features = clip.model.config.projection_dim

    def forward(self, images: Tensor) -> Tensor:
        clip = self._clip[0]
        mean, std = (torch.tensor(getattr(clip.processor, name))[:, None, None] for name in ("image_mean", "image_std"))
        return clip.pixels_to_features((images.float() / 255 - mean) / std).cpu()


class ClipJudge:
    """A zero-shot judge: an image shows what the text that CLIP finds most similar says.

    Labels and styles are judged separately, each among the vocabulary's names and the concept's own. "nothing" wins
    if texts such as "random noise" fit best. It is weaker than a trained classifier, so first read its figures before
    forgetting: they are the most that can be kept.
    """

    def __init__(self, clip: Clip, concept: Concept, vocabulary: Vocabulary) -> None:
        self.clip = clip
        others = vocabulary.others(concept)
        self.labels, self.styles, names = [*others.objects], [*others.styles], {*others.names}
        if concept.kind == "identity":
            self.labels += others.names
            names.add(concept.name)
        (self.styles if concept.kind == "style" else self.labels).append(concept.name)
        self._label_texts = clip.texts([f"a photo of {name if name in names else with_article(name)}"
                                        for name in self.labels] + list(NOTHINGS))
        self._style_texts = clip.texts([f"an image in the style of {style}" for style in self.styles])

    @torch.no_grad()
    def verdicts(self, images: Pictures) -> list[Verdict]:
        """What each image shows; `seen` are the labels with a quarter of the belief or more."""
        features, scale = self.clip.images(images), self.clip.model.logit_scale.exp()
        beliefs = (scale * features @ self._label_texts.T).softmax(-1).cpu()
        styles = (features @ self._style_texts.T).argmax(-1).cpu()
        names, verdicts = [*self.labels, *[NOTHING] * len(NOTHINGS)], []
        for belief, style in zip(beliefs, styles, strict=True):
            best = int(belief.argmax())
            seen = frozenset(name for name, share in zip(self.labels, belief, strict=False) if share >= SEEN_FROM)
            verdicts.append(Verdict(names[best], self.styles[int(style)], seen, float(belief[best])))
        return verdicts


SIMILAR_SHARE = 0.25  # of the concept's domain, the most similar ones


def similarities(world: World, concept: Concept) -> pd.Series:
    """How similar every other name of the concept's domain is to it, the most similar first: cosines in [-1, 1].

    They compare mean image features of real scenes if the world has them, otherwise text features; centred on the mean
    of all names, since raw CLIP features share one large common part.

    Raises:
        NotThereError: the world has no CLIP.
    """
    vocabulary = world.vocabulary
    others = vocabulary.others(concept).of(concept.kind)
    names = [vocabulary.target_label(concept), *(name for name in others if name != concept.name)]
    try:
        rows = torch.stack([world.scorer.images(world.examples(name, concept.kind)).mean(dim=0) for name in names])
    except NotThereError:
        if concept.kind == "style":
            rows = world.scorer.texts([f"in the style of {name}" for name in names])
        else:
            said = [with_article(name) for name in names] if concept.kind == "object" else names
            rows = world.scorer.texts([f"a photo of {name}" for name in said])
    rows = F.normalize(rows - rows.mean(dim=0), dim=-1)
    cosines = (rows[1:] @ rows[0]).tolist()
    return pd.Series(cosines, index=names[1:], name="similarity").sort_values(ascending=False, kind="stable")


def similar_names(likeness: pd.Series) -> list[str]:
    """The most similar names: a quarter of them, at least one."""
    return list(likeness.index[:max(1, math.ceil(SIMILAR_SHARE * len(likeness)))])
