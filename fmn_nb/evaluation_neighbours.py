"""Which concepts are like the one to forget: measured by a CLIP, not chosen by hand."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.concepts import Concept, with_article
from fmn_nb.evaluation_checkpoints import CheckpointWorld
from fmn_nb.worlds import EmojiWorld

SIMILAR_SHARE = 0.25  # of the concept's domain, the most similar ones


def similarities(world: EmojiWorld | CheckpointWorld, concept: Concept) -> pd.Series:
    """How much every other name of the concept's domain is like it, the most similar first: cosines in [-1, 1].

    Of mean image features of real scenes where the world has them, else of text features; centred on the mean of all
    names, since raw CLIP features share one large common part.

    Raises:
        NotThereError: the world has no CLIP.
    """
    vocabulary = world.vocabulary
    others = vocabulary.others(concept).of(concept.kind)
    names = [vocabulary.target_label(concept), *(name for name in others if name != concept.name)]
    rows = _by_images(world, names, concept.kind) if isinstance(world, EmojiWorld) else _by_texts(world, names, concept)
    rows = F.normalize(rows - rows.mean(dim=0), dim=-1)
    cosines = (rows[1:] @ rows[0]).tolist()
    return pd.Series(cosines, index=names[1:], name="similarity").sort_values(ascending=False, kind="stable")


def similar_names(likeness: pd.Series, share: float = SIMILAR_SHARE) -> list[str]:
    """The most similar names: a quarter of them, at least one."""
    return list(likeness.index[:max(1, math.ceil(share * len(likeness)))])


def _by_images(world: EmojiWorld, names: list[str], kind: str) -> Tensor:
    return torch.stack([world.scorer.images(world.examples(name, kind)).mean(dim=0) for name in names])


def _by_texts(world: CheckpointWorld, names: list[str], concept: Concept) -> Tensor:
    said = {"object": lambda name: f"a photo of {with_article(name)}", "style": lambda name: f"in the style of {name}",
            "identity": lambda name: f"a photo of {name}"}[concept.kind]
    return world.scorer.texts([said(name) for name in names])
