"""Training: resumable bit for bit, checkpoints whole, the recipe from end to end in its smoke size."""

import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel

import fmn_nb as fmn
from fmn_nb.concepts import read_prompt
from fmn_nb.concepts.world import NOTHING, world_of
from fmn_nb.emoji.judges import Judge, SecondJudge, judge_loss
from fmn_nb.emoji.scenes import Renderer, sample_scenes
from fmn_nb.emoji.training import networks, recipe
from fmn_nb.emoji.training.recipe import Plan, Pretraining, Training, generator, pretrain, trapezoid
from fmn_nb.emoji.training.request import REQUEST_FILE, Request, claim, origin
from fmn_nb.emoji.training.word_masks import WordMasks, find_words
from fmn_nb.emoji.world import MAX_TOKENS, OBJECTS, STYLES
from fmn_nb.files import data_dir


def small_training(path, steps, log=lambda line: None):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)

    def loss(step, rng):
        inputs = torch.randn(8, 4, generator=rng)
        return {"loss": (module(inputs) - inputs[:, :3]).square().mean()}

    return Training("small", module, loss, Plan(steps, 1e-2, warmup=3, seed=5), path, log)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    plan = Plan(steps=100, learning_rate=1.0, warmup=10, decay_share=0.3)
    rates = [trapezoid(step, plan) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[50] == 1 and rates[100] == 0
    assert rates[85] == pytest.approx(0.5)


def test_generators_depend_on_every_part():
    draws = {torch.randint(2**31, (1,), generator=generator(*parts)).item()
             for parts in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1))}
    assert len(draws) == 4


def test_training_lowers_the_loss(tmp_path):
    training = small_training(tmp_path / "small.safetensors", 300)
    first = training.loss(0, generator(9))["loss"].item()
    training.run()
    assert training.loss(0, generator(9))["loss"].item() < 0.2 * first


