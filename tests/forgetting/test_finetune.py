"""A fine-tune on its way: interrupted, broken, resumed, watched and stopped."""

from __future__ import annotations

import io
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from quick import quick
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import tiny_sd, tiny_sdxl
from tqdm import tqdm

from fmn_nb.forgetting import CheckpointError, ForgettingError, SettingsError, finetune, periodic_judge, state
from fmn_nb.forgetting.methods import fmn
from fmn_nb.models.device import MixedPrecision


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


@pytest.mark.parametrize("how", ["lora", "cross_attention"])
def test_resumed_is_the_same_as_unbroken(how: str, tmp_path: Path) -> None:
    settings = {"steps": 6, "train": how, "learning_rate": 1e-2, "checkpoint_every": 2, "warmup": 3,
                "schedule": "constant_with_warmup", "anchor_weight": 1.0, "anchor_guidance": 1.0}
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
    for name in ("losses", "masses", "retain", "anchor"):
        assert resumed.info["forgetting"][name] == whole.info["forgetting"][name]
    again = quick(tiny_sd(), **settings, checkpoint=tmp_path, callback=lambda p: pytest.fail("nothing is left to do"))
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in again.tensors.items())


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    quick(tiny_sd(), checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        quick(tiny_sd(), checkpoint=tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="fingerprint"):
        quick(tiny_sd(seed=1), checkpoint=tmp_path)
    file = tmp_path / "checkpoint-2.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        quick(tiny_sd(), checkpoint=tmp_path)


def test_a_process_that_dies_while_it_saves_leaves_the_state_before(tmp_path, monkeypatch):
    settings = {"steps": 4, "train": "cross_attention", "checkpoint_every": 2, "learning_rate": 1e-2}
    whole, write = quick(tiny_sd(), **settings), state.write_json

    def dies(path, content):
        if content.get("step") == 4:
            raise KeyboardInterrupt
        return write(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as stopped:
        patched.setattr(state, "write_json", dies)
        quick(tiny_sd(), **settings, checkpoint=tmp_path)
    assert "last good state is step 2" in stopped.value.__notes__[0], "what could not be written is none"
    assert "call forget again to continue from it" in stopped.value.__notes__[0]
    steps = []
    resumed = quick(tiny_sd(), **settings, checkpoint=tmp_path, callback=lambda p: steps.append(p.step))
    assert steps == [3, 4]
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["checkpoint-4.safetensors", "checkpoint.json", "latents"]


def test_a_gradient_or_weight_that_breaks_is_told_and_never_saved(tmp_path, monkeypatch):
    """The loss alone doesn't tell: it is measured before the step that breaks the weights."""
    pipe = tiny_sd()
    before = snapshot(pipe)
    with pytest.raises(ForgettingError, match="a weight became NaN or infinite in step 1"):
        quick(pipe, learning_rate=1.0, weight_decay=1e39, steps=1, checkpoint=tmp_path / "weights", train="projections")
    assert not list((tmp_path / "weights").glob("checkpoint-*"))
    assert_unchanged(pipe, before)
    real = fmn.resteering_loss
    # Its value is finite, its gradient isn't: the square root's at 0.
    monkeypatch.setattr(fmn, "resteering_loss", lambda *a: real(*a) + (real(*a) * 0).sqrt())
    for clip in (0.0, 1.0):
        with pytest.raises(ForgettingError, match="the gradient became nan in step 1"):
            quick(pipe, train="cross_attention", clip=clip, retain_weight=0.0)
        assert_unchanged(pipe, before)


def test_nothing_but_the_trained_weights_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    for how in ("lora", "projections", "cross_attention"):
        pipe, found = tiny_sd(), {}
        step = torch.optim.AdamW.step

        def look(self, *args, _step=step, _pipe=pipe, _found=found):
            parts = [part for part in _pipe.components.values() if isinstance(part, torch.nn.Module)]
            every = {id(p): p for part in parts for p in part.parameters()}
            _found["own"] = {id(p) for group in self.param_groups for p in group["params"]}
            _found["with a gradient"] = {i for i, p in every.items() if p.grad is not None}
            _found["asking for one"] = {id(p) for p in _pipe.unet.parameters() if p.requires_grad}
            return _step(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.AdamW, "step", look)
            quick(pipe, train=how, steps=1)
        assert found["with a gradient"] and found["with a gradient"] <= found["own"] == found["asking for one"]


def test_bfloat16_trains_in_float32_and_comes_near_to_it() -> None:
    options = {"references": noise_images(2), "train": "cross_attention", "steps": 3, "learning_rate": 1e-3}
    full = quick(tiny_sd(), **options)
    autocast = quick(tiny_sd(), **options, precision="bf16")
    half = quick(tiny_sd().to(torch.bfloat16), **options)
    for found in (autocast, half):
        assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
        losses = found.info["forgetting"]["losses"]
        assert losses == pytest.approx(full.info["forgetting"]["losses"], rel=0.05)
        assert losses != full.info["forgetting"]["losses"]
    with pytest.raises(SettingsError, match="float16 can't be trained on a CPU"):
        quick(tiny_sd(), precision="fp16")


@pytest.mark.parametrize("how", ["projections", "cross_attention", "denoiser"])
def test_whole_weights_of_a_half_precision_pipeline_need_autocast(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd().to(torch.bfloat16)
    before = snapshot(pipe)
    assert quick(pipe, train=how, retain_weight=0.0).info["forgetting"]["steps"] == 2  # "auto" is bf16 here
    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    with pytest.raises(SettingsError, match="needs a float32 pipeline.*torch.bfloat16.*or leave precision at 'auto'"):
        quick(pipe, train=how, precision="no")
    with pytest.raises(SettingsError, match=r"torch.float64: load it with dtype='float32'$"):
        quick(tiny_sd().to(torch.float64), train=how)
    assert_unchanged(pipe, before)


def test_a_loss_scaler_is_saved_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 on a GPU scales its losses, more and more; on a CPU a scaler of our own stands for it."""
    scalers = []

    class Scaled(MixedPrecision):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
            scalers.append(self.scaler)

    options = {"train": "cross_attention", "checkpoint_every": 1}
    plain = quick(tiny_sd(), **options, steps=5)
    monkeypatch.setattr(finetune, "MixedPrecision", Scaled)
    quick(tiny_sd(), **options, steps=3, checkpoint=tmp_path)
    quick(tiny_sd(), **options, steps=5, checkpoint=tmp_path)
    scaled = quick(tiny_sd(), **options, steps=5)
    assert [scaler.get_scale() for scaler in scalers] == [4.0, 8.0, 8.0]
    for name, change in plain.tensors.items():  # gradients are scaled back before they are clipped
        assert (scaled.tensors[name] - change).norm() <= 0.01 * change.norm() + 1e-6, name


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_parts_that_ran_once_wait_elsewhere_and_come_back_bit_for_bit(where: str, tmp_path: Path) -> None:
    pipe, sizes = tiny_sdxl(), []
    before, whole = snapshot(pipe), quick(tiny_sdxl(), train="cross_attention")
    real = fmn.resteering_loss

    def weights() -> int:
        parts = (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        return sum(tensor.numel() for part in parts for tensor in (*part.parameters(), *part.buffers()))

    def look(*args):
        sizes.append(weights())
        return real(*args)

    complete, images = weights(), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fmn, "resteering_loss", look)
        patch = quick(pipe, train="cross_attention", offload=where)
        assert_unchanged(pipe, before)
        assert sizes == [0 if where == "disk" else complete] * 2
        assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in patch.tensors.items())
        quick(pipe, train="cross_attention", offload=where, callback=lambda p: images.append(draw(pipe, steps=1)))
    assert len(images) == 2 and not torch.equal(images[0], images[1])

    def interrupt(progress) -> None:
        raise KeyboardInterrupt

    fresh = tiny_sdxl()
    before = snapshot(fresh)
    with pytest.raises(KeyboardInterrupt):
        quick(fresh, offload=where, callback=interrupt)
    assert_unchanged(fresh, before)


# ---- told and stopped -----------------------------------------------------------------------------------------------


def test_a_judge_is_asked_from_time_to_time_and_ends_the_fine_tune() -> None:
    pipe, shares, asked = tiny_sd(), [1.0, 0.5, 0.1], []
    own = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight

    def seen() -> float:
        now = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        asked.append(float((now - own).abs().max().detach()))
        return shares[len(asked) - 1]

    steps = []
    judge = periodic_judge(seen, every=2, below=0.2, callback=lambda p: steps.append(p.step))
    report = quick(pipe, steps=20, train="cross_attention", callback=judge).info["forgetting"]
    assert report["steps"] == 6 and steps == [1, 2, 3, 4, 5, 6]
    assert report["stopped_because"] == "the judge saw the concept in 0.100 of the images after step 6, under 0.2"
    assert 0 < asked[0] < asked[2]  # it judged the model as trained so far
    assert quick(tiny_sd(), callback=periodic_judge(lambda: 0.0, every=5)).info["forgetting"]["steps"] == 2
    stopped = quick(tiny_sd(), callback=periodic_judge(seen, callback=lambda p: "mine"))
    assert stopped.info["forgetting"]["stopped_because"] == "mine"
    with pytest.raises(SettingsError, match="every >= 1"):
        periodic_judge(seen, every=0)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        quick(tiny_sd(), callback=periodic_judge(lambda: 3, every=1))


def test_a_terminal_sees_a_bar_with_loss_and_mass_and_nothing_else_does(monkeypatch, capfd):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    quick(tiny_sd())
    assert capfd.readouterr() == ("", "")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(finetune, "tqdm", partial(tqdm, mininterval=0))  # which else skips what comes too fast
    report = quick(tiny_sd()).info["forgetting"]
    shown = screen.getvalue()
    assert "forgetting: 100%" in shown and "2/2" in shown and "mass=" in shown
    assert f"loss={report['losses'][-1]:.3g}" in shown
