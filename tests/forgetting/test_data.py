"""What a fine-tune learns from: concepts and their columns, reference images, retain prompts, readings, regions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick import quick
from snapshots import noise_images
from tiny import generate, tiny_sd, tiny_sdxl

from fmn_nb.concepts.concept import Concept
from fmn_nb.forgetting.data import Task, TrainingSet, _bank, forget_set, retain_set, towards_set
from fmn_nb.forgetting.prompts import likeness, neighbours_of, retain_prompts, stand_in_for, without
from fmn_nb.forgetting.settings import SettingsError, settings_for
from fmn_nb.models import ReferenceImageError, conditions, encode, load_masks, seeded
from fmn_nb.patches.learned_tokens import LearnedTokens


def test_each_of_several_concepts_has_its_own_columns_and_references() -> None:
    """One word, two words, and a token learned as three vectors, each with its own number of images."""
    pipe = tiny_sd()
    tokens = LearnedTokens("<toy>", (torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 0.02,))
    concepts = (Concept("cat"), Concept("birthday cake"), Concept("toy", phrase="<toy>"))
    images = {"cat": noise_images(1), "birthday cake": noise_images(2, seed=1), "toy": noise_images(3, seed=2)}
    settings = settings_for("balanced", {"anchor_weight": 0.0, "wording": "plain"})
    with tokens.loaded(pipe):
        data = forget_set(Task(pipe, concepts, settings, references=images))
        words = [pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(pipe.maybe_convert_prompt(t, pipe.tokenizer))
                                                      .input_ids) for t in data.texts]
    assert data.texts == ("a photo of a cat", "a photo of a birthday cake", "a photo of <toy>")
    marked = [[word for word, is_marked in zip(row, mask.tolist(), strict=False) if is_marked]
              for row, mask in zip(words, data.concept, strict=True)]
    assert marked == [["cat</w>"], ["birthday</w>", "cake</w>"], ["<toy>", "<toy>_1", "<toy>_2"]]
    owner = data.prompt_of[data.latent_of.argsort()]
    assert data.prompt_of.bincount().tolist() == [1, 2, 3] and owner.tolist() == [0, 1, 1, 2, 2, 2]
    torch.testing.assert_close(data.latents.mean[3:], encode(pipe, images["toy"]).mean)


def test_several_concepts_and_learned_tokens_at_once() -> None:
    pipe = tiny_sd()
    tokens = LearnedTokens("<toy>", (torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 0.02,))
    with tokens.loaded(pipe):
        patch = quick(pipe, [Concept("birthday cake"), Concept("toy", phrase="<toy>"), Concept("noto", kind="style")],
                      references={"birthday cake": noise_images(2)}, batch_size=3)
    assert [concept["name"] for concept in patch.info["concepts"]] == ["birthday cake", "toy", "noto"]
    assert patch.info["forgetting"]["losses"][0] > 0 and patch.info["forgetting"]["steps"] == 2


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_concept_correction_moves_the_word_towards_the_other_reading_and_past_it(guidance) -> None:
    """The word's prediction comes nearer to the frozen model's for the reading, or as far again beyond it."""
    from fmn_nb.models.denoising import predict

    pipe = tiny_sd()
    given = conditions(pipe, ["a photo of a cat", "a photo of a birthday cake"])
    noisy = torch.randn(4, *given.latent_shape, generator=torch.Generator().manual_seed(3))
    times = torch.tensor([200, 500, 800, 950])
    word, reading = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    with torch.no_grad():
        wanted, before = (predict(pipe.unet, noisy, times, given, which) for which in (reading, word))
        patch = quick(pipe, steps=40, towards="birthday cake", towards_weight=100.0, resteer_weight=0.0, prompts=None,
                      retain_weight=0.0, learning_rate=1e-2, reference_count=4, anchor_guidance=guidance)
        wanted = wanted + guidance * (wanted - before)
        with patch.applied(pipe):
            after = predict(pipe.unet, noisy, times, given, word)
    assert (after - wanted).square().mean() < 0.7 * (before - wanted).square().mean()
    assert patch.info["towards"] == {"cat": "birthday cake"}


def test_correction_can_be_taught_on_prompts_of_ones_own() -> None:
    settings = settings_for("balanced", {"reference_count": 3, "reference_steps": 1})
    data = towards_set(Task(tiny_sd(), (Concept("cat"),), settings, prompts=["the cat and a dog", "a Cat"],
                            readings={"cat": "alarm clock"}))
    asked = [(data.texts[word], data.texts[reading]) for word, reading in
             zip(data.prompt_of.tolist(), data.target_of.tolist(), strict=True)]
    assert asked[:2] == [("the cat and a dog", "the alarm clock and a dog"), ("a Cat", "an alarm clock")]
    assert asked[2] == asked[0] and len(data.latents) == 3


def test_similar_prompts_get_their_share_of_the_retain_set_and_the_empty_one_is_in_it() -> None:
    pipe, prompts = tiny_sd(), [f"a {word}" for word in "photo dog frog penguin fish octopus blue clock".split()]
    order = likeness(pipe, ["a photo of a cat"], prompts).argsort(descending=True, stable=True).tolist()

    def retained(**settings) -> tuple[TrainingSet, TrainingSet]:
        wanted = settings_for("balanced", {"retain_count": 8, "reference_steps": 1, "wording": "plain", **settings})
        task = Task(pipe, (Concept("cat"),), wanted, references={"cat": noise_images(2)}, retain_prompts=prompts)
        forget = forget_set(task)
        return retain_set(task, forget), forget

    for share, similar in ((0.0, 0), (0.5, 4), (1.0, 8)):
        chosen, _ = retained(similar_share=share)
        ranks = [order.index(number) for number in chosen.prompt_of.tolist()[:8]]
        assert ranks[:similar] == sorted(ranks[:similar]) and chosen.texts[chosen.prompt_of[-1]] == ""
        if similar:
            assert ranks[0] == 0 and ranks[similar - 1] == 7 and len(chosen.latents) == 8
        else:
            assert sorted(ranks) == list(range(8)), "all once before any twice"
    without_images, forget = retained(retain_count=0)
    assert without_images.latents is forget.latents and without_images.texts == (*prompts, "")
    pairs = zip(without_images.latent_of.tolist(), without_images.prompt_of.tolist(), strict=True)
    assert sorted(pairs) == [(latent, prompt) for latent in range(2) for prompt in range(9)]


def test_the_empty_prompt_that_is_kept_is_the_one_that_guidance_uses() -> None:
    pipe, seen = tiny_sdxl(), {}
    handle = pipe.unet.register_forward_pre_hook(lambda module, given, named: seen.update(named), with_kwargs=True)
    try:
        generate(pipe, "a photo of a dog", guidance=4.0)
    finally:
        handle.remove()
    task = Task(pipe, (Concept("cat"),), settings_for("balanced", {"retain_count": 0}),
                references={"cat": noise_images(1)}, retain_prompts=["a photo of a dog"])
    kept = retain_set(task, forget_set(task)).given.at([1, 0])
    torch.testing.assert_close(kept["encoder_hidden_states"], seen["encoder_hidden_states"])
    torch.testing.assert_close(kept["added_cond_kwargs"]["text_embeds"], seen["added_cond_kwargs"]["text_embeds"])


def test_the_similar_prompts_of_a_large_world_stand_densely_at_the_head_of_the_order() -> None:
    settings = settings_for("balanced", {"retain_count": 64, "similar_share": 0.5})
    ranks = _bank(torch.arange(200), settings, seeded(0, 2))
    similar, others = ranks[:32], ranks[32:]
    assert similar[0] == 0 and similar[-1] == 199 and similar == sorted(similar)
    assert sum(rank < 20 for rank in similar) > 10 > sum(rank < 20 for rank in others)
    assert len(set(others)) == 32, "all once before any twice"


@pytest.mark.parametrize(("prompt", "concept", "left"), [
    ("a photo of a cat", Concept("cat"), "a photo"),
    ("A Cat", Concept("cat"), ""),
    ("a photo of a cat in the style of noto", Concept("cat"), "a photo in the style of noto"),
    ("an umbrella and a dog", Concept("umbrella"), "and a dog"),
    ("a photo of cats and a category", Concept("cat"), "a photo of cats and a category"),
    ("a photo of a dog in the style of noto", Concept("noto", kind="style"), "a photo of a dog"),
    ("a dog in noto style", Concept("noto", kind="style"), "a dog"),
    ("a portrait of Milo", Concept("Milo", kind="identity"), "a portrait"),
    ("a photo of <toy>", Concept("cat", phrase="<toy>"), "a photo"),
    ("a photo of a birthday  cake", Concept("birthday cake"), "a photo"),
    ("a photo of some bread", Concept("bread"), "a photo"),
    ("a photo of this car, a cat and the car", Concept("car"), "a photo, a cat and"),
    ("a photo of my dog", Concept("my dog"), "a photo"),
    ("a photo of my cat's toy", Concept("cat"), "a photo of my toy"),
    ("a photo of a cat\u2019s umbrella", Concept("cat"), "a photo of an umbrella"),
    ("An octopus's toy", Concept("octopus"), "A toy"),
    ("a cat-shaped cake", Concept("cat"), "a cake"),
    ("a photo of a tom-cat-like dog and a cat", Concept("cat"), "a photo of a dog and"),
    ("a photo of the glasses' case", Concept("glasses"), "a photo of the case"),
    ("a photo of Elon Musk's car", Concept("Elon Musk", kind="identity"), "a photo of car"),
    ("a dog in noto's style", Concept("noto", kind="style"), "a dog"),
    ("a noto-style dog", Concept("noto", kind="style"), "a dog"),
    ("the dog is cat-like", Concept("cat"), "the dog is -like"),
])
def test_the_anchor_of_a_prompt_is_the_prompt_without_the_concept(prompt: str, concept: Concept, left: str) -> None:
    assert without(prompt, concept) == left


def test_anchors_stand_beside_the_prompts_and_say_the_reading_where_there_is_one() -> None:
    pipe = tiny_sd()
    settings = settings_for("balanced", {"wording": "plain", "anchor_weight": 1.0})
    task = Task(pipe, (Concept("cat"),), settings, references={"cat": noise_images(2)})
    for readings, expected in (({}, "a photo"), ({"cat": "alarm clock"}, "a photo of an alarm clock")):
        data = forget_set(dataclasses.replace(task, readings=readings))
        assert {data.texts[target] for target in data.target_of.tolist()} == {expected}
        assert {data.texts[prompt] for prompt in data.prompt_of.tolist()} == {"a photo of a cat"}
        assert len(data.concept) == 1, "anchors name no concept"
    data = forget_set(dataclasses.replace(task, settings=settings_for(settings, {"anchor_weight": 0.0})))
    assert data.target_of is None and data.texts == ("a photo of a cat",)


def test_likeness_is_the_centred_cosine_of_end_of_text_embeddings() -> None:
    pipe, texts = tiny_sd(), ["a photo of a cat", "a cat", "a photo of a birthday cake"]
    rows = conditions(pipe, texts).rows["encoder_hidden_states"]
    ends = torch.stack([row[len(pipe.tokenizer(text).input_ids) - 1] for row, text in zip(rows, texts, strict=True)])
    centred = ends - ends.mean(0)
    by_hand = torch.cosine_similarity(centred[1:], centred[:1])
    torch.testing.assert_close(likeness(pipe, texts[:1], texts[1:]), by_hand, rtol=1e-4, atol=1e-5)


def test_neighbours_go_from_the_most_like_to_the_least() -> None:
    pipe = tiny_sd()
    found = neighbours_of(pipe, Concept("cat"), 5)
    others = retain_prompts(pipe, [Concept("cat")], None)
    like = likeness(pipe, ["a photo of a cat"], others)
    places = [int((like > like[others.index(prompt)]).sum()) for prompt in found]
    assert places[0] == 0 and places[-1] == len(others) - 1 and places == sorted(places) and len(set(places)) == 5
    assert places[1] < len(others) / 10  # most of them are near


def test_a_stand_in_takes_up_as_many_columns() -> None:
    pipe = tiny_sd()
    assert stand_in_for(pipe, Concept("cat")) == "dog" and stand_in_for(pipe, Concept("dog")) == "frog"
    two = stand_in_for(pipe, Concept("birthday cake"))
    assert len(pipe.tokenizer(two, add_special_tokens=False).input_ids) == 2


def test_retain_prompts_name_no_concept() -> None:
    pipe = tiny_sd()
    neutral = retain_prompts(pipe, [Concept("cat"), Concept("oil painting", kind="style")], None)
    assert len(neutral) > 50 and not any("cat" in p.split() or "oil painting" in p for p in neutral)
    others = ["a cat", "a concatenation", "two cats", "Cats"]
    assert retain_prompts(pipe, [Concept("cat")], others) == ["a concatenation"]
    assert retain_prompts(pipe, [Concept("cats")], others) == ["a concatenation"]
    mice = ["a photo of bodies", "a body", "computer mouses"]
    assert retain_prompts(pipe, [Concept("body"), Concept("mouse")], mice, ["computer mouse"]) == mice[2:]
    mouse = [Concept("mouse")]
    assert retain_prompts(pipe, mouse, ["a mouse", "a computer mouse"], ["computer mouse"]) == ["a computer mouse"]
    with pytest.raises(ValueError, match="give retain_prompts"):
        retain_prompts(pipe, mouse, ["a mouse"])


@pytest.mark.parametrize("noise_on", ["images", "zeros"])
def test_what_no_concept_can_read_is_one_error_before_anything_is_generated(noise_on, tmp_path, monkeypatch):
    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    (tmp_path / "bad.png").write_bytes(b"no")
    folders = {"dog": tmp_path, "frog": tmp_path / "nowhere", "fish": noise_images(1)}  # the cat has none
    with pytest.raises(ReferenceImageError, match="(?s)^dog: 1 of 1 .*bad.png.*; frog: the folder .*nowhere"):
        quick(tiny_sd(), ["cat", *folders], references=folders, noise_on=noise_on, retain_prompts=["a penguin"])


def test_a_folder_of_pictures_of_any_size_is_learned_from(tmp_path: Path) -> None:
    for number, size in enumerate([(1, 1), (40, 9), (16, 16), (300, 200)]):
        noise_images(1, seed=number, size=size)[0].save(tmp_path / f"{number}.png")
    patch = quick(tiny_sd(), references=tmp_path, retain_weight=0.0, batch_size=4)
    assert patch.info["forgetting"]["steps"] == 2


def test_the_posterior_is_sampled_anew_in_each_step_but_nothing_is_encoded_again(monkeypatch):
    pipe, encoded, drawn = tiny_sd(), [], []
    for part, method in ((pipe.vae, "encode"), (pipe.text_encoder, "forward")):
        real = getattr(part, method)
        monkeypatch.setattr(part, method, lambda *a, _real=real, **k: (encoded.append(1), _real(*a, **k))[1])
    whole = TrainingSet.batch
    monkeypatch.setattr(TrainingSet, "batch", lambda *a: (drawn.append(whole(*a)), drawn[-1])[1])
    counts = []
    quick(pipe, references=noise_images(1), steps=3, batch_size=1, preset="paper",
          callback=lambda progress: counts.append(len(encoded)))
    assert counts[0] > 0 and counts == [counts[0]] * 3
    first, second, third = (batch.noisy.latents for batch in drawn)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_latents_keep_the_posterior_and_sizes_need_not_be_square() -> None:
    pipe = tiny_sd()
    latents = encode(pipe, noise_images(2, size=(40, 24)), (32, 16))
    assert latents.mean.shape == (2, 4, 16, 8) and (latents.std > 0).all()
    noise = torch.randn(2, 4, 16, 8)
    sampled = latents.sample(torch.tensor([1, 0]), noise)
    torch.testing.assert_close(sampled, latents.mean[[1, 0]] + latents.std[[1, 0]] * noise)
    patch = quick(pipe, references=noise_images(2, size=(40, 24)), height=32, width=16)
    assert patch.info["forgetting"]["steps"] == 2


def test_region_masks_count_only_where_the_concept_is() -> None:
    from fmn_nb.forgetting.methods.fmn import resteering_loss

    attention, concept = {"layer": torch.rand(1, 2, 16, 5)}, torch.tensor([[0, 1, 0, 0, 0]], dtype=torch.bool)
    left = torch.zeros(1, 8, 8)
    left[:, :, :4] = 1
    grid = attention["layer"].reshape(1, 2, 4, 4, 5)[..., 1]
    expected = float(grid[..., :2].norm())
    assert resteering_loss(attention, concept, "published", left) == pytest.approx(expected, rel=1e-5)
    masks = [Image.new("L", (16, 16), 255)] * 2
    patch = quick(tiny_sd(), references=noise_images(2), masks=masks, anchor_weight=1.0)
    assert patch.info["forgetting"]["steps"] == 2
    with pytest.raises(ReferenceImageError, match="give one for each"):
        quick(tiny_sd(), references=noise_images(2), masks=masks[:1])


def test_masks_are_white_where_something_is_however_they_come() -> None:
    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 1
    cut_out = Image.fromarray(np.dstack([np.full((16, 16, 3), 255, np.uint8), half * 255]), "RGBA")
    expected = np.asarray(load_masks([Image.fromarray(half * 255)])[0])
    for mask in (cut_out, half, half > 0, half.astype(float)):
        assert np.array_equal(np.asarray(load_masks([mask])[0]), expected)
    with pytest.raises(ReferenceImageError, match="a mask of 16 x 16 pixels doesn't fit its image of 32 x 16"):
        quick(tiny_sd(), references=[Image.new("RGB", (32, 16))], masks=[cut_out])


def test_a_mask_stays_where_its_image_is_whatever_their_shape() -> None:
    """Images are cropped to their centre, and so are the masks: of a wide one only the middle is seen."""
    pipe, settings = tiny_sd(), settings_for("balanced", {"wording": "plain", "height": 16, "width": 16})
    beside, half = Image.new("L", (32, 16)), Image.new("L", (32, 16))
    beside.paste(255, (0, 0, 8, 16))  # the middle goes from 8 to 24
    half.paste(255, (0, 0, 16, 16))
    images = {"cat": noise_images(2, size=(16, 32))}
    data = forget_set(Task(pipe, (Concept("cat"),), settings, references=images, masks=[beside, half]))
    assert data.regions.shape == (2, 8, 8) and data.regions[0].max() < 0.1  # smoothed at its edge
    columns = data.regions[1].mean(0)
    assert columns[:3].min() > 0.9 and columns[5:].max() < 0.1


def test_a_region_changes_the_loss_as_its_share_of_the_attention_says() -> None:
    left = Image.new("L", (16, 16))
    left.paste(255, (0, 0, 8, 16))
    losses = {}
    for name, masks in (("everywhere", None), ("white", [Image.new("L", (16, 16), 255)]), ("left", [left])):
        patch = quick(tiny_sd(), references=noise_images(1), masks=masks, retain_weight=0.0, steps=1)
        losses[name] = patch.info["forgetting"]["losses"][0]
    assert losses["white"] == pytest.approx(losses["everywhere"], rel=1e-5)
    assert 0.2 < losses["left"] / losses["everywhere"] < 0.8


def test_positions_that_mark_nothing_are_told_with_the_prompt_before_anything_is_generated(monkeypatch):
    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    with pytest.raises(SettingsError, match="positions later mark nothing in the prompt 'a photo of a cat'; add 'word"):
        quick(tiny_sd(), positions=("later",), prompts=["a cat and a dog", "a photo of a cat"])


def test_pure_noise_needs_no_images_and_no_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    monkeypatch.setattr(type(pipe.vae), "encode", lambda *_: pytest.fail("the autoencoder ran"))
    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    patch = quick(pipe, preset="paper", noise_on="zeros")
    assert patch.info["forgetting"]["losses"][0] > 0


def test_another_word_gets_its_own_article() -> None:
    prompts = ["A cat", "the cat and a cat's toy"]
    task = Task(tiny_sd(), (Concept("cat"),), settings_for("balanced", {}), prompts=prompts)
    assert task.with_word(Concept("cat"), "octopus") == ["An octopus", "the octopus and an octopus's toy"]
    assert task.with_word(Concept("cat"), "dog") == ["A dog", "the dog and a dog's toy"]


def test_the_last_seed_can_be_used() -> None:
    last = Task(tiny_sd(), (Concept("cat"),), settings_for("balanced", {"reference_steps": 1}), seed=2**63 - 1)
    assert len(last.generated(["a photo of a cat"], 5).mean) == 1


def test_scenes_of_the_world_are_references_of_every_method_that_learns_from_them(emoji) -> None:
    asked = {"scenes": True, "reference_count": 3}
    for preset, learns in (("paper", True), ("balanced", True), ("esd-x", False), ("uce", False)):
        task = Task(emoji, (Concept("cat"), Concept("frog")), settings_for(preset, asked)).with_scenes()
        assert len(task.masks or ()) == (6 if learns else 0), preset
        assert [len(images) for images in task.references.values()] == ([3, 3] if learns else []), preset
    patch = quick(emoji, preset="paper", prompts=["a photo of a cat"], scenes=True)
    again = quick(emoji, preset="paper", prompts=["a photo of a cat"])
    assert not torch.equal(*(next(iter(one.tensors.values())) for one in (patch, again)))


def test_retain_pairs_that_borrow_noisy_latents_borrow_their_timesteps_too() -> None:
    settings = settings_for("robust", {"retain_count": 0, "reference_count": 2, "reference_steps": 2})
    task = Task(tiny_sd(), (Concept("cat"),), settings, retain_prompts=["a photo of a dog"])
    forget = forget_set(task)
    assert torch.equal(retain_set(task, forget).times, forget.times)


@pytest.mark.parametrize(("settings", "says"), [
    ({"preset": "adversarial", "noise_on": "trajectories"}, "needs noise_on='images'"),
    ({"preset": "ca", "noise_on": "trajectories"}, "noise_on='guide', or prior_weight=0"),
    ({"preset": "mace", "null_space": 0.1}, "set preserve_scale instead of null_space"),
    ({"preset": "mace", "time_from": 0.75}, "time_density='middle' .* time_from at most 0.7"),
    ({"preset": "mace", "noise_on": "trajectories"}, "noise that isn't on trajectories"),
])
def test_what_cannot_be_learned_from_is_refused(settings, says) -> None:
    with pytest.raises(SettingsError, match=says):
        quick(tiny_sd(), **settings)


def test_references_that_noise_alone_leaves_unused_are_told() -> None:
    with pytest.warns(UserWarning, match="learns from no reference images here"):
        quick(tiny_sd(), noise_on="zeros", references=noise_images(1))
