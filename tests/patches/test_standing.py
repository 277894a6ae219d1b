"""Taken off, a patch leaves exactly the user's model, whatever happened in between; else one error, and no damage."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from snapshots import draw
from tiny import tiny_sd, tiny_sd3

from fmn_nb.models import base_of, denoiser, fingerprint
from fmn_nb.models.parameters import own_parameters
from fmn_nb.patches import ChangedWeightsError, Patch, applied_patches, is_fused

PROJECTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FLOAT8 = torch.float8_e4m3fn
Step = Callable[[DiffusionPipeline], object]


def lora_of(pipe: DiffusionPipeline, seed: int, size: float = 0.1) -> Patch:
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in denoiser(pipe).named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=noise) * size
            tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=noise) * size
    return Patch("lora", tensors, {"base": base_of(pipe)})


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own LoRA, as diffusers reads it."""
    return lora_of(tiny_sd(), 7, 0.3).save(tmp_path_factory.mktemp("style"))


@pytest.fixture(scope="module")
def patch() -> Patch:
    return lora_of(tiny_sd(), 1)


def state_of(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().float() for name, (_, parameter) in own_parameters(denoiser(pipe)).items()}


def compiled(pipe: DiffusionPipeline) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def part_compiled(pipe: DiffusionPipeline) -> None:
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")


def fused(pipe: DiffusionPipeline) -> None:
    pipe.fuse_lora()


def fused_weakly(pipe: DiffusionPipeline) -> None:
    pipe.fuse_lora(lora_scale=0.7)


def unfused(pipe: DiffusionPipeline) -> None:
    pipe.unfuse_lora()


def unloaded(pipe: DiffusionPipeline) -> None:
    pipe.unload_lora_weights()


def deleted(pipe: DiffusionPipeline) -> None:
    pipe.delete_adapters("style")


def halved(pipe: DiffusionPipeline) -> None:
    pipe.to(torch.bfloat16)


def through_half(pipe: DiffusionPipeline) -> None:
    pipe.to(torch.float16).to(torch.float32)


def cast_by_layer(pipe: DiffusionPipeline) -> None:
    pipe.unet.enable_layerwise_casting(FLOAT8, torch.float32)


LOAD = "load"  # the fixture's LoRA


@pytest.mark.parametrize(("before", "between"), [
    ((), (LOAD,)), ((), (LOAD, unloaded)), ((LOAD,), (unloaded,)), ((LOAD,), (deleted,)), ((), (LOAD, deleted)),
    ((), (LOAD, fused)), ((), (LOAD, fused, unfused)), ((), (LOAD, fused, unfused, fused)), ((LOAD,), (fused_weakly,)),
    ((LOAD, fused), ()), ((LOAD, fused), (unfused,)), ((LOAD, fused), (unfused, fused)), ((LOAD, fused), (unloaded,)),
    ((), (LOAD, halved, unloaded)), ((), (halved, LOAD, fused)), ((), (compiled,)), ((compiled,), ()),
    ((), (part_compiled,)), ((), (through_half,)), ((), (cast_by_layer,)), ((), (LOAD, compiled, unloaded)),
])
def test_a_patch_taken_off_leaves_what_would_be_there_without_it(before, between, style: Path, patch: Patch) -> None:
    pipes = []
    for carries in (True, False):
        pipe = tiny_sd()

        def do(steps: tuple[Step | str, ...], pipe: DiffusionPipeline = pipe) -> None:
            for step in steps:
                pipe.load_lora_weights(style, adapter_name="style") if step == LOAD else step(pipe)

        do(before)
        if carries:
            patch.apply(pipe, force=fused in before)  # fused, it is another model
        do(between)
        if carries:
            patch.remove(pipe)
        pipes.append(pipe)
    mine, plain = (state_of(pipe) for pipe in pipes)
    assert mine.keys() == plain.keys() and not applied_patches(pipes[0])
    assert not [name for name in mine if not torch.equal(mine[name], plain[name])]
    assert torch.equal(*(draw(pipe) for pipe in pipes))


def changed_by_hand(pipe: DiffusionPipeline) -> None:
    with torch.no_grad():
        pipe.unet.get_parameter(f"{PROJECTION}.weight")[0, 0] += 1e-6


def exchanged(pipe: DiffusionPipeline) -> None:
    pipe.unet.get_submodule(PROJECTION.rpartition(".")[0]).to_k = torch.nn.Linear(16, 32, bias=False)


def gone(pipe: DiffusionPipeline) -> None:
    pipe.unet.get_submodule(PROJECTION.rpartition(".")[0]).to_k = torch.nn.Identity()