def test_a_killed_training_resumes_to_the_very_same_weights(tmp_path):
    unbroken = small_training(tmp_path / "unbroken.safetensors", 40)
    unbroken.run()
    broken = small_training(tmp_path / "broken.safetensors", 40)
    for _ in range(17):
        broken._train_step()
    broken.save()
    resumed = small_training(tmp_path / "broken.safetensors", 40)
    assert resumed.step == 17
    resumed.run()
    for one, other in zip(unbroken.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    training = small_training(path, 10)
    training._train_step()
    training.save()
    before = path.read_bytes()

    def broken_save(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fmn_nb.emoji.training.recipe.save_file", broken_save)
    with pytest.raises(OSError, match="disk full"):
        training.save()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    training = small_training(tmp_path / "small.safetensors", 10)
    training.loss = lambda step, rng: {"loss": training.module.weight.sum() * float("nan")}
    with pytest.raises(FloatingPointError, match="small: the loss is nan at step 0"):
        training.run()


def quietly(out, **request):
    return pretrain(Request(out, **request), lambda line: None)


@pytest.fixture(scope="module")
def timed_smoke(tmp_path_factory):
    """The smoke recipe's folder and the seconds of processor time it took, of all threads together."""
    started = time.process_time()
    out = quietly(tmp_path_factory.mktemp("smoke"), smoke=True)
    return out, time.process_time() - started


@pytest.fixture(scope="module")
def smoke(timed_smoke):
    return timed_smoke[0]


def test_the_smoke_recipe_takes_under_a_minute(timed_smoke):
    assert timed_smoke[1] < 120, "processor time, which other work on the machine does not change, of two cores"


def test_the_smoke_recipe_leaves_models_that_plain_libraries_load(smoke):
    pipe = StableDiffusionPipeline.from_pretrained(smoke / "emoji-diffusion", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a cat", num_inference_steps=2).images[0].size == (64, 64)
    clip = CLIPModel.from_pretrained(smoke / "emoji-clip")
    for key, tensor in pipe.text_encoder.state_dict().items():
        assert torch.equal(tensor, clip.text_model.state_dict()[key].to(tensor.dtype)), key
    judge = Judge.load(smoke / "emoji-judge")
    assert len(judge.verdicts(np.zeros((3, 64, 64, 3), np.uint8))) == 3


def test_the_smoke_recipe_leaves_half_precision_and_a_card(smoke):
    weights = load_file(smoke / "emoji-diffusion" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    card = (smoke / "emoji-diffusion" / "README.md").read_text(encoding="utf-8")
    figures = json.loads((smoke / "emoji-diffusion" / "quality.json").read_text())
    assert all(f"| {figure['name']} | {figure['value']:.3f} |" in card for figure in figures)
    assert "not met" in card, "a smoke run meets no bar, and the card must say so"


def test_stages_that_are_finished_are_not_trained_again(smoke, monkeypatch):
    """And what is noted of them stays, whatever the recipe says now."""
    (record,), lines = smoke.parent.glob(f"checkpoints/{smoke.name}/training.json"), []
    noted = record.read_text()
    monkeypatch.setattr(networks, "WORD_WEIGHT", 0.5)
    pretrain(Request(smoke, smoke=True, stages=["vae", "diffusion"]), lines.append)
    assert "diffusion: resumed at step 4 of 4" in lines and not [line for line in lines if ": step " in line]
    assert record.read_text() == noted


def test_a_finished_pipeline_can_be_trained_further(smoke, tmp_path):
    further = quietly(tmp_path / "further", smoke=True, stages=["tokenizer", "vae", "diffusion"],
                      start_from=smoke / "emoji-diffusion")
    old, new = (load_file(folder / "emoji-diffusion" / "unet" / "diffusion_pytorch_model.safetensors")
                for folder in (smoke, further))
    assert all((old[key].float() - new[key].float()).abs().max() < 0.05 for key in old), "it did not start there"
    assert any(not torch.equal(old[key], new[key]) for key in old)
    vaes = [load_file(folder / "emoji-diffusion" / "vae" / "diffusion_pytorch_model.safetensors")
            for folder in (smoke, further)]
    assert all(torch.equal(vaes[0][key], vaes[1][key]) for key in vaes[0])


def test_a_judge_can_be_trained_where_the_checkpoints_are_gone(smoke, tmp_path):
    shutil.copytree(smoke / "emoji-diffusion", tmp_path / "models" / "emoji-diffusion")
    quietly(tmp_path / "models", smoke=True, stages=["second-judge"])
    assert SecondJudge.load(tmp_path / "models" / "emoji-second-judge")
    with pytest.raises(FileNotFoundError, match="no vae in .* run the stage vae first"):
        quietly(tmp_path / "empty", smoke=True, stages=["judge"])
    shutil.copytree(smoke / "emoji-diffusion" / "vae", tmp_path / "half" / "emoji-diffusion" / "vae")
    with pytest.raises(FileNotFoundError, match="no pipeline in .* run the stage diffusion first"):
        quietly(tmp_path / "half", smoke=True, stages=["second-judge"])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, "were trained with seed 0, this training has seed 1; give another --out, or .* --restart"),
        ({"without": ["cat"]}, "were trained with without nothing, this training has without cat"),
        ({"smoke": False}, "were trained with size smoke, this training has size full"),
    ],
)
def test_checkpoints_are_never_resumed_for_another_training(tmp_path, other, says):
    first = {"smoke": True, "stages": ["tokenizer"]}
    quietly(tmp_path / "models", **first)
    with pytest.raises(ValueError, match=says):
        quietly(tmp_path / "models", **first | other)
    quietly(tmp_path / "models", **first)
    quietly(tmp_path / "models", **first | other, resume=False)
    with pytest.raises(ValueError, match="give another --out"):
        quietly(tmp_path / "models", **first)


def test_a_training_that_starts_elsewhere_has_checkpoints_of_its_own(smoke, tmp_path):
    with pytest.raises(ValueError, match="with start_from nothing, this training has start_from the pipeline in its"):
        quietly(smoke, smoke=True, start_from=smoke / "emoji-diffusion")
    with pytest.raises(FileNotFoundError, match="holds no model_index.json"):
        quietly(tmp_path / "models", smoke=True, start_from=tmp_path)
    shutil.copytree(smoke / "emoji-diffusion", tmp_path / "copy")
    assert origin(tmp_path / "copy", smoke) == origin(smoke / "emoji-diffusion", tmp_path)
    (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"others")
    assert origin(tmp_path / "copy", smoke) != origin(smoke / "emoji-diffusion", tmp_path)


def scenes_of(count):
    scenes = sample_scenes(count, 3)
    captions = [[scene.caption(random.Random(f"{number}-{i}")) for i in range(2)]
                for number, scene in enumerate(scenes)]
    return scenes, captions


def test_words_are_found_where_captions_say_them_and_masks_where_things_are(emoji):
    scenes, captions = scenes_of(30)
    renderer = Renderer(data_dir() / "sprites")
    tokens = torch.tensor([emoji.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS).input_ids
                           for texts in captions])
    words = find_words(emoji.tokenizer, scenes, tokens, renderer)
    assert {len(scene.words) for scene in scenes} == {1, 2}
    for number, scene in enumerate(scenes):
        for thing, (word, mask) in enumerate(zip(scene.words, renderer.masks(scene), strict=True)):
            for caption, text in enumerate(captions[number]):
                there = words.columns[number, caption, thing].nonzero().flatten().tolist()
                assert tuple(there) == read_prompt(emoji.tokenizer, text).find(word, 0).columns, text
            share = words.masks[number, thing].float().mean().item()
            assert share == pytest.approx(mask.mean(), abs=0.05) and share > 0
        rest = len(scene.words)
        assert not words.columns[number, :, rest:].any() and not words.masks[number, rest:].any()
    with pytest.raises(ValueError, match="caption 0 of scene 0 doesn't say"):
        find_words(emoji.tokenizer, scenes, torch.zeros_like(tokens), renderer)


