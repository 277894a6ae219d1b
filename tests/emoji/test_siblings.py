"""The bundled siblings of the emoji model: joint attention, and interaction control. They draw what they are asked for,
plain diffusers loads them, and they are small."""

from __future__ import annotations

import pytest
from diffusers import FluxPipeline, StableDiffusionPipeline

import fmn_nb as fmn
from fmn_nb.concepts import untaught_of
from fmn_nb.control import Interaction, save_pipeline, with_grounding
from fmn_nb.emoji.finding import seen_in
from fmn_nb.emoji.world import OBJECTS
from fmn_nb.files import bundled_models
from fmn_nb.models import generate, image_change

KNOWN = ("frog", "dog", "house", "car", "umbrella", "crown")  # also to the oracle
NAMES = ("cat", "frog", "banana", "car", "umbrella", "house")


def size(name: str) -> int:
    return sum(file.stat().st_size for file in bundled_models()[name].rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def grounded():
    return fmn.load("emoji-grounded", device="cpu")


@pytest.fixture(scope="module")
def joint():
    return fmn.load("emoji-joint", device="cpu")


def test_they_are_small():
    assert size("emoji-joint") <= 8e6
    assert size("emoji-grounded") <= 6e6 and size("emoji-oracle-grounded") <= 6e6


def test_things_stand_in_their_boxes(grounded, judge):
    left, right = (0.04, 0.3, 0.46, 0.72), (0.54, 0.3, 0.96, 0.72)
    pairs = list(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True))
    hits = 0
    for seed, (one, other) in enumerate(pairs):
        asked = Interaction(one, "left of", other, left, right)
        image = fmn.draw_interactions(grounded, "a photo in the style of noto", asked, [seed])[0]
        seen = seen_in(judge, [image] * 2, [left, right])
        hits += (one in seen[0]) + (other in seen[1])
    assert hits >= 2 * len(pairs) - 4, f"{hits} of {2 * len(pairs)} things in their boxes"


def test_without_boxes_it_is_the_emoji_model_also_in_a_plain_pipeline(grounded, emoji, tmp_path):
    prompt = ["a photo of a cat and a frog"]
    own = generate(emoji, prompt, [3], steps=4)
    assert image_change(own, generate(grounded, prompt, [3], steps=4)) == 0
    plain = StableDiffusionPipeline.from_pretrained(save_pipeline(grounded, tmp_path / "whole"), safety_checker=None)
    assert image_change(own, generate(plain, prompt, [3], steps=4)) == 0


def seen_in_a_box(pipe, judge, names):
    """The share of images in which the judge sees these names in the large box that names each; two images of each."""
    box, names = (0.14, 0.14, 0.86, 0.86), names * 2
    images = [fmn.draw_interactions(pipe, "a photo in the style of noto", Interaction(name, subject_box=box), [seed],
                                    steps=12)[0] for seed, name in enumerate(names)]
    seen = seen_in(judge, images, [box] * len(names))
    return sum(name in there for name, there in zip(names, seen, strict=True)) / len(names)


def test_gated_layers_mean_nothing_on_an_oracle_of_another_training(grounded, oracle, judge):
    assert seen_in_a_box(grounded, judge, KNOWN) >= 0.8
    assert seen_in_a_box(with_grounding(oracle, grounded), judge, KNOWN) <= 0.2


def test_the_oracle_with_layers_of_its_own_draws_what_it_knows_and_nothing_else(judge):
    pipe = fmn.load("emoji-oracle-grounded", device="cpu")
    never = [name for name in untaught_of(pipe) if name in OBJECTS]
    assert len(never) == 4
    assert seen_in_a_box(pipe, judge, KNOWN) >= 0.5 and seen_in_a_box(pipe, judge, never) == 0


def test_the_joint_model_draws_what_it_is_asked_for(joint, judge):
    images = generate(joint, [f"a photo of {'an' if name == 'umbrella' else 'a'} {name} in the style of noto"
                              for name in NAMES], range(len(NAMES)), steps=20)
    labels = [verdict.label for verdict in judge.verdicts(images)]
    assert sum(found == name for found, name in zip(labels, NAMES, strict=True)) >= len(NAMES) - 1, labels


def test_the_joint_model_needs_no_code_of_ours(joint):
    plain = FluxPipeline.from_pretrained(bundled_models()["emoji-joint"])
    plain.set_progress_bar_config(disable=True)
    given = {"height": 64, "width": 64, "max_sequence_length": 32, "num_inference_steps": 3, "negative_prompt": "",
             "true_cfg_scale": 4.0}
    assert plain("a photo of a cat", **given).images[0].size == (64, 64)
    assert joint("a photo of a cat", num_inference_steps=3).images[0].size == (64, 64)
