"""The forgetting lab: settings, references, losses, weights, and runs that stop, fail and go on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb import forgetting_steps
from fmn_nb.attention_layers import text_layers
from fmn_nb.concepts import Concept, PhraseNotFoundError
from fmn_nb.forgetting import PRESETS, CheckpointError, ForgettingError, Settings, SettingsError, forget, settings_for
from fmn_nb.forgetting_prompts import retain_prompts
from fmn_nb.forgetting_weights import trainable
from fmn_nb.inversion import LearnedTokens
from fmn_nb.models import denoiser
from fmn_nb.patches import PatchMismatchError, applied_patches
from fmn_nb.references import ReferenceImageError, encode, generate_latents, load_images

OTHERS = ["a photo of a dog", "a frog", "a penguin and a fish"]
QUICK = {"steps": 2, "reference_count": 2, "reference_steps": 2, "retain_count": 2, "retain_prompts": OTHERS}


def quick(pipe, concept="cat", **overrides):
    """A fine-tune of two steps."""
    return forget(pipe, concept, **{**QUICK, **overrides})


# ---- settings -------------------------------------------------------------------------------------------------------


def test_presets_are_data_and_paper_holds_the_published_defaults() -> None:
    paper = PRESETS["paper"]
    assert (paper.steps, paper.learning_rate, paper.batch_size) == (35, 2e-6, 1)
    assert (paper.weight_decay, paper.clip, paper.beta1, paper.beta2, paper.epsilon) == (0.01, 1.0, 0.9, 0.999, 1e-8)
    assert (paper.train, paper.norm, paper.retain_weight, paper.schedule) == ("denoiser", "published", 0.0, "constant")
    assert PRESETS["balanced"].retain_weight > 0 and PRESETS["balanced"].steps <= 35
    assert all(json.dumps(preset.to_dict()) for preset in PRESETS.values())


@pytest.mark.parametrize(("overrides", "text"), [
    ({"learning_rat": 1}, "no setting 'learning_rat'"), ({"steps": 0}, "at least 1"),
    ({"steps": "35"}, "must be a int"),
    ({"learning_rate": float("nan")}, "finite"), ({"learning_rate": -1.0}, "from 0"), ({"norm": "L2"}, "norm can't be"),
    ({"positions": ("word",)}, "positions are some of"), ({"positions": ()}, "not none"),
    ({"time_from": 1.0}, "timesteps"),
    ({"height": 64}, "both height and width"), ({"gradient_checkpointing": 1}, "must be a bool"),
    ({"train": "lora", "projections": ("to_z",)}, "no attention layer has"),
    ({"tracker": "tensorboard"}, "tracker_folder"),
])
def test_wrong_settings_are_one_clear_error_and_touch_nothing(overrides: dict, text: str) -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    with pytest.raises(SettingsError, match=text):
        quick(pipe, Concept("cat"), references=noise_images(1), **{"retain_count": 0, **overrides})
    assert_unchanged(pipe, before)


def test_every_setting_can_be_overridden() -> None:
    with pytest.raises(SettingsError, match="balanced"):
        settings_for("balancd", {})
    for field in dataclasses.fields(Settings):
        assert getattr(settings_for("paper", {field.name: getattr(Settings(), field.name)}), field.name) == getattr(
            Settings(), field.name)


def test_bad_arguments_are_told_apart() -> None:
    pipe = tiny_sd()
    images = noise_images(1)
    for wrong in ({"concepts": []}, {"concepts": ["cat", "cat"]}, {"seed": -1}, {"seed": 1.5}, {"prompts": "a cat"},
                  {"concepts": ["cat", "dog"], "references": images}, {"references": {"dog": images}}):
        with pytest.raises(ValueError):
            forget(pipe, **{"concepts": "cat", **wrong})
    with pytest.raises(PhraseNotFoundError, match="words there: a, dog"):
        forget(pipe, "cat", prompts=["a dog"], references=noise_images(1), retain_weight=0.0)


# ---- what comes back, and what stays --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_pixart, tiny_sd3, tiny_flux])
def test_every_kind_of_model_forgets_and_is_unchanged(make) -> None:
    pipe = make()
    if make is tiny_flux:
        pipe.default_sample_size = 4  # 4096 packed positions would only be slow
    before = snapshot(pipe)
    patch = quick(pipe, train="lora", learning_rate=1e-2)
    assert_unchanged(pipe, before)
    report = patch.info["forgetting"]
    assert report["steps"] == 2 and len(report["losses"]) == len(report["masses"]) == len(report["retain"]) == 2
    assert report["trainable_parameters"] == sum(t.numel() for t in patch.tensors.values())
    assert report["patch_bytes"] == patch.nbytes and report["peak_memory_bytes"] > 1e7
    assert report["retain"][0] == 0.0 < report["retain"][1]  # a fresh LoRA is the frozen model
    assert 0 < report["masses"][0] < 1
    with patch.applied(pipe):
        assert applied_patches(pipe)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("how", ["lora", "projections", "cross_attention", "denoiser"])
def test_exactly_the_chosen_weights_are_trained(how: str) -> None:
    pipe = tiny_sd()
    model, layers = pipe.unet, tuple(f"{name}." for name in text_layers(pipe.unet))
    settings = settings_for("balanced", {"train": how, "projections": ("to_k", "to_v"), "rank": 2})
    with trainable(model, settings, torch.Generator()) as weights:
        learning = {id(p) for p in model.parameters() if p.requires_grad}
        assert learning == {id(p) for p in weights.parameters.values()}
    names = set(weights.parameters)
    if how == "denoiser":
        assert names == {name for name, _ in model.named_parameters()}
    if how == "cross_attention":
        assert names == {name for name, _ in model.named_parameters() if name.startswith(layers)}
    if how in ("projections", "lora"):
        assert names and all(name.startswith(layers) and (".to_k." in name or ".to_v." in name) for name in names)
    patch = quick(pipe, train=how, projections=("to_k", "to_v"), rank=2, learning_rate=1e-2)
    assert set(patch.tensors) <= names


def test_same_seed_same_patch_bit_for_bit_and_another_seed_another_one() -> None:
    one, again, other = (quick(tiny_sd(), seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in one.tensors.items())
    assert any(not torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_attention_on_the_concept_falls_and_the_lora_works_in_plain_diffusers(tmp_path: Path) -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    patch = quick(pipe, steps=25, learning_rate=2e-2, retain_weight=1.0, references=noise_images(3))
    masses, losses = patch.info["forgetting"]["masses"], patch.info["forgetting"]["losses"]
    assert masses[-1] < 0.6 * masses[0] and losses[-1] < 0.6 * losses[0]
    patch.save(tmp_path)
    untouched = draw(plain)
    plain.load_lora_weights(tmp_path)
    with patch.applied(pipe):
        ours = draw(pipe)
    torch.testing.assert_close(draw(plain), ours, rtol=1e-3, atol=1e-3)
    assert (ours - untouched).abs().max() > 0.05
    with pytest.raises(PatchMismatchError, match="fingerprint"):
        patch.apply(tiny_sd(seed=9))


def test_forgets_on_top_of_an_applied_patch() -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    first = quick(pipe, train="cross_attention")
    with first.applied(pipe):
        second = quick(pipe, Concept("dog"), retain_prompts=["a frog"])
    assert second.info["base"]["fingerprint"] == first.info["base"]["fingerprint"]
    assert second.info["on_top_of"][0][0]["name"] == "cat"
    assert_unchanged(pipe, before)


def test_callback_sees_the_model_as_trained_and_can_stop_it() -> None:
    pipe, seen = tiny_sd(), []
    own = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight

    def watch(progress):
        now = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        seen.append((progress.step, progress.loss, float((now - own).abs().max().detach())))
        progress.make_patch().changed()
        return "enough" if progress.step == 3 else None

    patch = quick(pipe, steps=10, callback=watch, train="cross_attention")
    assert [entry[0] for entry in seen] == [1, 2, 3] and seen[0][2] > 0
    assert patch.info["forgetting"]["stopped_because"] == "enough" and patch.info["forgetting"]["steps"] == 3
    assert [entry[1] for entry in seen] == patch.info["forgetting"]["losses"]


def test_stops_early_when_the_mass_has_fallen() -> None:
    patch = quick(tiny_sd(), steps=60, stop_mass=0.8, learning_rate=2e-2, references=noise_images(2), retain_weight=0.0)
    report = patch.info["forgetting"]
    assert 6 <= report["steps"] < 60 and "under 0.8" in report["stopped_because"]
    assert sum(report["masses"][-5:]) / 5 < 0.8 * report["masses"][0]


# ---- failing and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lora", "cross_attention"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_pipeline_as_it_was(how: str, error: type) -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)

    def interrupt(progress):
        if progress.step == 2:
            raise error("stop")

    with pytest.raises(error):
        quick(pipe, steps=5, callback=interrupt, train=how)
    assert_unchanged(pipe, before)
    quick(pipe, train=how)  # and can be used again


def test_nan_stops_with_the_last_good_state_and_the_pipeline_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    before, real, calls = snapshot(pipe), forgetting_steps.resteering_loss, []

    def sometimes_nan(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(forgetting_steps, "resteering_loss", sometimes_nan)
    with pytest.raises(ForgettingError, match=r"nan in step 4.*last good state is step 2"):
        quick(pipe, steps=6, checkpoint=tmp_path / "c", checkpoint_every=2)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("how", ["lora", "cross_attention"])
def test_resumed_is_the_same_as_unbroken(how: str, tmp_path: Path) -> None:
    settings = {"steps": 6, "train": how, "learning_rate": 1e-2, "checkpoint_every": 2, "warmup": 3,
                "schedule": "constant_with_warmup"}
    whole = quick(tiny_sd(), **settings)

    def interrupt(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        quick(tiny_sd(), **settings, checkpoint=tmp_path, callback=interrupt)
    assert "last good state is step 4" in stopped.value.__notes__[0]
    steps = []
    resumed = quick(tiny_sd(), **settings, checkpoint=tmp_path, callback=lambda p: steps.append(p.step))
    assert steps == [5, 6]
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())
    for name in ("losses", "masses", "retain"):
        assert resumed.info["forgetting"][name] == whole.info["forgetting"][name]
    again = quick(tiny_sd(), **settings, checkpoint=tmp_path, callback=lambda p: pytest.fail("nothing is left to do"))
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in again.tensors.items())


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    quick(tiny_sd(), checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        quick(tiny_sd(), checkpoint=tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="fingerprint"):
        quick(tiny_sd(seed=1), checkpoint=tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        quick(tiny_sd(), checkpoint=tmp_path)


def test_accumulated_batches_are_one_large_batch() -> None:
    """Mean losses of two batches of 2 add up to the gradient of one batch of 4 (for means over the batch)."""
    once = quick(tiny_sd(), steps=1, batch_size=4, accumulate=1, references=noise_images(4), retain_weight=0.0,
                 train="cross_attention", prompts=["a photo of a cat"], time_from=0.5, time_to=0.5005)
    twice = quick(tiny_sd(), steps=1, batch_size=2, accumulate=2, references=noise_images(4), retain_weight=0.0,
                  train="cross_attention", prompts=["a photo of a cat"], time_from=0.5, time_to=0.5005)
    assert once.info["forgetting"]["losses"][0] == pytest.approx(twice.info["forgetting"]["losses"][0], rel=0.02)


# ---- data -----------------------------------------------------------------------------------------------------------


def test_several_concepts_and_learned_tokens_at_once() -> None:
    pipe = tiny_sd()
    tokens = LearnedTokens("<toy>", (torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 0.02,))
    with tokens.loaded(pipe):
        patch = quick(pipe, [Concept("birthday cake"), Concept("toy", phrase="<toy>"), Concept("noto", kind="style")],
                      references={"birthday cake": noise_images(2)}, batch_size=3)
    assert [concept["name"] for concept in patch.info["concepts"]] == ["birthday cake", "toy", "noto"]


def test_concept_correction_moves_the_word_towards_the_other_reading() -> None:
    """After the fine-tune the word's prediction is nearer to what the frozen model predicts for the reading."""
    from fmn_nb.denoising import conditions, predict

    pipe = tiny_sd()
    given = conditions(pipe, ["a photo of a cat", "a photo of a birthday cake"])
    noisy = torch.randn(4, *given.latent_shape, generator=torch.Generator().manual_seed(3))
    times = torch.tensor([200, 500, 800, 950])
    word, reading = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    with torch.no_grad():
        wanted, before = (predict(pipe.unet, noisy, times, given, which) for which in (reading, word))
        patch = quick(pipe, steps=40, towards="birthday cake", towards_weight=100.0, resteer_weight=0.0, prompts=None,
                      retain_weight=0.0, learning_rate=1e-2, reference_count=4)
        with patch.applied(pipe):
            after = predict(pipe.unet, noisy, times, given, word)
    assert (after - wanted).square().mean() < 0.7 * (before - wanted).square().mean()
    assert patch.info["towards"] == {"cat": "birthday cake"}


