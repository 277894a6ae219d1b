"""Patches: saved and loaded, applied and removed exactly, scaled, combined, and refused where they don't belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from snapshots import assert_unchanged, draw, snapshot
from tiny import tiny_pixart, tiny_sd

from fmn_nb.inversion import LearnedTokens
from fmn_nb.models import fingerprint
from fmn_nb.patches import Patch, PatchFileError, PatchMismatchError, applied_patches, combine

PROJECTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "conv_in"


@pytest.fixture(scope="module")
def base() -> dict:
    return {"name": "tiny", "component": "unet", "fingerprint": fingerprint(tiny_sd())}


def lora(base: dict, seed: int = 0, rank: int = 3, name: str = "cat") -> Patch:
    g = torch.Generator().manual_seed(seed)
    weight = tiny_sd().unet.get_submodule(PROJECTION).weight
    tensors = {f"{PROJECTION}.lora_A.weight": torch.randn(rank, weight.shape[1], generator=g),
               f"{PROJECTION}.lora_B.weight": torch.randn(weight.shape[0], rank, generator=g) * 0.3}
    return Patch("lora", tensors, {"concepts": [{"name": name}], "base": base})


def weights(base: dict, seed: int = 1) -> Patch:
    g, unet = torch.Generator().manual_seed(seed), tiny_sd().unet
    names = [f"{PROJECTION}.weight", f"{CONVOLUTION}.weight", f"{CONVOLUTION}.bias"]
    tensors = {name: torch.randn(unet.get_parameter(name).shape, generator=g) * 0.1 for name in names}
    return Patch("weights", tensors, {"concepts": [{"name": "dog"}], "base": base})


def test_applied_changes_and_removes_bit_for_bit(base: dict) -> None:
    pipe = tiny_sd()
    before, image = snapshot(pipe), draw(pipe)
    for patch in (lora(base), weights(base)):
        with patch.applied(pipe):
            assert not torch.equal(draw(pipe), image)
        assert_unchanged(pipe, {**before, "timesteps": pipe.scheduler.timesteps, "steps": 3})
        assert torch.equal(draw(pipe), image)


def test_removed_after_an_exception(base: dict) -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    with pytest.raises(KeyboardInterrupt), lora(base).applied(pipe):
        raise KeyboardInterrupt
    assert_unchanged(pipe, before)


def test_scale_multiplies_the_difference(base: dict) -> None:
    pipe, patch = tiny_sd(), lora(base)
    own = pipe.unet.get_submodule(PROJECTION).weight.clone()
    up, down = patch.tensors[f"{PROJECTION}.lora_B.weight"], patch.tensors[f"{PROJECTION}.lora_A.weight"]
    for scale in (0.0, 0.5, 1.0, 2.0, -1.0):
        with patch.applied(pipe, scale=scale):
            torch.testing.assert_close(pipe.unet.get_submodule(PROJECTION).weight, own + scale * up @ down)
        with patch.scaled(scale).applied(pipe):
            torch.testing.assert_close(pipe.unet.get_submodule(PROJECTION).weight, own + scale * up @ down)
    with patch.applied(pipe, scale=0.0):
        assert torch.equal(pipe.unet.get_submodule(PROJECTION).weight, own)


def test_patches_stack_and_come_off_in_any_order(base: dict) -> None:
    pipe, one, two = tiny_sd(), lora(base), weights(base)
    own = pipe.unet.get_submodule(PROJECTION).weight
    with two.applied(pipe):
        only_two = pipe.unet.get_submodule(PROJECTION).weight.clone()
    one.apply(pipe)
    two.apply(pipe, 0.5)
    assert [(p is one, s) for p, s in applied_patches(pipe)] == [(True, 1.0), (False, 0.5)]
    one.remove(pipe)
    two.remove(pipe)
    two.apply(pipe)
    assert torch.equal(pipe.unet.get_submodule(PROJECTION).weight, only_two)
    assert fingerprint(pipe) == base["fingerprint"]  # so that a further patch for the base still fits
    two.remove(pipe)
    assert pipe.unet.get_submodule(PROJECTION).weight is own
    with pytest.raises(ValueError, match="not applied"):
        two.remove(pipe)


def test_removal_follows_a_pipeline_that_was_converted_meanwhile(base: dict) -> None:
    pipe, patch = tiny_sd(), lora(base)
    patch.apply(pipe)
    pipe.to(torch.float64)
    patch.remove(pipe)
    assert pipe.unet.get_submodule(PROJECTION).weight.dtype == torch.float64
    torch.testing.assert_close(pipe.unet.get_submodule(PROJECTION).weight.float(),
                               tiny_sd().unet.get_submodule(PROJECTION).weight)


@pytest.mark.parametrize("make", [lora, weights])
def test_save_and_load_give_the_same_patch(make, base: dict, tmp_path: Path) -> None:
    patch = make(base)
    loaded = Patch.load(patch.save(tmp_path / "patch"))
    assert loaded.kind == patch.kind and loaded.info == patch.info and loaded.tokens is None
    assert loaded.tensors.keys() == patch.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in patch.tensors.items())
    half = Patch.load(patch.save(tmp_path / "half", half=True))
    assert half.nbytes * 2 == patch.nbytes
    assert all(torch.equal(half.tensors[name], tensor.half()) for name, tensor in patch.tensors.items())


def test_saving_over_another_kind_leaves_one_patch(base: dict, tmp_path: Path) -> None:
    lora(base).save(tmp_path)
    weights(base).save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fmn.json", "fmn_weights.safetensors"]
    assert Patch.load(tmp_path).kind == "weights"


def test_plain_diffusers_takes_a_lora_and_draws_the_same(base: dict, tmp_path: Path) -> None:
    patch, pipe, plain = lora(base), tiny_sd(), tiny_sd()
    patch.save(tmp_path)
    untouched = draw(pipe)
    plain.load_lora_weights(tmp_path, adapter_name="forget")
    for scale in (1.0, 0.4):
        plain.set_adapters("forget", scale)
        with patch.applied(pipe, scale):
            ours = draw(pipe)
        torch.testing.assert_close(draw(plain), ours, rtol=1e-4, atol=1e-4)
        assert (ours - untouched).abs().max() > 0.01  # far above the rounding


def test_learned_tokens_are_shipped_only_when_asked_for(base: dict, tmp_path: Path) -> None:
    lora(base).save(tmp_path / "without")
    assert not (tmp_path / "without" / "learned_embeds.safetensors").exists()
    tokens = LearnedTokens("<toy>", (torch.randn(2, 16),))
    lora(base).save(tmp_path / "with", tokens=tokens)
    loaded = Patch.load(tmp_path / "with")
    assert torch.equal(loaded.tokens.vectors[0], tokens.vectors[0]) and "tokens" not in loaded.info


def test_combined_is_the_weighted_sum(base: dict) -> None:
    parts, pipe = [lora(base, 0), lora(base, 1, rank=2, name="dog")], tiny_sd()
    together = combine(parts, weights=[1.0, -0.5])
    assert together.kind == "lora" and [c["name"] for c in together.info["concepts"]] == ["cat", "dog"]
    expected = dict(parts[0].differences())[f"{PROJECTION}.weight"] - 0.5 * dict(parts[1].differences())[
        f"{PROJECTION}.weight"]
    torch.testing.assert_close(dict(together.differences())[f"{PROJECTION}.weight"], expected)
    mixed = combine([parts[0], weights(base)])
    assert mixed.kind == "weights"
    with mixed.applied(pipe):
        at_once = draw(pipe)
    with parts[0].applied(pipe), weights(base).applied(pipe):
        torch.testing.assert_close(draw(pipe), at_once, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one weight each"):
        combine(parts, weights=[1.0])
    with pytest.raises(PatchMismatchError, match="different base models"):
        combine([parts[0], lora({**base, "fingerprint": "0" * 64})])


def test_low_rank_states_its_error(base: dict) -> None:
    exact = lora(base, rank=3)
    again = exact.low_rank(3)
    assert again.info["low_rank_error"] < 1e-5
    torch.testing.assert_close(*(dict(p.differences())[f"{PROJECTION}.weight"] for p in (exact, again)))
    rough = weights(base).low_rank(2)
    lost = whole = 0.0
    near = dict(rough.differences())
    for name, difference in weights(base).differences():
        lost += (difference - near.get(name, torch.zeros_like(difference))).square().sum()
        whole += difference.square().sum()
    assert rough.info["low_rank_error"] == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)
    assert f"{CONVOLUTION}.lora_A.weight" in rough.tensors
    pipe = tiny_sd()
    own = pipe.unet.get_submodule(CONVOLUTION).weight.clone()
    with rough.applied(pipe):
        torch.testing.assert_close(pipe.unet.get_submodule(CONVOLUTION).weight, own + near[f"{CONVOLUTION}.weight"])


def test_another_base_model_is_refused_with_both_fingerprints(base: dict) -> None:
    other, patch = tiny_sd(seed=5), lora(base)
    before = snapshot(other)
    with pytest.raises(PatchMismatchError) as refused:
        patch.apply(other)
    assert base["fingerprint"] in str(refused.value) and fingerprint(other) in str(refused.value)
    assert_unchanged(other, before)
    with patch.applied(other, force=True):
        assert applied_patches(other)
    with pytest.raises(PatchMismatchError, match="changes a unet"):
        patch.apply(tiny_pixart(), force=True)


def test_shapes_that_do_not_fit_are_refused_even_by_force(base: dict) -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    for tensors in ({"conv_in.weight": torch.zeros(1, 1)}, {"no.such.weight": torch.zeros(1)}):
        with pytest.raises(PatchMismatchError, match="doesn't fit"):
            Patch("weights", tensors, {"base": base}).apply(pipe, force=True)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(PatchMismatchError, match="fused"):
        lora(base).apply(pipe)
    pipe.unet.unfuse_qkv_projections()
    assert_unchanged(pipe, {**snapshot(pipe), **{k: v for k, v in before.items() if k.endswith("weight")}})


def test_damaged_files_are_clear_errors(base: dict, tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return lora(base).save(tmp_path / name)

    with pytest.raises(PatchFileError, match="no fmn.json"):
        Patch.load(tmp_path)
    cut = fresh("cut") / "pytorch_lora_weights.safetensors"
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(PatchFileError, match="damaged"):
        Patch.load(cut.parent)
    (fresh("gone") / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(PatchFileError, match="missing"):
        Patch.load(tmp_path / "gone")
    (fresh("text") / "fmn.json").write_text("{")
    with pytest.raises(PatchFileError, match="not valid JSON"):
        Patch.load(tmp_path / "text")
    for name, change in {"schema": {"schema": 99}, "kind": {"kind": "../../etc"}, "list": None}.items():
        file = fresh(name) / "fmn.json"
        file.write_text(json.dumps(["x"] if change is None else {**json.loads(file.read_text()), **change}))
        with pytest.raises(PatchFileError, match="schema 99|doesn't describe"):
            Patch.load(file.parent)


def test_nan_never_becomes_a_patch() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Patch("weights", {"conv_in.bias": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match="'lora' or 'weights'"):
        Patch("pickle", {"x": torch.zeros(1)})