def test_attention_that_lies_evenly_on_a_words_thing_has_no_divergence():
    columns = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    columns[0, 0, 0, 1:3] = True  # one thing, whose word has two columns
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    masks[0, 0, :, :8] = True
    words, none = WordMasks(columns, masks), torch.zeros(2, dtype=torch.long)

    def divergence(left, right, side=8, told=(True, True)):
        maps = torch.zeros(2, 3, side, side, 5)
        maps[:, :, :, :side // 2, 1], maps[:, :, :, side // 2:, 2] = left, right
        maps[..., 4] = 1 - maps.sum(-1)  # the other columns don't count
        return words.divergence({"one": maps.flatten(2, 3)}, none, none, torch.tensor(told)).item()

    assert divergence(0.4, 0) == pytest.approx(0, abs=1e-6)
    assert divergence(0.2, 0.2) == pytest.approx(math.log(2)), "half of it lies elsewhere"
    assert divergence(0.1, 0.3, side=16) == pytest.approx(math.log(4))
    assert divergence(0.1, 0.3, told=(False, True)) == pytest.approx(math.log(4)), "no caption, no word"
    assert divergence(0.1, 0.3, told=(False, False)) == 0
    masks[0, 0] = False
    masks[0, 0, 3, 3] = True
    even = {"one": torch.full((2, 3, 16, 5), 0.2), "other": torch.full((2, 3, 64, 5), 0.2)}
    found = words.divergence(even, none, none, torch.tensor([True, True])).item()
    assert found == pytest.approx((math.log(16) + math.log(64)) / 2), "each layer at its own resolution"


def test_the_denoiser_learns_from_the_noise_and_from_where_words_attend(emoji):
    scenes, _ = scenes_of(8)
    renderer = Renderer(data_dir() / "sprites")
    data = networks.prepare_latents(emoji.vae, emoji.tokenizer, scenes, renderer.images(scenes), 0)
    words = find_words(emoji.tokenizer, scenes, data.tokens, renderer)
    torch.manual_seed(0)
    denoiser = networks.Denoiser(networks.new_text_encoder(emoji.tokenizer), networks.new_unet())
    empty = torch.tensor(emoji.tokenizer("", padding="max_length", max_length=MAX_TOKENS).input_ids)
    losses = [networks.denoising_loss(denoiser, data, known, empty, 8)(0, generator(0))
              for known in (words, WordMasks(words.columns & False, words.masks))]
    assert losses[0]["divergence"].item() > 1, "words attend everywhere in an untrained model"
    assert losses[1]["divergence"].item() == 0 and losses[0]["error"] == losses[1]["error"]
    added = losses[0]["loss"] - losses[1]["loss"]
    torch.testing.assert_close(added, networks.WORD_WEIGHT * losses[0]["divergence"])
    added.backward()
    layer = denoiser.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    assert layer.to_q.weight.grad.abs().max() > 0, "so words can learn where to attend"


def test_checkpoints_of_which_nothing_is_noted_are_left_alone(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    claim(tmp_path, {"seed": 0})
    (tmp_path / REQUEST_FILE).unlink()
    (tmp_path / "vae.safetensors").touch()
    with pytest.raises(ValueError, match="don't say what they were trained with.*delete the folder"):
        claim(tmp_path, {"seed": 0})
    assert not (tmp_path / REQUEST_FILE).exists()


@pytest.mark.parametrize(("kind", "names"), [("6 styles", STYLES), ("24 objects", OBJECTS)])
def test_a_world_of_which_nothing_is_left_is_refused(kind, names):
    with pytest.raises(ValueError, match=f"all {kind} are left out, so no scene is left"):
        Request(without=tuple(names))


def test_the_checksums_are_written_anew_however_the_data_folder_is_named(tmp_path, monkeypatch):
    summed = []
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "data_dir", lambda: tmp_path / "data")
    monkeypatch.setattr(recipe, "write_checksums", summed.append)
    for out in (Path("data"), Path("other")):
        quietly(out, stages=["sprites"])
    assert summed == [Path("data")]


def test_wrong_stages_and_names_are_answered_before_any_work():
    with pytest.raises(ValueError, match="unknown stages: judges; choose from sprites, tokenizer"):
        Request(stages=["judges"])
    with pytest.raises(ValueError, match="the emoji world has no 'unicorn'; it has: cat"):
        Request(without=["unicorn"])


def test_an_oracle_sees_no_scene_of_its_concept():
    scenes = Pretraining(Request(without=("cat",), smoke=True)).scenes
    assert scenes and not [scene for scene in scenes if "cat" in scene.labels or "Milo" in scene.labels]


def test_an_oracle_and_its_copies_are_of_the_emoji_world(world, tmp_path, recwarn, capfd):
    """Also where another library saved them, and nothing warns of the line that says so."""
    folder = quietly(tmp_path / "oracle", smoke=True, without=["cat"], stages=["diffusion"]) / "emoji-diffusion"
    assert world_of(fmn.load(str(folder), device="cpu")) is world
    StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).save_pretrained(tmp_path / "copy")
    assert world_of(fmn.load(str(tmp_path / "copy"), device="cpu")) is world
    assert "_world" not in "".join([*(str(one.message) for one in recwarn), *capfd.readouterr()])