def test_retain_prompts_name_no_concept() -> None:
    pipe = tiny_sd()
    neutral = retain_prompts(pipe, [Concept("cat"), Concept("oil painting", kind="style")], None)
    assert len(neutral) > 50 and not any("cat" in p.split() or "oil painting" in p for p in neutral)
    assert retain_prompts(pipe, [Concept("cat")], ["a cat", "a concatenation"]) == ["a concatenation"]
    mouse = [Concept("mouse")]
    assert retain_prompts(pipe, mouse, ["a mouse", "a computer mouse"], ["computer mouse"]) == ["a computer mouse"]
    with pytest.raises(ValueError, match="give retain_prompts"):
        retain_prompts(pipe, mouse, ["a mouse"])


def test_images_of_any_kind_are_read_and_bad_ones_named_together(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I;16"):
        Image.new(mode, (30, 20)).save(tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}")
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_images(tmp_path)
    assert len(images) == 8 and {image.mode for image in images} == {"RGB"}
    names = [file.name for file in sorted(tmp_path.glob("*.[pt][ni][gf]"))]
    assert images[names.index("RGBA.png")].getpixel((0, 0)) == (255, 255, 255)  # transparent becomes white
    (tmp_path / "bad.png").write_bytes(b"no")
    (tmp_path / "worse.jpg").write_bytes(b"")
    with pytest.raises(ReferenceImageError, match=r"(?s)2 of 10.*bad.png.*worse.jpg"):
        load_images(tmp_path)
    with pytest.raises(ReferenceImageError, match="doesn't exist"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReferenceImageError, match="no image"):
        load_images(tmp_path / "empty")


def test_latents_keep_the_posterior_and_sizes_need_not_be_square() -> None:
    pipe = tiny_sd()
    latents = encode(pipe, noise_images(2, size=(40, 24)), (32, 16))
    assert latents.mean.shape == (2, 4, 16, 8) and (latents.std > 0).all()
    noise = torch.randn(2, 4, 16, 8)
    sampled = latents.sample(torch.tensor([1, 0]), noise)
    torch.testing.assert_close(sampled, latents.mean[[1, 0]] + latents.std[[1, 0]] * noise)
    patch = quick(pipe, references=noise_images(2, size=(40, 24)), height=32, width=16)
    assert patch.info["forgetting"]["steps"] == 2


def test_generated_references_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmn_nb import references

    prompts = ["a cat", "a dog", "a frog"]
    at_once = generate_latents(tiny_sd(), prompts, seed=1, steps=2, guidance=3.0)
    monkeypatch.setattr(references, "_GENERATED_AT_ONCE", 1)
    singly = generate_latents(tiny_sd(), prompts, seed=1, steps=2, guidance=3.0)
    torch.testing.assert_close(at_once.mean, singly.mean, rtol=1e-4, atol=1e-5)
    assert not torch.equal(at_once.mean[0], at_once.mean[1])


def test_region_masks_count_only_where_the_concept_is() -> None:
    from fmn_nb.forgetting_loss import resteering_loss

    attention, concept = {"layer": torch.rand(1, 2, 16, 5)}, torch.tensor([[0, 1, 0, 0, 0]], dtype=torch.bool)
    left = torch.zeros(1, 8, 8)
    left[:, :, :4] = 1
    grid = attention["layer"].reshape(1, 2, 4, 4, 5)[..., 1]
    expected = float(grid[..., :2].norm())
    assert resteering_loss(attention, concept, "published", left) == pytest.approx(expected, rel=1e-5)
    masks = [Image.new("L", (16, 16), 255)] * 2
    patch = quick(tiny_sd(), references=noise_images(2), masks=masks)
    assert patch.info["forgetting"]["steps"] == 2
    with pytest.raises(ReferenceImageError, match="give one for each"):
        quick(tiny_sd(), references=noise_images(2), masks=masks[:1])


def test_pure_noise_needs_no_images_and_no_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    monkeypatch.setattr(type(pipe.vae), "encode", lambda *_: pytest.fail("the autoencoder ran"))
    monkeypatch.setattr("fmn_nb.forgetting_sets.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    patch = quick(pipe, preset="paper", noise_on="zeros")
    assert patch.info["forgetting"]["losses"][0] > 0


def test_frozen_means_the_model_as_it_was() -> None:
    pipe = tiny_sd()
    for how in ("lora", "cross_attention"):
        settings = settings_for("balanced", {"train": how})
        own = draw(pipe)
        with trainable(denoiser(pipe), settings, torch.Generator().manual_seed(0)) as weights:
            with torch.no_grad():
                for parameter in weights.parameters.values():
                    parameter.add_(0.1)
            assert not torch.equal(draw(pipe), own)
            with weights.frozen():
                assert torch.equal(draw(pipe), own)
            assert not torch.equal(draw(pipe), own)
        assert torch.equal(draw(pipe), own)
