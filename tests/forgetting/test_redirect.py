"""Redirected attention: its distance by hand, where it starts and goes, and which models it is for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from quick import quick
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb.attention import text_layer_calls, text_layers
from fmn_nb.attention.layers import ARCHITECTURES
from fmn_nb.concepts import Concept
from fmn_nb.forgetting import SettingsError
from fmn_nb.forgetting.methods.redirect import redirected
from fmn_nb.models import conditions, denoiser, predict

REDIRECT = {"method": "redirect", "guide": "without", "anchor_guidance": 1.0, "references": noise_images(2)}


def test_the_distance_is_by_hand_what_is_missing_in_units_of_what_the_concept_adds() -> None:
    named, without = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[1.0, 1.0]]])  # the concept adds (2, 0)
    written = torch.tensor([[[1.0, 2.0]]])
    assert float(redirected(written, named, without, 0.0)) == pytest.approx(1 / 4)  # aim (1, 1)
    assert float(redirected(written, named, without, 1.0)) == pytest.approx((4 + 1) / 4)  # aim (-1, 1)
    assert float(redirected(named, named, without, 1.0)) == pytest.approx(4)
    two = [torch.cat([tensor, tensor + torch.tensor([5.0, 0.0])], dim=1) for tensor in (written, named, without)]
    two[0][0, 1] += 100.0  # a pixel that a mask leaves out
    assert float(redirected(*two, 1.0, torch.tensor([[1.0, 0.0]]))) == pytest.approx((4 + 1) / 4)


def test_a_layer_runs_again_alone_as_the_qkv_equations_say() -> None:
    pipe = tiny_sd()
    unet, given = denoiser(pipe), conditions(pipe, ["a photo of a cat", "a photo of a dog"])
    noisy = torch.randn(2, *given.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), text_layer_calls(unet) as calls:
        predict(unet, noisy, torch.tensor([5, 500]), given, torch.arange(2))
        assert set(calls) == set(text_layers(unet))
        for name, call in dict(calls).items():
            layer = unet.get_submodule(name)
            q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (
                layer.to_q(call.pixels), layer.to_k(given.rows["encoder_hidden_states"]),
                layer.to_v(given.rows["encoder_hidden_states"])))  # [batch, n, heads * d] -> [batch, heads, n, d]
            shares = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
            by_hand = layer.to_out[0]((shares @ v).transpose(1, 2).flatten(2))
            assert torch.allclose(call.written, by_hand, atol=1e-5)
            assert torch.equal(call.again(layer), call.written)
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize(("make", "train"), [
    *((make, train) for make in (tiny_sd, tiny_sdxl, tiny_pixart) for train in ("lora", "cross_attention")),
    (tiny_sd3, "lora"), (tiny_flux, "lora")])
def test_it_starts_at_what_the_target_is_away_and_comes_nearer(make, train: str) -> None:
    pipe = make()
    if make is tiny_flux:
        pipe.default_sample_size = 4  # 4096 packed positions would only be slow
    before = snapshot(pipe)
    losses = quick(pipe, steps=12, learning_rate=2e-2, retain_weight=0.0, train=train, rank=4,
                   **REDIRECT).info["forgetting"]["losses"]
    assert losses[0] == pytest.approx(4, rel=1e-3)  # nothing is trained yet: (1 + guidance) squared
    assert losses[-1] < 0.9 * losses[0]
    assert_unchanged(pipe, before)


def test_with_a_reading_it_redirects_to_that() -> None:
    pipe = tiny_sd()
    asked = {"retain_weight": 0.0, "towards_weight": 0.0, "prompts": ["a photo of a cat"], **REDIRECT}
    there, elsewhere = (quick(pipe, Concept("cat"), towards=towards, **asked) for towards in ("dog", None))
    assert there.info["forgetting"]["losses"] != elsewhere.info["forgetting"]["losses"]


def test_masks_choose_the_pixels_of_every_layer() -> None:
    masks = [Image.new("L", (16, 16), shade) for shade in (255, 0)]  # the second reference counts nowhere
    asked = {"retain_weight": 0.0, "batch_size": 2, **REDIRECT}
    masked, open_to_all = (quick(tiny_sd(), masks=given, **asked).info["forgetting"] for given in (masks, None))
    assert masked["loss_first"] == pytest.approx(4, rel=1e-3)
    assert masked["losses"][1] != open_to_all["losses"][1]


def test_a_joint_layer_runs_again_with_the_text_of_one_run_and_the_pixels_of_another() -> None:
    """In one sequence (single-stream blocks) as in two (double-stream ones), by the block's own attention."""
    pipe = tiny_flux()
    model = denoiser(pipe)
    given = conditions(pipe, ["a photo of a cat", "a photo of a dog"], size=(16, 16))
    noisy = torch.randn(1, *given.latent_shape, generator=torch.Generator().manual_seed(0))
    runs = []
    for prompt in (0, 1):
        with torch.no_grad(), text_layer_calls(model) as calls:
            predict(model, noisy, torch.tensor([500]), given, torch.tensor([prompt]))
        runs.append(calls)
    for name, call in runs[0].items():
        layer, text = model.get_submodule(name), runs[1][name]
        mixed, (_, named) = replace(text, pixels=call.pixels), text.text
        with torch.no_grad():
            if "single" in name:
                wanted = layer(torch.cat([text.states, call.pixels], 1), **named)[:, text.states.shape[1]:]
            else:
                wanted = layer(call.pixels, **named)[0]
            assert torch.equal(mixed.again(layer), wanted) and torch.equal(call.again(layer), call.written)
            assert not torch.equal(wanted, call.written)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_sequence_with_more_than_text_and_image_is_one_clear_error(monkeypatch) -> None:
    flux = ARCHITECTURES["FluxTransformer2DModel"]
    odd = replace(flux, layers=tuple(replace(rule, extra=1) for rule in flux.layers))
    monkeypatch.setitem(ARCHITECTURES, "FluxTransformer2DModel", odd)
    pipe = tiny_flux()
    before = snapshot(pipe)
    with pytest.raises(SettingsError, match=r"transformer_blocks\.0\.attn of this FluxTransformer2DModel has more in"):
        quick(pipe, retain_weight=0.0, **REDIRECT)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_model_is_redirected_like_a_plain_one(wrapped: bool) -> None:
    plain, pipe = tiny_sd(), tiny_sd()
    if wrapped:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    draw(pipe)  # compiled before it is trained
    expected, patch = (quick(one, preset="resteer", references=noise_images(1)) for one in (plain, pipe))
    assert patch.info["forgetting"]["losses"] == expected.info["forgetting"]["losses"]
