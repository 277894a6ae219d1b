"""A patch knows its denoiser in any precision and whatever stands beside it, and no other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from snapshots import draw
from test_standing import cast_by_layer, lora_of
from tiny import tiny_sd, tiny_sd3

from fmn_nb.models import base_of, denoiser, fingerprint, is_base, model_name
from fmn_nb.patches import Patch, PatchMismatchError, combine

NARROW = {
    "float16": lambda pipe: pipe.to(torch.float16), "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "float16 to bfloat16": lambda pipe: pipe.to(torch.float16).to(torch.bfloat16), "float8": cast_by_layer,
    "bfloat16 to float32": lambda pipe: pipe.to(torch.bfloat16).to(torch.float32),
}


def narrow(name: str, pipe: DiffusionPipeline) -> DiffusionPipeline:
    NARROW[name](pipe)
    return pipe


@pytest.mark.parametrize("name", NARROW)
def test_precision_makes_no_other_model_and_another_denoiser_is_refused_in_each(name: str) -> None:
    patch, here = lora_of(tiny_sd(), 1), narrow(name, tiny_sd())
    with patch.applied(here):
        pass
    assert is_base(tiny_sd(), base_of(here))
    combine([patch, Patch("lora", patch.tensors, {"base": base_of(here)})])
    near = tiny_sd()
    with torch.no_grad():
        near.unet.conv_in.weight += 0.01 * torch.randn(near.unet.conv_in.weight.shape)
    for other in (near, tiny_sd(seed=5)):
        with pytest.raises(PatchMismatchError, match="another|was made for the base model"):
            patch.apply(narrow(name, other))


def test_a_single_changed_weight_is_another_model_where_both_precisions_are_whole() -> None:
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] *= 1.5
    with pytest.raises(PatchMismatchError, match="was made for the base model"):
        lora_of(tiny_sd(), 1).apply(pipe)


def test_other_parts_of_the_pipeline_make_no_other_denoiser() -> None:
    patch, pipe = lora_of(tiny_sd(), 1), tiny_sd()
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[5, 3] += 0.1
    assert fingerprint(pipe) != patch.info["base"]["fingerprint"]
    with patch.applied(pipe):
        pass
    pipe.text_encoder = pipe.tokenizer = None
    with patch.applied(pipe):
        pass


def test_a_patch_of_before_with_a_fingerprint_alone_still_fits(tmp_path: Path) -> None:
    old = {"name": "x", "component": "unet", "fingerprint": fingerprint(tiny_sd())}
    patch = Patch.load(Patch("lora", lora_of(tiny_sd(), 1).tensors, {"base": old}).save(tmp_path))
    for pipe in (tiny_sd(), tiny_sd().to(torch.float16)):
        with patch.applied(pipe):
            pass
    with pytest.raises(PatchMismatchError, match="can't tell it in bfloat16"):
        patch.apply(tiny_sd().to(torch.bfloat16))


@pytest.mark.parametrize(("make", "part"), [(tiny_sd, "unet"), (tiny_sd3, "transformer")])
def test_a_compiled_denoiser_is_the_same_model(make: Callable[[], DiffusionPipeline], part: str) -> None:
    pipe, plain = make(), make()
    setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))
    assert denoiser(pipe) is getattr(pipe, part)._orig_mod and base_of(pipe) == base_of(plain)
    name, weight = next((n, p) for n, p in denoiser(plain).named_parameters() if n.endswith("attn.to_q.weight")
                        or n.endswith("attn2.to_k.weight"))
    patch = Patch("weights", {name: torch.full_like(weight, 0.05)}, {"base": base_of(plain)})
    clean = draw(pipe, steps=1)
    with patch.applied(pipe), patch.applied(plain):
        assert torch.allclose(draw(pipe, steps=1), draw(plain, steps=1), atol=1e-6)
        assert not torch.equal(draw(pipe, steps=1), clean)
    assert torch.equal(draw(pipe, steps=1), clean)


@pytest.mark.parametrize(("said", "name"), [
    ("owner/model", "owner/model"), ("/home/me/models/toy", "toy"), ("C:\\Users\\me\\toy", "toy"),
    ("../me/toy.safetensors", "toy.safetensors"), ("/home/me/toy/", "toy"), ("", "StableDiffusionPipeline"),
])
def test_a_base_model_is_named_without_its_makers_folders(said: str, name: str, emoji) -> None:
    pipe = tiny_sd()
    pipe.register_to_config(_name_or_path=said)
    assert model_name(pipe) == name and model_name(emoji) == "emoji"


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "toy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd()
    pipe.register_to_config(_name_or_path="me/toy")
    assert model_name(pipe) == "toy"
