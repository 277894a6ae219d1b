"""Patches: saved and loaded, applied and removed exactly, scaled, combined, and refused where they don't belong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from quick import quick
from safetensors.torch import load_file, save_file
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import quiet, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb.models.digests import fingerprint, weights_checksum
from fmn_nb.patches import files as patch_files
from fmn_nb.patches import patch as patches
from fmn_nb.patches.files import PatchFileError
from fmn_nb.patches.learned_tokens import LearnedTokens
from fmn_nb.patches.patch import Patch, PatchMismatchError, applied_patches, combine

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
    checksum, weight = weights_checksum(pipe), pipe.unet.get_submodule(PROJECTION).weight
    with patch.applied(pipe, scale=0.0):
        assert pipe.unet.get_submodule(PROJECTION).weight is weight and weights_checksum(pipe) == checksum
        with weights(base).applied(pipe):
            assert weights_checksum(pipe) != checksum
    with patch.applied(pipe, scale=1e-3):
        assert weights_checksum(pipe) != checksum and applied_patches(pipe) == [(patch, 1e-3)]
    assert weights_checksum(pipe.to(torch.bfloat16)) != checksum


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


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux])
def test_plain_diffusers_takes_a_lora_of_any_kind_of_model(make, tmp_path: Path) -> None:
    pipe, plain = make(), make()
    for one in (pipe, plain):
        if make is tiny_flux:
            one.default_sample_size = 4  # 4096 packed positions would only be slow
    patch = quick(pipe, train="lora", learning_rate=5e-2, retain_weight=0.0)
    patch.save(tmp_path)
    untouched = draw(pipe, steps=2)
    plain.load_lora_weights(tmp_path, adapter_name="forget")
    for scale in (1.0, 0.3):
        plain.set_adapters("forget", scale)
        with patch.applied(pipe, scale):
            ours = draw(pipe, steps=2)
        change = (ours - untouched).abs().max()
        assert change > 1e-3 and (draw(plain, steps=2) - ours).abs().max() < 0.02 * change


def test_plain_diffusers_mixes_two_loras_as_combine_does(base: dict, tmp_path: Path) -> None:
    parts, pipe, plain = {"one": lora(base, 0), "two": lora(base, 1, rank=2, name="dog")}, tiny_sd(), tiny_sd()
    for name, patch in parts.items():
        plain.load_lora_weights(patch.save(tmp_path / name), adapter_name=name)
    plain.set_adapters(["one", "two"], [1.0, -0.5])
    with combine(list(parts.values()), weights=[1.0, -0.5]).applied(pipe):
        torch.testing.assert_close(draw(plain), draw(pipe), rtol=1e-4, atol=1e-4)


def test_a_patch_goes_on_and_comes_off_beside_adapters_of_plain_diffusers(base: dict, tmp_path: Path) -> None:
    """The adapters of a LoRA from elsewhere wrap the layer whose weight the patch changes."""
    pipe, patch = tiny_sd(), lora(base, 1)
    pipe.load_lora_weights(lora(base, 0).save(tmp_path), adapter_name="other")
    with_other = draw(pipe)
    before = snapshot(pipe)
    with patch.applied(pipe):
        both = draw(pipe)
    assert torch.equal(draw(pipe), with_other) and not torch.equal(both, with_other)
    assert_unchanged(pipe, {**snapshot(pipe), **{k: v for k, v in before.items() if k.startswith("unet")}})
    pipe.unload_lora_weights()
    with combine([lora(base, 0), patch]).applied(pipe):
        torch.testing.assert_close(draw(pipe), both, rtol=1e-4, atol=1e-4)


def test_a_trained_patch_holds_changed_tensors_alone_and_says_what_it_is(tmp_path: Path) -> None:
    """What comes after the last attention layer has no influence on the loss, so the published method leaves it."""
    pipe = tiny_sd()
    patch = quick(pipe, preset="paper", references=noise_images(1), learning_rate=1e-4, seed=5)
    names = dict(pipe.unet.named_parameters())
    assert "conv_in.weight" in patch.tensors and "conv_out.weight" not in patch.tensors
    assert all(change.any() and change.shape == names[name].shape for name, change in patch.tensors.items())
    said = json.loads((patch.save(tmp_path) / "fmn.json").read_text())
    assert said["concepts"] == [{"name": "cat", "kind": "object", "phrase": "cat"}]
    assert (said["preset"], said["seed"], said["settings"]["learning_rate"]) == ("paper", 5, 1e-4)
    assert said["base"]["fingerprint"] == fingerprint(pipe) and said["versions"]["torch"]
    assert patch.report.items() <= patch.info["forgetting"].items() and "losses" not in patch.report
    assert said["forgetting"]["steps"] == patch.report["steps"] == 2
    assert said["forgetting"]["patch_bytes"] == patch.nbytes
    assert Patch.load(patch.with_metrics({"ua": 1.0}).save(tmp_path)).info["metrics"] == {"ua": 1.0}
    assert "metrics" not in patch.info


def test_half_precision_states_what_it_loses(base: dict, tmp_path: Path) -> None:
    patch = weights(base)
    half = Patch.load(patch.save(tmp_path / "half", half=True))
    lost = sum((half.tensors[name].float() - tensor).square().sum() for name, tensor in patch.tensors.items())
    whole = sum(tensor.square().sum() for tensor in patch.tensors.values())
    assert 0 < half.info["half_error"] == pytest.approx(float((lost / whole).sqrt()), rel=0.01)
    assert "half_error" not in patch.info
    with pytest.raises(ValueError, match="too large for float16"):
        patch.scaled(1e9).save(tmp_path / "large", half=True)
    assert not (tmp_path / "large").exists()
    for name, tensor in half.scaled(0.01).tensors.items():
        assert torch.equal(tensor, half.tensors[name].float() * 0.01), "no more is lost"


def test_what_json_lacks_is_refused_before_the_earlier_patch_is_touched(base, tmp_path):
    patch = weights(base)
    patch.save(tmp_path)
    for bad in (float("nan"), {"a", "set"}):
        with pytest.raises(ValueError, match=r"info\['metrics'\] can't be saved as JSON"):
            patch.scaled(2).with_metrics({"ua": bad}).save(tmp_path)
    again = Patch.load(tmp_path)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in patch.tensors.items())


def test_an_application_that_fails_half_way_leaves_the_model_as_it_was(base, monkeypatch):
    pipe, put, done = tiny_sd(), patches.set_parameter, []
    before = snapshot(pipe)

    def fails_once(*args):
        done.append(args)
        if len(done) == 2:
            raise MemoryError
        put(*args)

    monkeypatch.setattr(patches, "set_parameter", fails_once)
    with pytest.raises(MemoryError):
        weights(base).apply(pipe)
    assert len(done) > 2 and not applied_patches(pipe)
    assert_unchanged(pipe, before)


def test_learned_tokens_are_shipped_only_when_asked_for(base: dict, tmp_path: Path) -> None:
    lora(base).save(tmp_path / "without")
    assert not (tmp_path / "without" / "learned_embeds.safetensors").exists()
    tokens = LearnedTokens("<toy>", (torch.randn(2, 16),))
    lora(base).save(tmp_path / "with", tokens=tokens)
    loaded = Patch.load(tmp_path / "with")
    assert torch.equal(loaded.tokens.vectors[0], tokens.vectors[0]) and "tokens" not in loaded.info


def test_tokens_of_an_earlier_patch_do_not_stay_in_its_folder(base: dict, tmp_path: Path) -> None:
    two, one = (LearnedTokens("<toy>", tuple(torch.randn(2, 16) for _ in range(count))) for count in (2, 1))
    lora(base).save(tmp_path, tokens=two)
    lora(base).save(tmp_path, tokens=one)  # of a model with fewer text encoders
    assert len(Patch.load(tmp_path).tokens.vectors) == 1
    lora(base).save(tmp_path, tokens=two)
    lora(base).save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fmn.json", "pytorch_lora_weights.safetensors"]
    assert Patch.load(tmp_path).tokens is None
    one.save(tmp_path / "own")  # not a patch's, so nobody else's to delete
    lora(base).save(tmp_path / "own")
    assert LearnedTokens.load(tmp_path / "own").name == "<toy>"


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


def test_patches_of_one_model_in_two_places_combine(tmp_path: Path) -> None:
    parts = []
    for name in ("here", "there"):
        tiny_sd().save_pretrained(tmp_path / name)
        pipe = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / name))
        parts.append(quick(pipe, references=noise_images(1), retain_weight=0.0, seed=len(parts)))
    bases = [part.info["base"] for part in parts]
    assert bases[0]["name"] != bases[1]["name"] and bases[0]["fingerprint"] == bases[1]["fingerprint"]
    together = combine(parts)
    with together.applied(tiny_sd()):
        pass
    with pytest.raises(PatchMismatchError, match="different base models"):
        combine([parts[0], lora({**bases[0], "component": "transformer"})])


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


@pytest.mark.parametrize("make", [lambda: tiny_sd(seed=5), tiny_sdxl, tiny_pixart])
def test_another_base_model_is_refused_with_both_fingerprints(make, base: dict) -> None:
    """First: shapes and component of another kind of model don't fit either, but that isn't what is wrong."""
    other, patch = make(), lora(base)
    before = snapshot(other)
    with pytest.raises(PatchMismatchError) as refused:
        patch.apply(other)
    assert base["fingerprint"] in str(refused.value) and fingerprint(other) in str(refused.value)
    assert_unchanged(other, before)
    if make in (tiny_sdxl, tiny_pixart):
        with pytest.raises(PatchMismatchError, match="changes a unet" if make is tiny_pixart else "doesn't fit"):
            patch.apply(other, force=True)
        assert_unchanged(other, before)
    else:
        with patch.applied(other, force=True):
            assert applied_patches(other)


def test_offloaded_weights_are_told_before_they_are_read(base: dict) -> None:
    pipe = tiny_sd()
    pipe.unet.to("meta")
    with pytest.raises(PatchMismatchError, match="is offloaded"):
        lora(base).apply(pipe)


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


def test_foreign_files_are_clear_errors(base: dict, tmp_path: Path) -> None:
    """Files that are whole and say the right sum, but hold something else."""
    good = lora(base)

    def forged(name: str, tensors: dict, **said: object) -> Path:
        folder = good.save(tmp_path / name)
        file = folder / "pytorch_lora_weights.safetensors"
        if tensors:
            save_file(tensors, file)
        info = {**json.loads((folder / "fmn.json").read_text()), "sha256": patch_files.sha256(file), **said}
        (folder / "fmn.json").write_text(json.dumps(info))
        return folder

    down, up = (f"unet.{name}" for name in good.tensors)
    whole = {f"unet.{name}": tensor for name, tensor in good.tensors.items()}
    assert Patch.load(forged("good", whole)).tensors.keys() == good.tensors.keys()
    for name, tensors, said, text in (
        ("other model", {"text_encoder.weight": torch.zeros(1)}, {}, "not a patch's tensors"),
        ("half a pair", {down: whole[down]}, {}, "missing or differ in rank"),
        ("two ranks", {**whole, up: torch.zeros(16, 1)}, {}, "missing or differ in rank"),
        ("nan", {**whole, up: whole[up] * float("nan")}, {}, "NaN or infinite"),
        ("one dimension", {down: whole[down][0], up: whole[up]}, {}, "which isn't a matrix"),
        ("flat", {down: whole[down], up: whole[up][0]}, {}, "which isn't a matrix"),
        ("base", {}, {"base": "stable diffusion"}, "doesn't describe a patch"),
        ("no base", {}, {"base": None}, "its base model's component and fingerprint"),
        ("no fingerprint", {}, {"base": {"component": "unet"}}, "its base model's component and fingerprint"),
        ("no component", {}, {"base": {"fingerprint": "0" * 64}}, "its base model's component and fingerprint"),
        ("numbers", {}, {"base": {"component": "unet", "fingerprint": 5}}, "its base model's component and fing"),
        ("concepts", {}, {"concepts": "cat"}, "doesn't describe a patch"),
        ("tokens", {}, {"tokens": "<toy>"}, "can't be read as learned tokens"),
    ):
        with pytest.raises(PatchFileError, match=text):
            Patch.load(forged(name, tensors, **said))
    pickled = good.save(tmp_path / "pickled")
    torch.save(whole, pickled / "pytorch_lora_weights.safetensors")
    said = {"sha256": patch_files.sha256(pickled / "pytorch_lora_weights.safetensors")}
    (pickled / "fmn.json").write_text(json.dumps({**json.loads((pickled / "fmn.json").read_text()), **said}))
    with pytest.raises(PatchFileError, match="not a valid safetensors"):
        Patch.load(pickled)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "fmn.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PatchFileError, match="not valid JSON"):
        Patch.load(tmp_path / "binary")


def test_a_patch_that_says_no_base_model_is_not_saved(base: dict, tmp_path: Path) -> None:
    for said in ({}, {"base": {"fingerprint": base["fingerprint"]}}):
        with pytest.raises(ValueError, match="saved with its base model"):
            Patch("weights", {"conv_in.bias": torch.zeros(16)}, said).save(
                tmp_path / "patch", tokens=LearnedTokens("<toy>", (torch.randn(2, 16),)))
    assert not (tmp_path / "patch").exists()


def test_nan_never_becomes_a_patch() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Patch("weights", {"conv_in.bias": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match="'lora' or 'weights'"):
        Patch("pickle", {"x": torch.zeros(1)})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "nan", "1", b"1", True, None, 1e300])
def test_a_scale_that_is_no_finite_number_is_refused_and_nothing_changes(scale: object, base: dict) -> None:
    pipe, patch = tiny_sd(), lora(base)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="finite number|would become infinite"), patch.applied(pipe, scale):
        pass
    assert_unchanged(pipe, before)
    if scale != 1e300:
        for other in (patch.scaled, lambda factor: combine([patch], [factor])):
            with pytest.raises(ValueError, match="finite number"):
                other(scale)


@pytest.mark.parametrize(("key", "value"), [
    ("kind", []), ("sha256", 5), ("concepts", [1]), ("concepts", [{"name": 5}]), ("concepts", None),
    ("forgetting", None), ("forgetting", []), ("metrics", "x"), ("preset", {}), ("seed", "0"), ("tokens", 5),
    ("tokens_sha256", ["x"]),
    ("tokens_sha256", {"../x": "0"}), ("layout", "zip"), ("base", {"component": [], "fingerprint": "0"})])
def test_a_wrong_type_in_the_description_is_a_clear_error(key: str, value: object, base: dict, tmp_path: Path) -> None:
    file = lora(base).save(tmp_path) / "fmn.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(PatchFileError, match="doesn't describe a patch"):
        Patch.load(tmp_path)


def test_bare_mistakes_are_one_line(base: dict, tmp_path: Path) -> None:
    patch, file = lora(base), tmp_path / "file"
    file.write_text("x")
    for rank in (0, -1, 1.5, True, "4"):
        with pytest.raises(ValueError, match="rank must be a whole number from 1"):
            patch.low_rank(rank)
    for wrong in (patch, [patch, "folder"]):
        with pytest.raises(ValueError, match="takes a list of patches"):
            combine(wrong)
    for place in (file, file / "patch"):
        with pytest.raises(ValueError, match="is a file"):
            patch.save(place)
    assert file.read_text() == "x"
    with pytest.raises(ValueError, match="'diffusers' or 'kohya'"):
        patch.save(tmp_path / "new", layout="webui")
    assert not (tmp_path / "new").exists()


def test_tokens_that_came_with_a_patch_are_in_its_sum(base: dict, tmp_path: Path) -> None:
    tokens = LearnedTokens("<toy>", (torch.randn(1, 16), torch.randn(1, 16)))
    lora(base).save(tmp_path, tokens=tokens)
    assert torch.equal(Patch.load(tmp_path).tokens.vectors[1], tokens.vectors[1])
    second = tmp_path / "learned_embeds_2.safetensors"
    save_file({"<toy>": torch.randn(1, 16)}, second)
    with pytest.raises(PatchFileError, match="was changed"):
        Patch.load(tmp_path)
    second.unlink()
    with pytest.raises(PatchFileError, match="is missing"):
        Patch.load(tmp_path)


def test_every_file_has_the_mode_of_any_new_one(base: dict, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        lora(base).save(tmp_path, tokens=LearnedTokens("<toy>", (torch.randn(1, 16),)))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


def test_a_low_rank_patch_keeps_biases_and_plain_diffusers_takes_them(base: dict, tmp_path: Path) -> None:
    whole, plain, pipe = weights(base), tiny_sd(), tiny_sd()
    patch = whole.low_rank(4)
    bias = f"{CONVOLUTION}.bias"
    assert torch.equal(dict(patch.differences())[bias], whole.tensors[bias])
    assert whole.low_rank(4, biases=False).changed() == patch.changed() - {bias}
    again = Patch.load(patch.scaled(0.5).save(tmp_path))
    torch.testing.assert_close(dict(combine([again, again]).differences())[bias], whole.tensors[bias])
    plain.load_lora_weights(tmp_path)
    with again.applied(pipe):
        torch.testing.assert_close(draw(plain), draw(pipe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_other_programs_layout_is_read_by_diffusers_and_by_us(make, tmp_path: Path) -> None:
    pipe, plain = make(), make()
    patch = quick(pipe, train="lora", learning_rate=5e-2, retain_weight=0.0, rank=3)
    patch.save(tmp_path, layout="kohya")
    names = set(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert all(name.startswith("lora_unet_") and name.count(".") <= 2 for name in names)
    assert {name.partition(".")[2] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    again = Patch.load(tmp_path)
    assert again.info == patch.info and all(torch.equal(again.tensors[n], t) for n, t in patch.tensors.items())
    untouched = draw(pipe)
    plain.load_lora_weights(tmp_path)
    with patch.applied(pipe):
        ours = draw(pipe)
    torch.testing.assert_close(draw(plain), ours, rtol=1e-3, atol=1e-4)
    assert (ours - untouched).abs().max() > 1e-3


def test_what_the_layout_of_other_programs_cannot_hold_is_told(base: dict, tmp_path: Path) -> None:
    for patch, text in ((weights(base), "makes a LoRA of it"), (weights(base).low_rank(2), "no place for"),
                        (lora({**base, "component": "transformer"}), "the LoRA of a unet")):
        with pytest.raises(ValueError, match=text):
            patch.save(tmp_path / "patch", layout="kohya")
    weights(base).low_rank(2, biases=False).save(tmp_path / "patch", layout="kohya")


def test_a_patch_shows_itself_in_a_line_and_in_a_small_table(base: dict) -> None:
    many = Patch("lora", lora(base).tensors, {"concepts": [{"name": "<b>cat</b>" * 50}] * 40, "base": base})
    assert len(repr(many)) < 500 and "and 35 more" in repr(many)
    table = Patch("lora", lora(base).tensors, {"concepts": [{"name": "<b>cat</b>"}], "preset": "uce",
                                               "base": base})._repr_html_()
    assert all(said in table for said in ("&lt;b&gt;cat", "uce", "lora", "MB", "tiny (unet)")) and "<b>" not in table
    assert "nothing stated" in Patch("lora", lora(base).tensors)._repr_html_()
