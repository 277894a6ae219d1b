"""A run's patch is used again where it fits, and large models get settings of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from quick import QUICK, quick
from tiny import tiny_sd

from fmn_nb.concepts.concept import Concept
from fmn_nb.forgetting import reuse as forgetting_reuse
from fmn_nb.forgetting.reuse import patch_for, suited
from fmn_nb.forgetting.settings import FACTS, PRESETS, settings_for


@pytest.fixture
def made(monkeypatch) -> list:
    """The calls of `forget`, each answered by a quick fine-tune."""
    calls = []

    def note(pipe, concept, **options):
        calls.append((concept.name, options))
        return quick(pipe, concept, **options)

    monkeypatch.setattr(forgetting_reuse, "forget", note)
    return calls


def test_the_folders_patch_is_used_where_it_is_the_one_that_is_wanted(made, tmp_path: Path) -> None:
    pipe = tiny_sd()
    assert patch_for(pipe, Concept("cat"), tmp_path, "balanced", 0) and len(made) == 1, "there is none yet"
    quick(pipe, "cat", preset="balanced", seed=0).save(tmp_path / "patch")
    found = patch_for(pipe, Concept("cat"), tmp_path, "balanced", 0)
    assert found.info["forgetting"]["steps"] == QUICK["steps"] and len(made) == 1
    for other in ((pipe, Concept("dog"), "balanced", 0), (pipe, Concept("cat"), "paper", 0),
                  (pipe, Concept("cat"), "balanced", 1), (tiny_sd(seed=1), Concept("cat"), "balanced", 0)):
        before = len(made)
        one_pipe, concept, preset, seed = other
        patch_for(one_pipe, concept, tmp_path, preset, seed)
        assert len(made) == before + 1, other
    quick(pipe, "cat", preset="balanced", seed=0, towards="dog").save(tmp_path / "patch")
    patch_for(pipe, Concept("cat"), tmp_path, "balanced", 0)
    with quick(pipe, "frog").applied(pipe):
        quick(pipe, "cat", preset="balanced", seed=0).save(tmp_path / "patch")
    before = len(made)
    patch_for(pipe, Concept("cat"), tmp_path, "balanced", 0)
    assert len(made) == before + 1, "a correction, and a patch on top of another one, are others"


def test_a_large_model_gets_settings_that_suit_it() -> None:
    with torch.device("meta"):
        large = UNet2DConditionModel(cross_attention_dim=768)
    for preset, named in PRESETS.items():
        found = settings_for(preset, suited(SimpleNamespace(unet=large), preset))
        if FACTS[found.method].trains:  # a closed form has neither steps nor a graph
            assert found.gradient_checkpointing and found.learning_rate <= 1e-4 and found.train != "denoiser"
        assert suited(tiny_sd(), preset) == {} and named.gradient_checkpointing is False
