"""A fine-tune of two steps on a model in miniature, in about a second."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from fmn_nb.concepts.concept import Concept
from fmn_nb.forgetting.finetune import forget
from fmn_nb.patches.patch import Patch

OTHERS = ["a photo of a dog", "a frog", "a penguin and a fish"]
QUICK = {"steps": 2, "reference_count": 2, "reference_steps": 2, "retain_count": 2, "retain_prompts": OTHERS,
         "rounds": 1, "round_steps": 1, "probe_steps": 1}
#: Numbers in place of the tuned preset's, so that tuning it on the emoji model changes no test of the machinery.
UNTUNED = {"positions": ("words", "first_eot", "padding"), "norm": "mean_square", "learning_rate": 1e-2,
           "schedule": "constant", "retain_weight": 10.0, "retain_batch": 8, "anchor_weight": 0.0,
           "anchor_guidance": 0.0, "towards_weight": 10.0}


def quick(pipe: DiffusionPipeline, concept: Concept | str | list = "cat", **overrides: Any) -> Patch:
    """`forget` with few steps, images and prompts, unless told otherwise."""
    untuned = {} if overrides.get("preset") else UNTUNED
    return forget(pipe, concept, **{**QUICK, **untuned, **overrides})
