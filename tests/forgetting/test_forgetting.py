"""`forget` on every kind of model: its settings, what comes back, and that the pipeline stays as it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from quick import quick
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb.attention.layers import text_layers
from fmn_nb.concepts import Concept, PhraseNotFoundError, UnknownConceptError
from fmn_nb.forgetting import FACTS, PRESETS, Settings, SettingsError, settings_for, trainable
from fmn_nb.forgetting.finetune import BETAS, EPSILON, forget, joined
from fmn_nb.models import conditions, denoiser, fingerprint, load, predict, seeded
from fmn_nb.patches.patch import applied_patches

# ---- settings -------------------------------------------------------------------------------------------------------


def test_presets_are_data_and_paper_holds_the_published_defaults() -> None:
    paper = PRESETS["paper"]
    assert (paper.steps, paper.learning_rate, paper.batch_size) == (35, 2e-6, 1)
    assert (paper.weight_decay, paper.clip, BETAS, EPSILON) == (0.01, 1.0, (0.9, 0.999), 1e-8)
    assert (paper.method, paper.wording) == ("fmn", "paper")
    assert (paper.train, paper.norm, paper.retain_weight, paper.schedule) == ("denoiser", "published", 0.0, "constant")
    assert PRESETS["balanced"].retain_weight > 0 and PRESETS["balanced"].steps <= 35
    assert all(json.dumps(preset.to_dict()) for preset in PRESETS.values())


@pytest.mark.parametrize(("overrides", "text"), [
    ({"learning_rat": 1}, "no setting 'learning_rat'"), ({"steps": 0}, "steps .* equal to 1, not 0"),
    ({"steps": "35"}, "steps .* integer, not '35'"), ({"steps": True}, "steps .* integer, not True"),
    ({"accumulate": 2}, "no setting 'accumulate'; there are method, guide"),
    ({"method": "esd-y"}, "no method 'esd-y'"),
    ({"learning_rate": float("nan")}, "finite"), ({"learning_rate": -1.0}, "learning_rate"),
    ({"norm": "L2"}, "norm .*'mean_square'"),
    ({"positions": ("word",)}, "positions.*'words', 'later'"), ({"positions": ()}, "at least one"),
    ({"time_from": 1.0}, "timesteps"),
    ({"height": 64}, "both height and width"), ({"gradient_checkpointing": 1}, "gradient_checkpointing .* boolean"),
    ({"train": "lora", "projections": ("to_z",)}, "no attention layer has"),
    ({"positions": ("later",), "prompts": ["a photo of a cat"]}, "later mark nothing in the prompt 'a photo of a cat'"),
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
    for name, value in Settings():
        assert getattr(settings_for("paper", {name: value}), name) == value
    loose = settings_for("paper", {"positions": "words", "projections": ["to_k"], "clip": 2})
    assert (loose.positions, loose.projections, loose.clip) == (("words",), ("to_k",), 2.0)
    assert type(loose.clip) is float and json.loads(json.dumps(loose.to_dict()))["positions"] == ["words"]


def test_bad_arguments_are_told_apart() -> None:
    pipe = tiny_sd()
    with pytest.raises(PhraseNotFoundError, match="words there: a, dog"):
        forget(pipe, "cat", prompts=["a dog"], references=noise_images(1), retain_weight=0.0)


@pytest.mark.parametrize("given, message", [
    ({"concepts": []}, "at least one concept"), ({"concepts": ["cat", "cat"]}, "concept and each once"),
    ({"seed": -1}, "a seed"), ({"seed": 1.5}, "a seed"),
    ({"references": {"dog": noise_images(1)}}, "name 'dog', which isn't a concept to forget"),
    ({"concepts": ["cat", "dog"], "references": noise_images(1)}, "for several concepts need a mapping"),
    ({"preset": None}, "preset is a name or Settings"), ({"preset": "balancd"}, "did you mean 'balanced'"),
    ({"presett": "paper"}, "did you mean 'preset'"), ({"callback": 5}, "callback is a function"),
    ({"concepts": None}, "concepts are a Concept"), ({"concepts": [5]}, "5 is not a concept"),
    ({"concepts": 5}, "concepts are a Concept"), ({"references": [None]}, "give a folder, or one or several of"),
    ({"references": 5}, "images can't be read"), ({"masks": [None]}, "give a folder, or one or several of"),
    ({"retain_prompts": "abc"}, "put it in brackets"), ({"retain_prompts": [""]}, "with words in them"),
    ({"retain_prompts": []}, "with words in them"), ({"retain_prompts": [5]}, "with words in them"),
    ({"prompts": "a cat"}, "put it in brackets"), ({"prompts": [" "]}, "with words in them"),
    ({"towards": "Cat"}, "is the concept 'cat' itself"), ({"towards": "cats"}, "is the concept 'cat' itself"),
    ({"towards": ""}, "name of a reading"), ({"towards": 5}, "name of a reading"),
    ({"rank": 17}, "rank=17 is more than"), ({"rank": 100_000}, "rank .* 4096"), ({"batch_size": 10**9}, "batch_size"),
    ({"reference_count": 10**12}, "reference_count"), ({"retain_count": 10**12}, "retain_count"),
    ({"steps": 10**12}, "steps"), ({"height": 10**9, "width": 8}, "height"), ({"seed": True}, "a seed"),
    ({"checkpoint": 5}, "checkpoint is a folder"), ({"checkpoint": __file__}, "is a file"),
    ({"cache": __file__ + "/inside"}, "is a file"),
])
def test_what_cannot_be_is_told_in_one_line_before_anything_is_drawn(given, message, monkeypatch) -> None:
    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    with pytest.raises(ValueError, match=message) as error:
        forget(tiny_sd(), **{"concepts": "cat", "steps": 1, **given})
    assert "\n" not in str(error.value)


def test_a_name_that_the_world_s_models_never_learned_is_refused(monkeypatch) -> None:
    class Drawn(Exception):  # noqa: N818
        """Got as far as drawing."""

    def draw(*_, **__):
        raise Drawn

    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", draw)
    pipe = load("emoji")
    for concept in ("unicorm", "cta", "cats", Concept("cat", kind="style")):
        with pytest.raises(UnknownConceptError, match="has no"):
            forget(pipe, concept)
    with pytest.raises(UnknownConceptError, match="did you mean 'cat'"):
        forget(pipe, "catt")
    for known in ({"concepts": "a cat"}, {"concepts": "Cat"}, {"concepts": Concept("noto", kind="style")},
                  {"concepts": "unicorm", "prompts": ["a photo of a unicorm"]}, {"concepts": "mouse"}):
        with pytest.raises(Drawn):
            forget(pipe, **known)
    pipe.tokenizer.add_tokens(["<toy>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with pytest.raises(Drawn):
        forget(pipe, Concept("toy", phrase="<toy>"))


def test_numpy_s_whole_numbers_are_seeds() -> None:
    options = {"references": noise_images(1), "retain_weight": 0.0}
    patch, plain = (quick(tiny_sd(), seed=seed, **options) for seed in (np.int64(3), 3))
    assert patch.info["seed"] == 3 and type(patch.info["seed"]) is int
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in patch.tensors.items())


# ---- what comes back, and what stays --------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "make"), [
    (method, make) for method, facts in FACTS.items() if facts.trains and method != "mace"
    for make in (tiny_sd, tiny_sdxl, tiny_pixart, tiny_sd3, tiny_flux)])
def test_every_trained_method_on_every_kind_of_model_leaves_a_patch_and_the_model_as_it_was(method: str, make) -> None:
    pipe = make()
    if make is tiny_flux:
        pipe.default_sample_size = 4  # 4096 packed positions would only be slow
    before = snapshot(pipe)
    guide = "" if method == "fmn" else "without"
    patch = quick(pipe, method=method, guide=guide, train="lora", learning_rate=1e-2, anchor_weight=1.0,
                  anchor_guidance=1.0)
    assert_unchanged(pipe, before)
    assert patch.info["settings"]["method"] == method
    report = patch.info["forgetting"]
    assert report["steps"] == 2 and len(report["losses"]) == len(report["masses"]) == len(report["retain"]) == 2
    assert report["trainable_parameters"] == sum(t.numel() for t in patch.tensors.values())
    assert report["patch_bytes"] == patch.nbytes and report["peak_memory_bytes"] > 1e7
    assert report["retain"][0] == 0.0 < report["retain"][1]  # a fresh LoRA is the frozen model
    assert 0 < report["masses"][0] < 1 and len(report["anchor"]) == 2 and report["anchor"][0] > 0
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


def test_the_anchor_pulls_the_concepts_prediction_to_that_without_it_and_guidance_past_it() -> None:
    pipe, images = tiny_sd(), noise_images(3)
    asked = conditions(pipe, ["a photo of a cat", "a photo"])
    noisy, times = torch.randn(2, 4, 16, 16, generator=seeded(0, 0))[[0, 0]], torch.tensor([500, 500])

    @torch.no_grad()
    def shift() -> torch.Tensor:
        return predict(pipe.unet, noisy, times, asked, torch.tensor([0, 1]))

    named, target = shift()
    found = {}
    for guidance in (0.0, 2.0):
        patch = quick(pipe, references=images, prompts=["a photo of a cat"], anchor_weight=100.0, resteer_weight=0.0,
                      retain_weight=0.0, anchor_guidance=guidance, steps=30, learning_rate=5e-3)
        with patch.applied(pipe):
            now = shift()[0]
        direction = target - named  # 0 stands for the frozen prediction, 1 for the anchor
        found[guidance] = float(((now - named) * direction).sum() / direction.square().sum())
    assert 0.5 < found[0.0] < 1.5 and found[2.0] > found[0.0] + 0.5


def test_attention_on_the_concept_falls():
    patch = quick(tiny_sd(), steps=25, learning_rate=2e-2, retain_weight=1.0, references=noise_images(3))
    masses, losses = patch.info["forgetting"]["masses"], patch.info["forgetting"]["losses"]
    assert masses[-1] < 0.6 * masses[0] and losses[-1] < 0.6 * losses[0]


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
        so_far = progress.make_patch()
        assert so_far.info["concepts"][0]["name"] == "cat" and so_far.info["forgetting"]["steps"] == progress.step
        assert so_far.info["base"]["fingerprint"] == fingerprint(tiny_sd())
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


def test_one_report_of_fine_tunes_of_different_methods_has_the_lists_of_all() -> None:
    one = {"steps": 2, "losses": [1.0, 0.5], "loss_last": 0.5, "peak_memory_bytes": 1, "stopped_because": "steps"}
    found = joined([one, {**one, "losses": [3.0], "anchor": [2.0], "loss_last": 3.0, "peak_memory_bytes": 4}])
    assert found == {**one, "steps": 4, "losses": [1.0, 0.5, 3.0], "anchor": [2.0], "loss_last": 3.0,
                     "peak_memory_bytes": 4}