def trained(pipe: DiffusionPipeline) -> None:
    pipe.unet.load_state_dict(tiny_sd(seed=3).unet.state_dict())


def projections_fused(pipe: DiffusionPipeline) -> None:
    pipe.unet.fuse_qkv_projections()


def away(pipe: DiffusionPipeline) -> None:
    pipe.unet.to("meta")


@pytest.mark.parametrize(("meanwhile", "text"), [
    ((changed_by_hand,), "something else changed"), ((exchanged,), "something else changed"),
    ((gone,), "no longer in the model"), ((trained,), "something else changed"),
    ((projections_fused,), "unfuse_qkv_projections"), ((away,), "is offloaded"),
    ((LOAD, fused, unloaded), "something else changed"),
])
def test_what_cannot_be_undone_exactly_is_one_error_before_anything_is_touched(meanwhile, text, style, patch) -> None:
    pipe, other = tiny_sd(), lora_of(tiny_sd(), 2)
    patch.apply(pipe)
    for step in meanwhile:
        pipe.load_lora_weights(style, adapter_name="style") if step == LOAD else step(pipe)
    there = {name: parameter for name, parameter in pipe.unet.named_parameters()}
    with pytest.raises(ChangedWeightsError, match=text):
        patch.remove(pipe)
    with pytest.raises(ValueError, match=f"{text}|fused|offloaded|doesn't fit"):
        other.apply(pipe, force=True)
    assert applied_patches(pipe) == [(patch, 1.0)]
    assert all(parameter is there[name] for name, parameter in pipe.unet.named_parameters())


def test_a_deep_copy_of_a_patched_pipeline_gives_the_patch_back_and_the_original_keeps_it(patch: Patch) -> None:
    pipe, clean = tiny_sd(), draw(tiny_sd())
    patch.apply(pipe)
    twin = copy.deepcopy(pipe)
    patch.remove(twin)
    assert torch.equal(draw(twin), clean) and not torch.equal(draw(pipe), clean)
    patch.remove(pipe)
    assert torch.equal(draw(pipe), clean)


def test_fingerprint_and_further_patches_see_the_model_under_a_patch_and_an_adapter(style: Path, patch: Patch) -> None:
    pipe, second = tiny_sd(), lora_of(tiny_sd(), 2)
    known, clean = fingerprint(pipe), draw(pipe)
    with patch.applied(pipe):
        pipe.load_lora_weights(style, adapter_name="style")
        assert fingerprint(pipe) == known and base_of(pipe) == patch.info["base"]
        with second.applied(pipe, 0.5):
            pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), clean)


def exchanged_by_a_copy(pipe: DiffusionPipeline) -> None:
    pipe.unet = copy.deepcopy(pipe.unet)


def exchanged_by_another(pipe: DiffusionPipeline) -> None:
    pipe.unet = tiny_sd().unet


@pytest.mark.parametrize("exchange", [exchanged_by_a_copy, exchanged_by_another])
def test_a_patch_leaves_every_denoiser_that_it_stood_in(exchange, patch: Patch) -> None:
    pipe = tiny_sd()
    clean, first = draw(pipe), pipe.unet
    with patch.applied(pipe):
        exchange(pipe)
    assert torch.equal(draw(pipe), clean)
    pipe.unet = first
    assert torch.equal(draw(pipe), clean) and not applied_patches(pipe)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_once_unfused_again_a_model_is_the_one_it_was(make) -> None:
    pipe = make()
    known, clean = fingerprint(pipe), draw(pipe)
    name = next(name for name, _ in denoiser(pipe).named_parameters() if name.endswith("to_k.weight"))
    change = Patch("weights", {name: torch.randn(denoiser(pipe).get_parameter(name).shape)}, {"base": base_of(pipe)})
    change.apply(pipe)
    denoiser(pipe).fuse_qkv_projections()
    assert is_fused(denoiser(pipe)) and fingerprint(pipe) == known
    denoiser(pipe).unfuse_qkv_projections()
    assert not is_fused(denoiser(pipe)) and fingerprint(pipe) == known
    change.remove(pipe)
    assert torch.equal(draw(pipe), clean)
    change.apply(pipe)


def test_a_patch_put_on_in_inference_mode_can_be_trained_on(patch: Patch) -> None:
    pipe = tiny_sd()
    with torch.inference_mode():
        patch.apply(pipe)
    pipe.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 16, 16)).sample.sum().backward()
    assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_patch_taken_off_on_another_device_leaves_everything_there(patch: Patch) -> None:
    pipe = tiny_sd()
    patch.apply(pipe)
    pipe.to("cuda")
    patch.remove(pipe)
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cuda"}
    assert fingerprint(pipe) == fingerprint(tiny_sd())
