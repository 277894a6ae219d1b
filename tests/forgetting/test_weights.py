"""Which weights are trained where a user's own adapters stand beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from peft import LoHaConfig, LoraConfig
from quick import quick
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import tiny_flux, tiny_sd, tiny_sdxl

from fmn_nb.forgetting.settings import SettingsError
from fmn_nb.forgetting.weights import offloaded
from fmn_nb.models.digests import fingerprint

ADAPTERS = {"lora": LoraConfig(r=2, target_modules=["to_k", "conv_in"], init_lora_weights=False),
            "dora": LoraConfig(r=2, target_modules=["to_k"], use_dora=True),
            "loha": LoHaConfig(r=2, target_modules=["to_k"], init_weights=False)}


@pytest.mark.parametrize("train", ["denoiser", "cross_attention", "projections"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_whole_weights_are_the_models_own_by_plain_names(kind: str, train: str) -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    pipe.unet.add_adapter(ADAPTERS[kind], "style")
    before = snapshot(pipe)
    patch = quick(pipe, preset="paper", references=noise_images(1), train=train, learning_rate=1e-3)
    assert_unchanged(pipe, before)
    assert patch.changed() <= set(dict(plain.unet.named_parameters()))
    assert any(name.endswith("attn2.to_k.weight") for name in patch.changed())
    assert patch.info["base"]["fingerprint"] == fingerprint(plain)
    clean = draw(plain)
    with patch.applied(plain):
        assert (draw(plain) - clean).abs().max() > 0


def test_a_lora_is_refused_until_adapters_are_fused_and_unloaded(tmp_path: Path) -> None:
    pipe = tiny_sd()
    quick(pipe).save(tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"fuse_lora\(\) and then pipe.unload_lora_weights.*fits no other"):
            quick(pipe)
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    patch = quick(pipe)
    with patch.applied(pipe):
        pass
    with pytest.raises(ValueError, match="was made for the base model"):
        patch.apply(tiny_sd())


def test_fused_projections_are_refused_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmn_nb.forgetting.finetune.training_sets", lambda *_: pytest.fail("drawn for nothing"))
    pipe = tiny_sd()
    pipe.fuse_qkv_projections()
    with pytest.raises(SettingsError, match=r"unfuse_qkv_projections\(\)"):
        quick(pipe, "cat", references=noise_images(1))


def test_layers_that_share_a_weight_get_no_lora_and_stay_one() -> None:
    pipe = tiny_sd()
    layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    first, second = [layer for layer in layers if layer.to_k.weight.shape == layers[0].to_k.weight.shape][:2]
    second.to_k.weight = first.to_k.weight
    with pytest.raises(SettingsError, match="share one weight"):
        quick(pipe, references=noise_images(1))
    patch = quick(pipe, preset="paper", references=noise_images(1), train="cross_attention")
    with patch.applied(pipe):
        pass
    assert second.to_k.weight is first.to_k.weight


def test_a_lora_has_plain_names_where_a_part_of_the_model_is_compiled() -> None:
    pipe = tiny_sd()
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    patch = quick(pipe)
    assert any(name.startswith("mid_block.") for name in patch.changed()) and "_orig_mod" not in " ".join(patch.tensors)
    with patch.applied(pipe):
        pass


def test_an_interrupt_while_parts_go_away_loses_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sdxl()
    before, real, left = snapshot(pipe), torch.Tensor.new_empty, iter(range(3))

    def interrupt(self, *size):
        if size == (0,) and next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, *size)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", interrupt)
        with pytest.raises(KeyboardInterrupt), offloaded(pipe, "disk"):
            pytest.fail("it wasn't interrupted")
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("offload", ["model", "layers", "groups"])
@pytest.mark.parametrize("preset", ["balanced", "uce"])
def test_a_denoiser_that_moves_between_devices_is_refused_before_anything_is_drawn(offload, preset, monkeypatch):
    monkeypatch.setattr("fmn_nb.forgetting.finetune.training_sets", lambda *_: pytest.fail("drawn for nothing"))
    pipe = tiny_sd()
    if offload == "model":
        cpu_offload_with_hook(pipe.unet, "cpu")
    elif offload == "layers":
        cpu_offload(pipe.unet, torch.device("cpu"))
    else:
        pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(SettingsError, match=r"the denoiser is offloaded.*pipe\.to\(device\)"):
        quick(pipe, preset=preset)


def test_a_layers_whole_name_means_that_layer_alone_and_leaves_no_other_wrapped() -> None:
    pipe = tiny_flux()
    names = list(pipe.transformer.state_dict())
    quick(pipe, preset="joint", retain_weight=0.0, projections=("proj_out",))
    assert list(pipe.transformer.state_dict()) == names, "single blocks have layers of that name, too"
    quick(pipe, preset="joint", retain_weight=0.0)
