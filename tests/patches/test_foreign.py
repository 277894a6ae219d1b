"""Anyone's patch: every format gives the change it holds, the pipeline stays as it was, and what isn't one is told."""

import json

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from tiny import tiny_flux, tiny_sd

from fmn_nb.models import ModelLoadError
from fmn_nb.patches import Patch, PatchFileError, PatchMismatchError, applied_patches, read_patch
from fmn_nb.patches import patch as patches

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
ENCODER = [f"encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def weights(pipe):
    return {f"{part}.{name}": parameter for part in ("unet", "text_encoder")
            for name, parameter in getattr(pipe, part).named_parameters()}


def factors(shape, rank=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rank, shape[1], generator=random), torch.randn(shape[0], rank, generator=random) / 100


def lora(pipe, layout, alpha=1.0):
    """A LoRA file's tensors, on one layer of the U-Net and four of the text encoder, and the changes it means."""
    tensors, changes = {}, {}
    for part, names in (("unet", [LAYER]), ("text_encoder", ENCODER)):
        for name in names:
            down, up = factors(getattr(pipe, part).get_submodule(name).weight.shape, seed=len(changes))
            full = name if part == "unet" else f"text_model.{name}"
            if layout == "kohya":
                stem = f"lora_{'unet' if part == 'unet' else 'te'}_{full.replace('.', '_')}"
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                            f"{stem}.alpha": torch.tensor(alpha)}
                changes[f"{part}.{name}.weight"] = up @ down * alpha / len(down)
            else:
                ends = {"diffusers": ("lora_A.weight", "lora_B.weight"),
                        "old": ("lora.down.weight", "lora.up.weight") if part == "unet"
                        else ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")}[layout]
                tensors |= {f"{part}.{full}.{end}": one for end, one in zip(ends, (down, up), strict=True)}
                changes[f"{part}.{name}.weight"] = up @ down
    return tensors, changes


def found(patch):
    """Every change of a patch by its part's and its own name."""
    beside = {f"{part}.{name}": change for part, own in getattr(patch, "beside", {}).items()
              for name, change in own.differences()}
    return {f"unet.{name}": change for name, change in patch.differences()} | beside


def assert_means(patch, changes, pipe):
    """The patch holds these changes, puts them on the pipeline, and takes them off it again."""
    assert found(patch).keys() == changes.keys()
    before = weights(pipe)
    with patch.applied(pipe):
        now = weights(pipe)
        for name, change in changes.items():
            assert torch.allclose(found(patch)[name], change, atol=1e-6), name
            assert torch.allclose(now[name], before[name] + change, atol=1e-6), name
    assert all(now is before[name] for name, now in weights(pipe).items())


@pytest.mark.parametrize("layout", ["diffusers", "old", "kohya"])
def test_a_lora_of_any_layout_is_its_change_of_all_parts(pipe, tmp_path, layout):
    tensors, changes = lora(pipe, layout)
    before, random = weights(pipe), torch.get_rng_state()
    save_file(tensors, tmp_path / "anything.safetensors")
    patch = read_patch(tmp_path, pipe)
    assert patch.kind == "lora" and "base" not in patch.info and torch.equal(random, torch.get_rng_state())
    assert all(now is before[name] for name, now in weights(pipe).items()) and not hasattr(pipe.unet, "peft_config")
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert_means(patch, changes, pipe)
    for refused in (lambda: patch.save(tmp_path / "out"), lambda: patch.scaled(2), lambda: patch.low_rank(1)):
        with pytest.raises(ValueError, match="also changes the text_encoder"):
            refused()


@pytest.mark.parametrize("prefix", ["unet.", "", "base_model.model."])
def test_a_lora_of_the_denoiser_alone_is_a_patch_like_ours(pipe, tmp_path, prefix):
    down, up = factors(pipe.unet.get_submodule(LAYER).weight.shape)
    save_file({f"{prefix}{LAYER}.lora_A.weight": down, f"{prefix}{LAYER}.lora_B.weight": up},
              tmp_path / "pytorch_lora_weights.safetensors")
    save_file({"x": down}, tmp_path / "optimizer.safetensors")
    patch = read_patch(tmp_path, pipe)
    assert type(patch) is Patch
    assert_means(patch, {f"unet.{LAYER}.weight": up @ down}, pipe)


@pytest.mark.parametrize("told", ["header", "peft"])
def test_a_lora_is_scaled_as_its_configuration_says(pipe, tmp_path, told):
    """Plain diffusers reads the header; from tensors alone it would take alpha to be the rank."""
    down, up = factors(pipe.unet.get_submodule(LAYER).weight.shape)
    said = {"r": 2, "lora_alpha": 8, "target_modules": [LAYER]}
    named = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    if told == "header":
        header = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"unet.{name}": value for name, value in said.items()})}
        save_file(named, tmp_path / "pytorch_lora_weights.safetensors", metadata=header)
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="plain")
        scaling = pipe.unet.get_submodule(LAYER).scaling["plain"]
        pipe.unload_lora_weights()
        assert scaling == 4
    else:
        save_file({name.replace("unet.", "base_model.model."): one for name, one in named.items()},
                  tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    assert_means(read_patch(tmp_path, pipe), {f"unet.{LAYER}.weight": 4 * up @ down}, pipe)
    said = {**said, "alpha_pattern": {LAYER.rpartition(".")[2]: 2}, "use_rslora": True}
    if told == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
        assert_means(read_patch(tmp_path, pipe), {f"unet.{LAYER}.weight": 2**0.5 * up @ down}, pipe)


def test_a_flux_lora_in_kohyas_names_is_its_change_of_the_layers_that_it_joins(tmp_path):
    flux = tiny_flux()
    block = flux.transformer.transformer_blocks[0].attn
    down, up = factors((3 * len(block.to_q.weight), block.to_q.weight.shape[1]))
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)},
              tmp_path / "kohya.safetensors")
    changes = dict(read_patch(tmp_path, flux).differences())
    wanted = (up @ down).chunk(3)
    for name, change in zip(("to_q", "to_k", "to_v"), wanted, strict=True):
        assert torch.allclose(changes[f"transformer_blocks.0.attn.{name}.weight"], change, atol=1e-5)
    assert len(changes) == 3


