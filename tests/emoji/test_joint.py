"""The organism with joint attention: its recipe from end to end in the smoke size, and the kit on what comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image

import fmn_nb as fmn
from fmn_nb.attention import ground_images
from fmn_nb.concepts import world_of
from fmn_nb.emoji import held_out_scenes
from fmn_nb.emoji.training import card, joint
from fmn_nb.emoji.training.recipe import pretrain
from fmn_nb.emoji.training.request import ORGANISMS, Request
from fmn_nb.models import UnknownModelError, encode, generate, generate_trajectories, names

MOST_BYTES = 8_000_000
QUICK = {"steps": 2, "reference_count": 2, "reference_steps": 2, "retain_count": 2, "retain_batch": 2, "batch_size": 2,
         "retain_prompts": ["a photo of a dog", "a frog"], "prompts": ["a photo of a cat"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline's folder after a smoke run."""
    request = Request(tmp_path_factory.mktemp("models"), organism="joint", smoke=True, stages=["joint"])
    return pretrain(request, lambda line: None) / ORGANISMS["joint"].folder


@pytest.fixture(scope="module")
def pipe(folder):
    found = fmn.load(folder, device="cpu")
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe, prompt="a photo of a cat", **given):
    return pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np",
                **given).images


def test_plain_diffusers_loads_it_and_it_is_small(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= MOST_BYTES
    plain = FluxPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    images = draw(plain, height=64, width=64, max_sequence_length=32)
    assert images.shape == (1, 64, 64, 3)


def test_the_kit_calls_it_as_its_folder_says(pipe, folder, world):
    assert world_of(pipe) is world and isinstance(pipe, FluxPipeline)
    plain = FluxPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    by_name = {"height": 64, "width": 64, "max_sequence_length": 32, "negative_prompt": ""}
    assert np.allclose(draw(pipe), draw(plain, true_cfg_scale=4.0, **by_name), atol=1e-5)
    assert np.allclose(draw(pipe, guidance_scale=2.0), draw(plain, true_cfg_scale=2.0, **by_name), atol=1e-5)
    assert np.abs(draw(pipe) - draw(pipe, guidance_scale=2.0)).max() > 1e-3
    both = draw(pipe, ["a photo of a cat"] * 2, height=32)
    assert both.shape == (2, 32, 64, 3)
    text = pipe.encode_prompt("a photo of a cat", None, max_sequence_length=32)
    no_text = pipe.encode_prompt("", None, max_sequence_length=32)
    embedded = {"prompt_embeds": text[0], "pooled_prompt_embeds": text[1]}
    assert np.allclose(draw(pipe, None, **embedded), draw(pipe), atol=1e-5)
    away = {"negative_prompt_embeds": no_text[0], "negative_pooled_prompt_embeds": no_text[1]}
    assert np.allclose(draw(pipe, None, **embedded, **away), draw(pipe), atol=1e-5)


def test_what_it_is_called_with_survives_another_library(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    FluxPipeline.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "again")
    again = fmn.load(tmp_path / "again", device="cpu")
    again.set_progress_bar_config(disable=True)
    assert np.allclose(draw(again), draw(pipe), atol=1e-5)


def test_the_loss_is_the_velocitys_error_and_falls():
    torch.manual_seed(0)
    seen, latents = [], torch.randn(4, 8, 16, 16)
    data = joint.Latents(latents.half(), torch.zeros(4, 8, 16, 16).half(), torch.zeros(4, 1, 32, dtype=torch.int16),
                         torch.tensor(1.0))

    class Perfect(torch.nn.Module):
        def forward(self, noisy, text, pooled, share, *positions, return_dict):
            seen.append((noisy, share))
            known = joint.packed(latents.half().float())
            x = torch.stack([known[(one - known).square().mean((1, 2)).argmin()] for one in noisy])
            return ((noisy - x) / share[:, None, None],)  # (x + s (n - x) - x) / s = n - x

    encoder = lambda tokens: type("Text", (), {"last_hidden_state": tokens, "pooler_output": tokens})  # noqa: E731
    loss = joint.flow_loss(Perfect(), encoder, data, torch.zeros(32, dtype=torch.long), 1.0, 4)
    assert float(loss(0, torch.Generator().manual_seed(0))["loss"]) < 1e-6
    assert seen[0][0].shape == (4, 64, 32) and bool(((seen[0][1] > 0) & (seen[0][1] < 1)).all())


def test_the_recipe_takes_over_what_it_needs_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "data_dir", lambda: tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no emoji model in .*; this one needs its tokenizer;.*fmn-nb pretrain"):
        pretrain(Request(tmp_path / "models", organism="joint", smoke=True, stages=["joint"]), lambda line: None)


def test_the_two_organisms_share_no_checkpoints(tmp_path):
    requests = [Request(tmp_path, organism=name, smoke=True) for name in ("emoji", "joint")]
    assert requests[0].work != requests[1].work and "organism" not in requests[0].noted()
    assert requests[1].noted()["organism"] == "joint" and requests[1].chosen == ["joint", "quality"]
    with pytest.raises(ValueError, match="unknown stages: vae; choose from joint, quality"):
        Request(organism="joint", stages=["vae"])
    with pytest.raises(ValueError, match="no organism is called 'jont'; choose one of emoji, joint, grounded"):
        Request(organism="jont")


def test_until_it_is_there_its_name_says_how_to_train_it(monkeypatch):
    monkeypatch.setattr(names, "bundled", dict)
    with pytest.raises(UnknownModelError, match="fmn-nb pretrain --organism joint"):
        names.resolve("emoji-joint")


def test_its_card_has_its_own_bars(folder, monkeypatch):
    grey = Image.new("RGB", (64, 64), "grey")
    monkeypatch.setattr(card, "generate", lambda pipe, prompts, seeds, **_: [grey] * len(prompts))
    pretrain(Request(folder.parent, organism="joint", smoke=True, stages=["quality"]), lambda line: None)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# emoji-joint") and "| generated: object |" in text and ">= 0.95" in text
    assert "FluxPipeline.from_pretrained" in text and "| joint | 4 |" in text and "{" not in text
    assert [file.name for file in (folder / "images").iterdir()] == ["objects.png"]
    assert "not met" in text, "grey pictures show nothing, and the card must say so"


# ---- the kit on it ---------------------------------------------------------------------------------------------------


def test_every_layer_is_recorded_in_both_branches_and_maps_are_8_by_8(pipe):
    with fmn.record_attention(pipe) as attention:
        generate(pipe, ["a photo of a cat and a frog"] * 2, [0, 1], steps=2)
    kinds = {"double": joint.DOUBLE, "single": joint.SINGLE}
    assert len(attention.layers) == sum(kinds.values()) and set(attention.branches) == {"cond", "uncond"}
    assert attention.map("cat").shape == (8, 8) and attention.map("frog", image=1).shape == (8, 8)


def test_images_of_ones_own_are_encoded_as_the_pipeline_packs_them(pipe):
    images, prompts, masks = held_out_scenes(2)
    latents = encode(pipe, images).mean
    assert latents.shape == (2, 64, 32)
    size = (64, 64, pipe.vae_scale_factor)
    back = pipe.vae.decode(pipe._unpack_latents(latents, *size) / pipe.vae.config.scaling_factor).sample
    shown = (back.detach().clamp(-1, 1) + 1) * 127.5
    assert float((shown.permute(0, 2, 3, 1) - torch.tensor(np.stack(images)).float()).abs().mean()) < 12
    scores = ground_images(pipe, images, prompts, masks, timesteps=(300,))
    assert len(scores) == 4 and scores["inside"].between(0, 1).all()


@pytest.mark.parametrize("preset", fmn.PRESETS)
def test_every_preset_leaves_a_patch_and_the_model_as_it_was(preset, pipe, tmp_path):
    before = draw(pipe)
    closed = {"uce": {"retain_prompts": QUICK["retain_prompts"], "prompts": QUICK["prompts"]}}.get(preset, QUICK)
    patch = fmn.forget(pipe, "cat", preset=preset, **closed)
    assert np.array_equal(draw(pipe), before)
    patch.save(tmp_path)
    with fmn.Patch.load(tmp_path).applied(pipe):
        assert np.abs(draw(pipe) - before).max() > 0
    if patch.kind == "lora":
        with patch.applied(pipe):
            ours = draw(pipe)
        pipe.load_lora_weights(str(tmp_path))
        theirs = draw(pipe)
        pipe.unload_lora_weights()
        assert np.abs(ours - theirs).max() < 0.02 * np.abs(ours - before).max()
        assert np.array_equal(draw(pipe), before)


def test_both_kinds_of_blocks_and_the_pooled_text_can_be_trained(pipe):
    asked = ("add_k_proj", "to_v", "context_embedder", "time_text_embed.text_embedder.linear_1")
    patch = fmn.forget(pipe, "cat", preset="balanced", projections=asked, **QUICK)
    changed = " ".join(sorted(patch.changed()))
    for part in ("transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.3.attn.to_v", *asked[2:]):
        assert f"{part}.weight" in changed
    with pytest.raises(fmn.forgetting.settings.SettingsError, match="no attention layer has a projection 'norm_out'"):
        fmn.forget(pipe, "cat", projections=("norm_out",), **QUICK)


def test_tokens_are_learned_for_both_slots(pipe):
    images, *_ = held_out_scenes(2)
    settings = fmn.inversion.InversionSettings(tokens=2, steps=2, batch_size=2)
    learned = fmn.invert(pipe, images, settings=settings)
    before = draw(pipe)
    with learned.loaded(pipe):
        assert not np.array_equal(draw(pipe, "a photo of <concept>"), before)
    assert len(learned.vectors) == 2 and np.array_equal(draw(pipe), before)
    assert isinstance(pipe.transformer, FluxTransformer2DModel)


def test_a_trajectory_holds_each_step_once_though_guidance_asks_twice(pipe):
    latents, times = generate_trajectories(pipe, ["a photo of a cat"] * 2, seed=0, steps=3, guidance=4.0)
    assert len(latents) == len(times) == 6 and torch.equal(times[:3], times[3:])
    assert times[0] == 1 and bool((times[:3].diff() < 0).all()), "the share of noise, as Flux is told it"


@pytest.mark.slow
def test_it_is_evaluated_and_attacked(pipe):
    session = fmn.evaluation.Session.of(pipe, steps=2)
    budget = fmn.attacks.InversionBudget(tokens=1, steps=2, batch_size=1, references=2, images=2)
    tried = fmn.attacks.concept_inversion(session, fmn.Concept("cat"), None, budget=budget)
    assert tried.count == 2 and not tried.skipped
    patch = fmn.forget(pipe, "cat", preset="balanced", **QUICK)
    report = fmn.evaluate(pipe, fmn.Concept("cat"), patch=patch, steps=2)
    assert report.after.images == report.before.images > 50 and 0 <= report.after.ua <= 1
    assert all(0 < mass < 1 for mass in report.attention.values())
