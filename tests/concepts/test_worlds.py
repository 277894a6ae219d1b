"""Whose model is it: a copy, an oracle and a second load are of the emoji world, and a stranger is of none."""

from __future__ import annotations

import shutil

import pytest
from tiny import tiny_sd

import fmn_nb as fmn
from fmn_nb.concepts import Concept, World, vocabulary_of, world_of
from fmn_nb.emoji import EmojiWorld
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import Session
from fmn_nb.evaluation.checkpoints import CheckpointWorld
from fmn_nb.forgetting.prompts import forget_prompts, retain_prompts

CAT = Concept("cat")


def copied(emoji, folder):
    shutil.copytree(fmn.bundled()["emoji"], folder)


def saved_again(emoji, folder):
    emoji.save_pretrained(folder)


@pytest.mark.parametrize("make", [copied, saved_again])
def test_a_copy_elsewhere_is_forgotten_and_evaluated_as_the_original(emoji, tmp_path, make, recwarn):
    make(emoji, tmp_path / "elsewhere")
    other = fmn.load(tmp_path / "elsewhere", device="cpu")
    assert not [warning for warning in recwarn if "_world" in str(warning.message)]
    assert isinstance(world_of(other), EmojiWorld) and vocabulary_of(tmp_path / "elsewhere") == VOCABULARY
    assert forget_prompts(other, CAT, "varied") == forget_prompts(emoji, CAT, "varied")
    assert retain_prompts(other, [CAT], None) == retain_prompts(emoji, [CAT], None)
    assert "a photo of a cat in the style of noto" in forget_prompts(other, CAT, "varied")
    asked, original = (Session.of(pipe).fresh_drawings(CAT, 6, 0) for pipe in (other, emoji))
    assert asked == original


@pytest.mark.parametrize("name", ["emoji-oracle", "emoji-joint", "emoji-grounded"])
def test_a_sibling_is_forgotten_with_the_worlds_own_prompts(emoji, name):
    sibling, frog = fmn.load(name, device="cpu"), Concept("frog")
    assert forget_prompts(sibling, frog, "varied") == forget_prompts(emoji, frog, "varied")
    assert retain_prompts(sibling, [frog], None) == retain_prompts(emoji, [frog], None)


def test_a_world_is_loaded_once(emoji):
    assert world_of(emoji) is world_of(fmn.load("emoji", device="cpu"))
    assert world_of(emoji).judge is world_of(emoji).judge_for(CAT)


def test_a_stranger_is_of_no_world(tmp_path):
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path)
    assert world_of(pipe) is None and vocabulary_of(tmp_path) is None and vocabulary_of(tmp_path / "nowhere") is None
    pipe.unet.register_to_config(_world="another")
    assert world_of(pipe) is None, "a world that isn't in the table is none that can be asked"
    assert forget_prompts(pipe, CAT, "varied") == CAT.prompts(5)


def test_both_worlds_answer_what_the_core_asks(emoji):
    for world in (world_of(emoji), CheckpointWorld()):
        for name in vars(World):
            if not name.startswith("_"):
                assert hasattr(type(world), name), name
        assert world.forget_prompts(CAT) and world.retain_prompts() and world.vocabulary.objects
