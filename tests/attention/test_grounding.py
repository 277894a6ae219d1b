"""Scores of attention maps against masks, by hand and on the emoji world's scenes."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fmn_nb.attention.grounding import SCORES, attention_on_images, best_iou, ground, ground_images, resized, summarise
from fmn_nb.attention.recorder import record_attention
from fmn_nb.concepts.tokens import PhraseNotFoundError
from fmn_nb.emoji.organism import held_out_scenes


def corner(height: int = 4, width: int = 6) -> np.ndarray:
    """A mask of the upper left quarter."""
    mask = np.zeros((height, width), dtype=bool)
    mask[: height // 2, : width // 2] = True
    return mask


def test_a_perfect_a_wrong_and_a_flat_map():
    mask = corner()
    perfect = ground(mask.astype(float), mask)
    assert (perfect.pointing, perfect.iou, perfect.inside, perfect.area) == (True, 1.0, 1.0, 0.25)
    wrong = ground(1.0 - mask, mask)
    assert not wrong.pointing and wrong.inside == 0 and wrong.iou == 0.25  # everything, at the lowest threshold
    flat = ground(np.full(mask.shape, 0.1), mask)
    assert flat.iou == 0.25 and flat.inside == pytest.approx(0.25)


def test_scores_by_hand():
    values = np.array([[0.4, 0.3], [0.2, 0.1]])
    mask = np.array([[True, False], [True, False]])
    score = ground(values, mask)
    assert score.pointing and score.inside == pytest.approx(0.6)
    assert score.iou == pytest.approx(2 / 3) and score.threshold == pytest.approx(0.2)  # three pixels, two of them in


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, mask = rng.integers(0, 5, (6, 7)) / 4, rng.random((6, 7)) > 0.5
        every = {t: (mask & (values >= t)).sum() / (mask | (values >= t)).sum() for t in np.unique(values)}
        iou, threshold = best_iou(values, mask)
        assert iou == pytest.approx(max(every.values())) and every[threshold] == pytest.approx(iou)


def test_maps_are_resized_to_the_mask():
    coarse = np.array([[1.0, 0.0], [0.0, 0.0]])
    score = ground(coarse, corner(32, 48))
    assert score.pointing and score.inside > 0.6 and score.iou > 0.6
    assert resized(coarse, (32, 48)).shape == (32, 48)


@pytest.mark.parametrize("values, mask", [
    (np.ones((2, 2)), np.ones((4, 4))), (np.ones((2, 2)), np.zeros((4, 4))), (np.zeros((2, 2)), corner()),
    (-np.ones((2, 2)), corner()), (np.full((2, 2), np.nan), corner()), (np.ones((2, 2, 2)), corner())])
def test_impossible_inputs_are_refused(values, mask):
    with pytest.raises(ValueError):
        ground(values, mask)


def test_the_summary_has_intervals_and_what_a_flat_map_scores():
    scores = pd.DataFrame({"pointing": [True, True, False, True], "iou": [0.5, 0.6, 0.2, 0.7],
                           "inside": [0.4, 0.4, 0.4, 0.4], "area": [0.1, 0.2, 0.3, 0.2]})
    table = summarise(scores)
    assert list(table.index) == list(SCORES.values())
    assert table.loc["pointing game", "mean"] == 0.75 and (table["count"] == 4).all()
    assert table["flat_map"].tolist() == pytest.approx([0.2] * 3)
    assert (table["low"] <= table["mean"] + 1e-9).all() and (table["mean"] <= table["high"] + 1e-9).all()
    assert table.loc["attention inside", ["low", "high"]].tolist() == pytest.approx([0.4, 0.4])
    assert table.equals(summarise(scores))
    with pytest.raises(ValueError, match="no scores"):
        summarise(scores.iloc[:0])


def test_maps_of_one_image_are_drawn_together():
    """Ten rows of two images are two outcomes, not ten: the interval reaches from the one to the other."""
    rows = {"pointing": [True] * 10, "iou": [0.2] * 5 + [0.8] * 5, "inside": [0.5] * 10, "area": [0.1] * 10}
    apart, together = summarise(pd.DataFrame(rows)), summarise(pd.DataFrame(rows | {"image": [0] * 5 + [1] * 5}))
    iou = SCORES["iou"]
    assert together.loc[iou, "mean"] == apart.loc[iou, "mean"] == pytest.approx(0.5)
    assert together.loc[iou, ["low", "high"]].tolist() == pytest.approx([0.2, 0.8])
    assert 0.25 < apart.loc[iou, "low"] and apart.loc[iou, "high"] < 0.75


def test_scenes_come_with_masks_of_their_words():
    images, prompts, masks = held_out_scenes(3, seed=1)
    assert len(images) == len(prompts) == len(masks) == 3
    for image, prompt, known in zip(images, prompts, masks, strict=True):
        assert len(known) == 2 and all(word in prompt for word in known)
        first, second = known.values()
        assert first.shape == image.size[::-1] and first.any() and not (first & second).any()
        assert first.nonzero()[1].mean() < second.nonzero()[1].mean()  # left and right, as in the prompt


def test_recording_on_given_images_is_the_denoiser_s_attention_on_noised_latents(sd):
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("teal", "white")]
    prompts = ["a photo of a cat", "a frog"]
    attention = attention_on_images(sd, pictures, prompts, timesteps=(100, 600), seed=3)
    assert attention.timesteps == [100, 600] and len(attention.images) == 2 and attention.branches == ["cond"]
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in pictures])
    with torch.no_grad():
        latents = sd.vae.encode(pixels).latent_dist.mean * sd.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
        text, _ = sd.encode_prompt(prompts, "cpu", 1, False)
        with record_attention(sd.unet) as expected:
            sd.unet(sd.scheduler.add_noise(latents, noise, torch.tensor([600])), 600, text)
    column = attention.text(1).find("frog").columns
    np.testing.assert_allclose(attention.select("frog", image=1, step=1), expected.select(columns=column, image=1),
                               atol=1e-6)


def test_own_masks_are_scored_in_batches_of_any_size(sd):
    pictures = [Image.new("RGB", (24, 16), colour) for colour in ("teal", "white", "navy")]
    prompts = ["a photo of a cat", "a frog and a dog", "a cat"]
    masks = [{"cat": corner(16, 24)}, {"frog": corner(16, 24), "dog": ~corner(16, 24)}, {"cat": corner(16, 24)}]
    table = ground_images(sd, pictures, prompts, masks, batch=2, timesteps=[500])
    assert table[["image", "phrase"]].to_numpy().tolist() == [[0, "cat"], [1, "frog"], [1, "dog"], [2, "cat"]]
    assert table["iou"].between(0.2, 1).all() and table["inside"].between(0.1, 0.9).all()
    assert summarise(table).loc["pointing game", "count"] == 4
    for wrong, message in [((pictures, prompts, masks[:2]), "as many of each"),
                           ((pictures, prompts, [{"cat": corner()}, *masks[1:]]), "a mask of")]:
        with pytest.raises(ValueError, match=message):
            ground_images(sd, *wrong)
    with pytest.raises(PhraseNotFoundError):
        ground_images(sd, pictures, prompts, [{"penguin": corner(16, 24)}, *masks[1:]])
    with pytest.raises(ValueError, match="different ones from 0 to 999"):
        attention_on_images(sd, pictures, prompts, timesteps=[1000])


@pytest.mark.parametrize("name", ["cat", "twemoji"])
def test_held_out_scenes_can_all_hold_one_concept(name):
    images, prompts, masks = held_out_scenes(3, seed=1, holding=name)
    assert len(images) == len(masks) == 3 and all(name in prompt for prompt in prompts)
    assert name == "twemoji" or all(name in known for known in masks)
    assert prompts[0] == held_out_scenes(1, seed=1, holding=name)[1][0]


def test_scenes_of_an_unknown_concept_are_refused():
    with pytest.raises(ValueError, match="no 'unicorn'; choose one of cat"):
        held_out_scenes(1, holding="unicorn")


def test_scenes_that_hold_what_they_are_without_are_refused():
    for holding, without in (("cat", ["cat"]), ("noto", ["frog", "noto"])):
        with pytest.raises(ValueError, match=f"both holds '{holding}' and is without it"):
            held_out_scenes(1, holding=holding, without=without)


def test_pictures_in_any_mode_are_looked_at_as_on_white(sd):
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    grey = Image.new("L", (16, 16), 90)
    found = attention_on_images(sd, [clear, grey], ["a cat", "a frog"], timesteps=[500])
    plain = attention_on_images(sd, [Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), (90,) * 3)],
                                ["a cat", "a frog"], timesteps=[500])
    for image, phrase in enumerate(("cat", "frog")):
        np.testing.assert_array_equal(found.select(phrase, image=image), plain.select(phrase, image=image))


def test_a_mask_lies_on_the_picture_as_it_stands_upright(sd):
    held, file = Image.Exif(), io.BytesIO()
    held[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (24, 16), "teal").save(file, "PNG", exif=held)
    turned, upright = Image.open(file), corner(24, 16)
    scores, plain = (ground_images(sd, [picture], ["a cat"], [{"cat": upright}], timesteps=[500])
                     for picture in (turned, Image.new("RGB", (16, 24), "teal")))
    pd.testing.assert_frame_equal(scores, plain)
    assert ground_images(sd, [turned], ["a cat"], [{}]).empty, "nothing to look for"


def test_sorts_of_scenes_are_pairs_and_single_things():
    with pytest.raises(ValueError, match="sort is 'pair' or 'single', not 'identity'"):
        held_out_scenes(1, sort="identity", holding="frog")
