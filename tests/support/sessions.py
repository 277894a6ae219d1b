"""Sessions of models that belong to no world, asked for the emoji world's names."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from fmn_nb.concepts.world import JudgeLike
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation.checkpoints import CheckpointWorld
from fmn_nb.evaluation.session import Sampling, Session


def session(pipe: DiffusionPipeline, judge: JudgeLike | None = None, **sampling: object) -> Session:
    """A session of a pipeline in miniature: one sampling step unless said otherwise."""
    world = CheckpointWorld()
    world.vocabulary = VOCABULARY
    return Session(pipe, world, judge, Sampling(**{"steps": 1, **sampling}))
