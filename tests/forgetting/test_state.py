"""A checkpoint belongs to one run: another one is refused, and what is lost or unfinished is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from quick import quick
from safetensors.torch import load_file, save
from snapshots import assert_unchanged, noise_images, snapshot
from tiny import tiny_sd

from fmn_nb.concepts.concept import Concept
from fmn_nb.forgetting.finetune import ForgettingError
from fmn_nb.forgetting.methods import fmn
from fmn_nb.forgetting.prompts import another_like
from fmn_nb.forgetting.state import CheckpointError
from fmn_nb.models.digests import digest
from fmn_nb.patches import LearnedTokens, Patch

LONGER = {"steps": 4, "checkpoint_every": 2, "retain_weight": 0.0}


def saved(folder: Path, images: list[Image.Image]) -> Path:
    """The images as files of a folder."""
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return folder


def test_other_reference_images_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise_images(2)
    options = {"checkpoint": tmp_path / "state", "retain_weight": 0.0}
    first = quick(tiny_sd(), references=images, **options)
    for others in (noise_images(2, seed=1), noise_images(5), images[::-1], None):
        with pytest.raises(CheckpointError, match="references: {'cat': '2 images.* there, .* here"):
            quick(tiny_sd(), references=others, **options)
    files, opened, real = saved(tmp_path / "files", images), [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: (opened.append(file), real(file))[1])
    again = quick(tiny_sd(), references=files, **options,
                  callback=lambda progress: pytest.fail("the same pictures as files are the same run"))
    assert len(opened) == 2, "each is decoded once"
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


def test_other_masks_are_another_run(tmp_path: Path) -> None:
    white, black = ([Image.new("L", (16, 16), value)] for value in (255, 0))
    options = {"references": noise_images(1), "checkpoint": tmp_path, "retain_weight": 0.0}
    quick(tiny_sd(), masks=white, **options)
    for other in (black, None):
        with pytest.raises(CheckpointError, match="masks: '1 images"):
            quick(tiny_sd(), masks=other, **options)


def test_another_noise_schedule_is_another_run(tmp_path: Path) -> None:
    pipe, options = tiny_sd(), {"references": noise_images(1), "checkpoint": tmp_path, "retain_weight": 0.0}
    quick(tiny_sd(), **options)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.05)
    with pytest.raises(CheckpointError, match="noise: 'epsilon, 1000 steps"):
        quick(pipe, **options)


def test_a_stop_that_a_callback_asked_for_is_asked_for_again(tmp_path: Path) -> None:
    options = {"references": noise_images(1), "checkpoint": tmp_path, "retain_weight": 0.0, "steps": 4}

    def enough(progress):
        return "enough" if progress.step >= 2 else None

    assert [quick(tiny_sd(), callback=enough, **options).report["steps"] for _ in range(2)] == [2, 2]
    assert quick(tiny_sd(), **options).report["steps"] == 4


def test_a_model_that_carries_a_patch_is_another_run_than_the_bare_one(tmp_path: Path) -> None:
    pipe, options = tiny_sd(), {"references": noise_images(1), "checkpoint": tmp_path / "bare", "retain_weight": 0.0}
    bare, weight = quick(pipe, **options), "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    earlier = Patch("weights", {weight: torch.full_like(pipe.unet.get_parameter(weight), 0.1).detach()})
    with earlier.applied(pipe):
        with pytest.raises(CheckpointError, match="weights: "):
            quick(pipe, **options)
        quick(pipe, **{**options, "checkpoint": tmp_path / "patched"})
    with earlier.applied(pipe, scale=0.5), pytest.raises(CheckpointError, match="weights: "):
        quick(pipe, **{**options, "checkpoint": tmp_path / "patched"})
    again = quick(pipe, **options, callback=lambda progress: pytest.fail("the patch is off: this is the bare model"))
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in bare.tensors.items())


def test_other_vectors_of_a_learned_token_are_another_run(tmp_path: Path) -> None:
    """However they got into the pipeline: for a while, or by plain diffusers for good."""
    noise = torch.Generator().manual_seed(0)
    one, two = (LearnedTokens("<toy>", (torch.randn(2, 16, generator=noise) * 0.02,)) for _ in range(2))
    options = {"references": noise_images(1), "checkpoint": tmp_path / "state", "retain_weight": 0.0}
    toy, pipe, plain = Concept("toy", phrase="<toy>"), tiny_sd(), tiny_sd()
    with one.loaded(pipe):
        quick(pipe, toy, **options)
    with two.loaded(pipe), pytest.raises(CheckpointError, match="learned_tokens: {'<toy>'"):
        quick(pipe, toy, **options)
    plain.load_textual_inversion(two.save(tmp_path / "tokens"))
    with pytest.raises(CheckpointError, match="learned_tokens: {'<toy>'"):
        quick(plain, toy, **options)
    with one.loaded(pipe):
        quick(pipe, toy, **options, callback=lambda progress: pytest.fail("the same tokens are the same run"))


def test_a_state_beyond_the_steps_asked_for_is_refused(tmp_path: Path) -> None:
    """Its patch would be that of more steps."""
    quick(tiny_sd(), **LONGER, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="is of step 4, past the 2 asked for: ask for 4 or more"):
        quick(tiny_sd(), **{**LONGER, "steps": 2}, checkpoint=tmp_path)
    assert quick(tiny_sd(), **LONGER, checkpoint=tmp_path).info["forgetting"]["stopped_because"] == "all 4 steps done"


def test_what_gives_way_belongs_to_a_run(emoji, tmp_path: Path) -> None:
    """A concept's own part of a task with others, in which "another" can't be one of these."""
    options = {"preset": "mace", "steps": 1, "checkpoint": tmp_path}
    usual = another_like(emoji, Concept("cat"))
    quick(emoji, "cat", **options)
    with pytest.raises(CheckpointError, match="guides: .* there, .* here"):
        quick(emoji, ["cat", usual], **options)


@pytest.mark.parametrize("change", [
    lambda pipe: pipe.text_encoder.get_parameter("encoder.layers.0.mlp.fc1.bias").data.add_(1),
    lambda pipe: pipe.vae.get_parameter("encoder.conv_in.bias").data.add_(1),
    lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)])
def test_what_stands_beside_the_weights_belongs_to_a_run(change, tmp_path: Path) -> None:
    pipe, options = tiny_sd(), {"references": noise_images(1), "checkpoint": tmp_path}
    quick(pipe, **options)
    with torch.no_grad():
        change(pipe)
    with pytest.raises(CheckpointError, match="beside|fingerprint|switches"):
        quick(pipe, **options)


def test_latents_that_are_lost_beside_a_state_are_drawn_again_and_other_ones_are_told(tmp_path, monkeypatch):
    whole = quick(tiny_sd(), **{**LONGER, "steps": 6})
    quick(tiny_sd(), **LONGER, checkpoint=tmp_path)
    (latents,) = (tmp_path / "latents").glob("*.safetensors")
    kept = load_file(latents)["latents"].clone()
    latents.write_bytes(latents.read_bytes()[:-8])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = quick(tiny_sd(), **{**LONGER, "steps": 6}, checkpoint=tmp_path)
    assert torch.equal(load_file(latents)["latents"], kept)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())
    monkeypatch.setattr("fmn_nb.models.digests._machine", lambda pipe: ["another one"])
    with pytest.warns(UserWarning, match="drawn anew beside the state of step 6 in .*machine"):
        quick(tiny_sd(), **{**LONGER, "steps": 6}, checkpoint=tmp_path)


def test_what_a_nan_says_to_do_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings end at the same step; a lower learning rate is another run, in another folder."""
    pipe, state, real = tiny_sd(), tmp_path / "state", fmn.resteering_loss
    options = {**LONGER, "learning_rate": 1e-2, "references": noise_images(2)}
    broken: list[float] = []

    def breaks(*args):
        broken.append(1.0)
        return real(*args) * (float("nan") if len(broken) > 3 else 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(fmn, "resteering_loss", breaks)
        before = snapshot(pipe)
        with pytest.raises(ForgettingError, match="nan in step 4") as stopped:
            quick(pipe, **options, checkpoint=state)
        assert_unchanged(pipe, before)
        said = str(stopped.value)
        assert f"last good state is step 2 in {state}" in said and "same settings would end here again" in said
        assert "lower learning_rate" in said and "another checkpoint folder, which starts anew" in said
        with pytest.raises(ForgettingError, match="there is no checkpoint.*Call forget with a lower learning_rate"):
            quick(tiny_sd(), **options)
    lower = {**options, "learning_rate": 1e-3}
    with pytest.raises(CheckpointError, match="learning_rate"):
        quick(tiny_sd(), **lower, checkpoint=state)
    assert quick(tiny_sd(), **lower, checkpoint=tmp_path / "other").info["forgetting"]["steps"] == 4


def changed(folder: Path, change) -> None:
    """Change a saved state as someone does who knows how: `change` gets its JSON and its tensors, the sum is mended."""
    said = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    file = folder / f"checkpoint-{said['step']}.safetensors"
    tensors = load_file(file)
    change(said, tensors)
    content = save(tensors)
    file.write_bytes(content)
    (folder / "checkpoint.json").write_text(json.dumps(said | {"sha256": digest([content])}), encoding="utf-8")


WEIGHT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"


@pytest.mark.parametrize("change", [
    *(lambda said, _, name=name: said.pop(name) for name in ("identity", "measured", "seconds", "latents")),
    *(lambda said, _, name=name: said.update({name: 5}) for name in ("identity", "measured", "stopped_because")),
    lambda said, _: said.update(identity=[]), lambda said, _: said.update(step="4"),
    lambda said, _: said.update(measured={}), lambda said, _: said["measured"].update(losses=[]),
    lambda said, _: said["measured"].update(masses=["x"] * 4), lambda said, _: said.update(seconds="x"),
    lambda _, tensors: tensors.pop(f"weight.{WEIGHT}"), lambda _, tensors: tensors.pop("adam.0.exp_avg"),
    lambda _, tensors: tensors.pop("random.forget.generator"), lambda _, tensors: tensors.pop("random.forget.queue"),
    lambda _, tensors: tensors.update({f"weight.{WEIGHT}": torch.ones(1)}),
    lambda _, tensors: tensors["adam.0.exp_avg"].fill_(float("nan")),
    lambda _, tensors: tensors.update({"random.forget.queue": torch.tensor([99])}),
    lambda _, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("adam.")],
    lambda _, tensors: tensors.update({"adam.999.step": torch.tensor(1.0)}),
])
def test_every_broken_part_of_a_checkpoint_is_one_error_and_the_model_stays(tmp_path: Path, change) -> None:
    pipe, options = tiny_sd(), {"references": noise_images(1), "checkpoint": tmp_path, **LONGER}
    quick(pipe, **options)
    changed(tmp_path, change)
    before = snapshot(pipe)
    with pytest.raises(CheckpointError, match=f"(?s){tmp_path}.*delete"):
        quick(pipe, **options)
    assert_unchanged(pipe, before)


