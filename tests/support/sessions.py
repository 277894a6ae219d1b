"""Sessions of models that belong to no world, asked for the emoji world's names; and few drawings in place of all."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from fmn_nb.concepts.world import JudgeLike
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation.checkpoints import CheckpointWorld
from fmn_nb.evaluation.protocol import drawings
from fmn_nb.evaluation.session import Sampling, Session


def session(pipe: DiffusionPipeline, judge: JudgeLike | None = None, **sampling: object) -> Session:
    """A session of a pipeline in miniature: one sampling step unless said otherwise."""
    world = CheckpointWorld()
    world.vocabulary = VOCABULARY
    return Session(pipe, world, judge, Sampling(**{"steps": 1, **sampling}))


def few_drawings(concept, vocabulary, seed=0, size="quick"):
    """Two of the forget set's drawings and four of the retain set's, in place of `drawings`."""
    wanted = drawings(concept, vocabulary, seed, size)
    retain = [d for d in wanted if d.role == "retain"]
    return wanted[:2] + retain[:2] + retain[-2:]