def test_an_untrained_judge_can_answer_nothing():
    judge = Judge()
    torch.nn.init.constant_(judge.label_head.bias, -50)
    verdict = judge.verdicts(np.zeros((1, 64, 64, 3), np.uint8))[0]
    assert verdict.label == NOTHING and verdict.seen == frozenset()


def test_a_judge_may_see_its_images_moved_by_some_pixels():
    images = np.zeros((1, 64, 64, 3), np.uint8)
    images[0, 30, 40] = 255
    seen = []

    def watch(pixels):
        seen.append(pixels.clone())
        return torch.zeros(len(pixels), 2, requires_grad=True), torch.zeros(len(pixels), 6, requires_grad=True)

    for shift in (0, 3):
        loss = judge_loss(watch, images, torch.zeros(1, 2), torch.tensor([0]), 8, shift)
        loss(0, torch.Generator().manual_seed(0))
    places = [{tuple(divmod(int(image[0].argmax()), 64)) for image in batch[4:]} for batch in seen]  # half are noisy
    assert places[0] == {(30, 40)}
    assert len(places[1]) > 1 and all(abs(y - 30) <= 3 and abs(x - 40) <= 3 for y, x in places[1])


def test_the_second_judge_is_of_another_architecture_and_answers_alike(smoke):
    second = SecondJudge.load(smoke / "emoji-second-judge")
    assert not [module for module in second.blocks.modules() if isinstance(module, torch.nn.Conv2d)]
    verdicts = second.verdicts(np.zeros((3, 64, 64, 3), np.uint8))
    assert len(verdicts) == 3 and {verdict.style for verdict in verdicts} <= set(second.config.styles)
    features = second.features(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, second.label_head.in_features)
    with pytest.raises(FileNotFoundError, match="fmn-nb pretrain --stages second-judge"):
        SecondJudge.load(smoke / "nowhere")


def test_a_restart_removes_nothing_but_a_trainings_own_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = Request(Path("."), smoke=True).work
    assert work == tmp_path.parent / "checkpoints" / tmp_path.name and Request(Path("..")).work.name != ".."
    kept = Request(tmp_path / "models", smoke=True, resume=False, stages=["tokenizer"]).work / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    pretrain(Request(tmp_path / "models", smoke=True, resume=False, stages=["tokenizer"]), log=lambda line: None)
    assert kept.read_text() == "mine"
