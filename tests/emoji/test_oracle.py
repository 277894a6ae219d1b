"""Oracles: what they leave out, which parts are the emoji model's, their folder of differences, their card."""

import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import fmn_nb as fmn
from fmn_nb.concepts import Concept, untaught_of, world_of
from fmn_nb.emoji.organism import held_out_scenes, never_taught, untaught_by
from fmn_nb.emoji.training.card import Quality
from fmn_nb.emoji.training.oracle import take_parts, write_oracle
from fmn_nb.emoji.training.recipe import Pretraining, pretrain
from fmn_nb.emoji.training.request import Request
from fmn_nb.emoji.world import OBJECTS
from fmn_nb.files import bundled_models, data_dir
from fmn_nb.models import ModelLoadError, UnknownModelError, fingerprint

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_what_goes_with_a_concept_is_untaught_too():
    assert untaught_by(["cat", "Bruno"]) == ("cat", "Milo", "Luna", "Bruno")
    assert untaught_by(["twemoji"]) == ("twemoji", "Luna", "Rex"), "whose one drawing is in that style"
    assert untaught_by(["wild bat"]) == ("wild bat",), "the word keeps its other reading"
    assert untaught_by(["bat"]) == ("bat", "wild bat", "cricket bat") and untaught_by([]) == ()


def test_the_untaught_are_shown_by_no_training_scene_and_all_else_is():
    without = ("cat", "fluent", "Bruno", "wild bat")
    scenes = Pretraining(Request(without=without)).scenes
    shown = {label for scene in scenes for label in (*scene.labels, scene.style)}
    everything = set(fmn.emoji.world.VOCABULARY.concepts()) - {"mouse", "bow", "bat"}
    assert everything - shown == set(untaught_by(without))
    assert "bat" in {word for scene in scenes for word in scene.words}
    assert not [p for p in held_out_scenes(20, without=without)[1] if "cat" in p.split() or "fluent" in p]
    with pytest.raises(ValueError, match="leave less out"):
        held_out_scenes(1, holding="cat", without=[one for one in OBJECTS if one != "cat"])


def test_an_oracle_has_the_emoji_models_tokenizer_and_vae(oracle_folder, emoji):
    whole, own = oracle_folder.parent / "emoji-diffusion", bundled_models()["emoji"]
    for part in (f"vae/{WEIGHTS}", "tokenizer/tokenizer.json"):
        assert (whole / part).read_bytes() == (own / part).read_bytes()
    assert sorted(path.name for path in oracle_folder.iterdir()) == ["model_index.json", "text_encoder", "unet"]
    one, other = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (oracle_folder, own))
    assert any(not torch.equal(one[name], other[name]) for name in one), "it is the oracle's own"


def test_its_weights_are_those_of_the_diffusion_stage_with_these_parts(oracle_folder, tmp_path):
    """The stage alone, as it always was, in a folder in which the parts lie as checkpoints."""
    request = Request(tmp_path / "o", smoke=True, without=("cat", "fluent"), stages=["diffusion"])
    for part in ("tokenizer", "vae"):
        shutil.copytree(bundled_models()["emoji"] / part, request.work / part)
    pretrain(request, lambda line: None)
    for name in (f"unet/{WEIGHTS}", "text_encoder/model.safetensors"):
        assert (tmp_path / "o" / "emoji-diffusion" / name).read_bytes() == (oracle_folder / name).read_bytes()


def test_the_folder_of_differences_draws_what_the_whole_one_draws(oracle_folder, world):
    pipe, whole = (fmn.load(str(folder), device="cpu")
                   for folder in (oracle_folder, oracle_folder.parent / "emoji-diffusion"))
    pictures = [fmn.generate(one, ["a frog"], [0], steps=1)[0].tobytes() for one in (pipe, whole)]
    assert pictures[0] == pictures[1]
    assert pipe.vae.config.scaling_factor == whole.vae.config.scaling_factor
    assert world_of(pipe) is world and untaught_of(pipe) == ("cat", "fluent", "Milo", "Luna")


def test_a_model_says_what_it_never_learned(oracle, emoji):
    assert never_taught(oracle, Concept("cat")) and never_taught(oracle, Concept("fluent", kind="style"))
    assert not never_taught(oracle, Concept("frog")) and not never_taught(emoji, Concept("cat"))
    oracle.unet.register_to_config(_untaught=["wild bat"])
    try:
        assert never_taught(oracle, Concept("bat")), "first of all a wild bat"
        assert not never_taught(oracle, Concept("cricket bat"))
    finally:
        oracle.unet.register_to_config(_untaught=["cat", "fluent", "Milo", "Luna"])


def test_where_the_rest_is_missing_it_says_so(oracle_folder, tmp_path):
    folder = shutil.copytree(oracle_folder, tmp_path / "lost")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_rest": {"of": "nothing"}}))
    with pytest.raises(ModelLoadError, match="leaves its other parts to the bundled model 'nothing', which isn't"):
        fmn.load(str(folder))


@pytest.mark.parametrize("name, flags", [
    ("emoji-oracle", "--without .cat,.*then copy"), ("emoji-joint", "--organism joint"),
    ("emoji-grounded", "--organism grounded"), ("emoji-oracle-grounded", "--organism grounded --without .cat,")])