@pytest.mark.parametrize("prefixes", [("", "text_model."), ("unet.", "text_encoder."),
                                      ("unet.", "text_encoder.text_model.")])
def test_changed_weights_are_their_differences(pipe, tmp_path, prefixes):
    _, changes = lora(pipe, "diffusers")
    named = {name: weights(pipe)[name].detach() + change for name, change in changes.items()}
    named = {name.replace("unet.", prefixes[0]).replace("text_encoder.", prefixes[1]): value
             for name, value in named.items()}
    untouched = "mid_block.resnets.0.conv1.weight"
    positions = {"embeddings.position_ids": torch.arange(3)}
    save_file({**named, untouched: pipe.unet.get_parameter(untouched).detach().clone(), **positions},
              tmp_path / "uce.safetensors")
    patch = read_patch(tmp_path / "uce.safetensors", pipe)
    assert patch.kind == "weights"
    assert_means(patch, changes, pipe)


def test_a_whole_model_is_what_it_has_otherwise(pipe, tmp_path):
    _, changes = lora(pipe, "diffusers")
    other = tiny_sd()
    with torch.no_grad():
        for name, change in changes.items():
            weights(other)[name].add_(change)
    other.save_pretrained(tmp_path)
    assert_means(read_patch(tmp_path, pipe), changes, pipe)
    pipe.save_pretrained(tmp_path / "same")
    same = read_patch(tmp_path / "same", pipe)
    assert type(same) is Patch and not any(change.any() for _, change in same.differences())


def wider(pipe, tmp_path, name="uce.safetensors"):
    """A patch of the U-Net and the text encoder."""
    _, changes = lora(pipe, "diffusers")
    save_file({name: weights(pipe)[name].detach() + change for name, change in changes.items()}, tmp_path / name)
    return read_patch(tmp_path / name, pipe)