def test_a_broken_file_of_a_checkpoint_is_one_error(tmp_path: Path) -> None:
    options = {"references": noise_images(1), "checkpoint": tmp_path, **LONGER}
    quick(tiny_sd(), **options)
    whole = (tmp_path / "checkpoint.json").read_text(encoding="utf-8")
    for text in ("[]", "null", "5", "{}", whole[:50], "[" * 100_000):
        (tmp_path / "checkpoint.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match="damaged"):
            quick(tiny_sd(), **options)
    said = json.loads(whole)
    (tmp_path / "checkpoint-4.safetensors").write_bytes(b"\xff" * 40)  # with a sum that fits
    (tmp_path / "checkpoint.json").write_text(json.dumps(said | {"sha256": digest([b"\xff" * 40])}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        quick(tiny_sd(), **options)


def test_flipped_bits_of_drawn_latents_end_in_the_same_patch(tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path, **LONGER}
    whole = quick(tiny_sd(), **options)
    (file,) = (tmp_path / "latents").glob("*.safetensors")
    content, drawn = file.read_bytes(), load_file(file)["latents"]
    for place in (9, 60, len(content) // 2, len(content) - 1, content.index(b"F32")):
        flipped = bytearray(content)
        flipped[place] ^= 15 if flipped[place:place + 3] == b"F32" else 4  # F32 becomes I32
        file.write_bytes(flipped)
        again = quick(tiny_sd(), **options)
        assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())
        assert torch.equal(load_file(file)["latents"], drawn), "drawn again"