def test_a_bundled_model_that_is_not_there_yet_says_how_to_train_it(name, flags, monkeypatch):
    monkeypatch.setattr("fmn_nb.models.names.bundled", dict)
    with pytest.raises(UnknownModelError, match=f"'{name}' isn't there yet; train it with: fmn-nb pretrain {flags}"):
        fmn.load(name)


@pytest.mark.skipif(not (data_dir() / "emoji-oracle").is_dir(), reason="the oracle isn't in data/")
def test_the_bundled_oracle_never_learned_what_its_card_says():
    pipe = fmn.load("emoji-oracle", device="cpu")
    assert never_taught(pipe, Concept("cat")) and not never_taught(pipe, Concept("frog"))
    size = sum(path.stat().st_size for path in (data_dir() / "emoji-oracle").rglob("*.safetensors"))
    assert size < 10.5e6, "what differs alone"
    card = (data_dir() / "emoji-oracle" / "README.md").read_text(encoding="utf-8")
    assert f"> {', '.join(untaught_of(pipe))}." in " ".join(card.split()), "its card lists them"
    figures = json.loads((data_dir() / "emoji-oracle" / "quality.json").read_text())
    assert all(figure["met"] for figure in figures), "what it was taught it draws"
    assert "attention: pointing game" in {figure["name"] for figure in figures}


def test_the_oracle_of_another_seed_meets_every_bar_and_never_learned_the_same():
    folder = data_dir() / "results" / "oracle-seed-0"
    figures = json.loads((folder / "quality.json").read_text())
    assert all(figure["met"] for figure in figures) and "attention: pointing game" in {one["name"] for one in figures}
    other = fmn.load(str(folder / "weights"), device="cpu")
    assert untaught_of(other) == untaught_of(fmn.load("emoji-oracle", device="cpu"))
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 10.5e6, "what differs alone"
    untaught = pd.read_csv(folder / "untaught.csv")
    assert tuple(untaught["word"]) == untaught_of(other) and not untaught["oracle"].any()


@pytest.mark.parametrize("name, seed", [("emoji-oracle", 1), ("data/results/oracle-seed-0/weights", 0)])
def test_the_curves_of_an_oracle_are_of_these_weights(name, seed, monkeypatch):
    monkeypatch.chdir(data_dir().parent)
    attacked = json.loads((data_dir() / "results" / f"oracle-seed-{seed}" / "attack-budgets.json").read_text())
    assert attacked["oracles"] == [fingerprint(fmn.load(name, device="cpu"))[:16]]
    fixed = json.loads((data_dir() / "results" / "attack-budgets.json").read_text())
    assert {attack: found["budgets"] for attack, found in attacked["attacks"].items()} == {
        attack: found["budgets"] for attack, found in fixed["attacks"].items()}, "they'd fix the same budgets"


def test_an_oracle_may_keep_the_text_encoder_that_saw_the_words(tmp_path):
    pretrain(Request(tmp_path / "o", smoke=True, without=["cat"], keep_text_encoder=True, stages=["diffusion"]),
             lambda line: None)
    one, own = (load_file(folder / "text_encoder" / "model.safetensors")
                for folder in (tmp_path / "o" / "emoji-diffusion", bundled_models()["emoji"]))
    assert all(torch.equal(one[name], own[name]) for name in own)
    with pytest.raises(ValueError, match="text_encoder the emoji model's, this training has text_encoder nothing"):
        pretrain(Request(tmp_path / "o", smoke=True, without=["cat"], stages=["diffusion"]), lambda line: None)
    with pytest.raises(ValueError, match="only an oracle of the emoji model, trained from scratch, keeps"):
        Request(keep_text_encoder=True)


def test_an_oracle_never_takes_the_emoji_models_place():
    with pytest.raises(ValueError, match="would take the emoji model's place .* copy its folder emoji-oracle"):
        Request(data_dir(), without=["cat"])


def test_parts_that_are_there_stay(tmp_path):
    assert take_parts(tmp_path, ["vae"]) == ["vae"]
    (tmp_path / "vae" / "config.json").write_text("mine")
    assert take_parts(tmp_path, ["vae"]) == [] and (tmp_path / "vae" / "config.json").read_text() == "mine"


def test_the_card_says_what_was_left_out_and_measures_only_the_rest(oracle_folder, tmp_path):
    data = tmp_path / "models"
    shutil.copytree(oracle_folder.parent / "emoji-diffusion", data / "emoji-diffusion")
    asked = []
    quality = Quality(data, data_dir() / "sprites", 200, 1, lambda line: None, ("fluent", "wild bat"))
    judged = quality._judged
    quality._judged = lambda purpose, wanted: asked.extend(wanted) or judged(purpose, wanted)
    folder = write_oracle(quality, {"diffusion": {"steps": 4, "seconds": 1}},
                          Request(data, smoke=True, without=["fluent", "wild bat"]))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "> fluent, wild bat." in card and "never saw their words" in card and "are the emoji model's" in card
    assert "| fluent | style |" in card and "'bat': the reading that was taught" in card and "not met" in card
    assert asked and not [one for one in asked if "fluent" in (*one[0], one[1])]
    assert (folder / "images" / "untaught.png").is_file()
    assert untaught_of(fmn.load(str(folder), device="cpu")) == ("fluent", "wild bat")
    assert max(map(len, card.splitlines())) <= 120 or "|" in max(card.splitlines(), key=len)