def test_parts_are_changed_all_or_none(pipe, tmp_path, monkeypatch):
    patch, before, real = wider(pipe, tmp_path), weights(pipe), patches.set_parameter

    def interrupt(module, name, parameter):
        if name == f"{ENCODER[2]}.weight" and parameter is not before[f"text_encoder.{name}"]:
            raise KeyboardInterrupt
        real(module, name, parameter)

    monkeypatch.setattr(patches, "set_parameter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        patch.apply(pipe)
    assert all(now is before[name] for name, now in weights(pipe).items())
    assert not applied_patches(pipe)


def test_one_of_two_patches_is_removed_and_not_the_other(pipe, tmp_path):
    one, two = wider(pipe, tmp_path), wider(pipe, tmp_path, "two.safetensors")
    before, name = weights(pipe), f"text_encoder.{ENCODER[0]}.weight"
    with two.applied(pipe, 0.5):
        wanted = weights(pipe)[name].detach().clone()
    one.apply(pipe)
    two.apply(pipe, 0.5)
    one.remove(pipe)
    assert torch.equal(weights(pipe)[name], wanted)
    two.remove(pipe)
    assert all(now is before[name] for name, now in weights(pipe).items())
    with pytest.raises(ValueError, match="is not applied to this pipeline"):
        one.remove(pipe)


def test_a_pipeline_that_is_cast_inside_the_context_is_cast_throughout_afterwards(tmp_path):
    pipe = tiny_sd()
    with wider(pipe, tmp_path).applied(pipe):
        pipe.to(torch.float16)
    assert {parameter.dtype for parameter in weights(pipe).values()} == {torch.float16}


def test_a_change_too_large_for_half_precision_is_refused(tmp_path):
    pipe = tiny_sd()
    patch = wider(pipe, tmp_path)
    pipe.to(torch.float16)
    before = weights(pipe)
    with pytest.raises(ValueError, match="infinite or NaN"):
        patch.apply(pipe, 1e9, force=True)
    assert all(now is before[name] for name, now in weights(pipe).items())


def write(folder, **tensors):
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "x.safetensors")


@pytest.mark.parametrize(("make", "error", "says"), [
    (lambda folder: None, PatchFileError, "holds no .safetensors; taken are a patch's folder"),
    (lambda folder: folder.joinpath("x.safetensors").write_bytes(b"no"), PatchFileError, "can't be read as"),
    (lambda folder: (write(folder, a=torch.ones(1)), (folder / "y.safetensors").touch()), PatchFileError,
     "several files .x.safetensors, y.safetensors.; name one"),
    (lambda folder: write(folder, a__weight=torch.ones(1)), PatchFileError, "a.weight, which isn't a weight of this"),
    (lambda folder: write(folder, conv_in__weight=torch.ones(1)), PatchMismatchError, "doesn't fit.*--model"),
    (lambda folder: write(folder, conv_in__bias=torch.full((16,), torch.nan)), PatchFileError, "NaN"),
    (lambda folder: write(folder, lora_unet_x__hada_w1_a=torch.ones(2, 2)), PatchFileError, "isn't a plain LoRA"),
    (lambda folder: write(folder, unet__x__lora_A__weight=torch.ones(2, 2), unet__x__lora_B__weight=torch.ones(2, 2)),
     PatchMismatchError, "doesn't fit|other layers"),
    (lambda folder: (folder / "model_index.json").write_text("{}"), ModelLoadError, "model_index.json"),
])
def test_what_is_no_patch_is_told_in_one_line(pipe, tmp_path, make, error, says):
    make(tmp_path)
    before = weights(pipe)
    with pytest.raises(error, match=says) as caught:
        read_patch(tmp_path, pipe)
    assert "\n" not in str(caught.value) and all(now is before[name] for name, now in weights(pipe).items())


def test_pickles_and_lone_differences_are_refused(pipe, tmp_path):
    for name, says in (("x.pt", "is pickled"), ("fmn_weights.safetensors", "holds differences"), ("", "there is no")):
        place = tmp_path / (name or "nowhere")
        if name:
            place.touch()
        with pytest.raises(PatchFileError, match=says):
            read_patch(place, pipe)
