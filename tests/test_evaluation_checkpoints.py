"""Models that aren't of the emoji world: prompt lists, a zero-shot judge, and reasons for what is skipped."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import clip_tokenizer, tiny_sd
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import fmn_nb as fmn
from fmn_nb.concepts import Concept
from fmn_nb.emoji.judge import NOTHING, Verdict
from fmn_nb.evaluation_checkpoints import CheckpointWorld, PromptListError, read_vocabulary
from fmn_nb.evaluation_clip import Clip, ClipJudge
from fmn_nb.evaluation_neighbours import similar_names, similarities
from fmn_nb.models import ModelLoadError
from fmn_nb.paths import data_dir
from fmn_nb.protocol import drawings
from fmn_nb.worlds import NotThereError


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIPModel with random weights, as a user's folder would hold a real one."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": 16, "width": 16}
    CLIPImageProcessor(size=side, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Small prompt lists."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    lists = {"objects": "dog\ncat\nhouse", "styles": "ink\noil", "names": "Ada\nMarie",
             "identity": "a photo of {}\na portrait of {}\n\n# a remark"}
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def evaluate(concept, **options):
    pipe = tiny_sd()
    return fmn.evaluate(pipe, concept, steps=1, guidance=1.0, **options)


def test_without_a_judge_everything_but_attention_is_skipped_with_its_reason():
    report = evaluate(Concept("cat"))
    assert report.before.ua is None and report.before.h is None and report.before.images == 0
    skipped = report.before.to_metrics()["skipped"]
    assert {"ua", "ira", "cra", "h", "ceiling", "frechet", "kernel", "clip_score"} == set(skipped)
    assert "name a CLIPModel (clip=FOLDER)" in skipped["ua"]
    assert 0 < report.attention["mass_before"] < 1
    assert (report.table()["before"].drop("images") == "skipped").all() and len(report.skipped()) == 8


def test_a_named_clip_judges_without_training(clip_folder, prompts, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "real").mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "real" / f"{number}.png")
    report = evaluate(Concept("cat"), clip=clip_folder, prompts=prompts, real=tmp_path / "real")
    assert all(0 <= getattr(report.before, name) <= 1 for name in ("ua", "ira", "cra", "h"))
    assert report.before.frechet >= 0 and report.before.features and 0 <= report.before.clip_score <= 100
    assert set(report.similarity.index) == {"dog", "house"} and not report.before.skipped
    assert {"similar", "unrelated", "pair_kept", "paraphrase_ua"} <= set(report.before.probes)
    assert {d.label for d in report.wanted if d.role == "retain"} == {"dog", "house"}


def test_without_real_images_distances_alone_are_skipped(clip_folder, prompts):
    report = evaluate(Concept("Ada", kind="identity"), clip=clip_folder, prompts=prompts)
    assert set(report.before.skipped) == {"frechet", "kernel"} and "real=FOLDER" in report.before.skipped["frechet"]
    assert report.before.ua is not None


def test_a_killed_evaluation_ends_in_the_same_table(clip_folder, prompts, tmp_path):
    def once(**options):
        return evaluate(Concept("cat"), clip=clip_folder, prompts=prompts, **options)

    def kill(done, of):
        if done > of // 2:
            raise KeyboardInterrupt

    whole = once()
    with pytest.raises(KeyboardInterrupt):
        once(cache=tmp_path / "cache", progress=kill)
    assert any((tmp_path / "cache").rglob("*.png"))
    for again in (once(cache=tmp_path / "cache"), once(cache=tmp_path / "cache")):
        assert again.table().equals(whole.table()) and again.probes().equals(whole.probes())
        assert again.outcomes.equals(whole.outcomes)


def test_a_judge_of_ones_own_is_asked_instead(prompts):
    class Yes:
        def verdicts(self, images):
            return [Verdict("cat", "ink", frozenset({"cat"}), 1.0)] * len(images)

    report = evaluate(Concept("cat"), judge=Yes(), prompts=prompts)
    assert report.before.ua == 0 and report.before.ira == 0 and report.before.cra == pytest.approx(0.5)
    assert "similar" in report.before.skipped and "clip_score" in report.before.skipped


def test_a_folder_without_a_clip_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=f"no CLIPModel could be read from '{tmp_path}'"):
        Clip.load(tmp_path)


def test_clip_features_have_length_one_and_scores_their_range(clip_folder):
    clip = Clip.load(clip_folder)
    images = [Image.new("RGB", (20, 12), colour) for colour in ("red", "blue", "white")]
    assert torch.allclose(clip.images(images).norm(dim=-1), torch.ones(3), atol=1e-5)
    by_hand = (clip.images(images) * clip.texts(["a cat", "a dog", "a house"])).sum(-1).clamp(min=0).mean() * 100
    assert clip.score(images, ["a cat", "a dog", "a house"]) == pytest.approx(float(by_hand))
    with pytest.raises(ValueError, match="3 images but 1 prompts"):
        clip.score(images, ["a cat"])


def test_a_zero_shot_judge_says_what_text_is_nearest(clip_folder, prompts):
    clip = Clip.load(clip_folder)
    judge = ClipJudge(clip, Concept("cats"), read_vocabulary(prompts))
    assert judge.labels == ["dog", "house", "cats"], "the concept's own name stands for those that mean the same"
    image = Image.new("RGB", (16, 16), "red")
    known = {"a photo of a dog": "dog", "a photo of a house": "house", "a photo of a cats": "cats"}
    texts = [*known, "random noise", "an abstract texture", "a blurry image of nothing", "a plain background"]
    nearest = texts[int((clip.images([image]) @ clip.texts(texts).T).argmax())]
    (verdict,) = judge.verdicts([image])
    assert verdict.label == known.get(nearest, NOTHING) and verdict.style in ("ink", "oil")


def test_similar_names_are_the_upper_quarter(clip_folder, prompts):
    world = CheckpointWorld(clip_folder, prompts=prompts)
    likeness = similarities(world, Concept("oil", kind="style"))
    assert list(likeness.index) == ["ink"] and similar_names(likeness) == ["ink"]
    with pytest.raises(NotThereError, match="no CLIPModel was named"):
        similarities(CheckpointWorld(prompts=prompts), Concept("dog"))


def test_the_bundled_lists_are_whole_and_name_no_placeholder_wrongly():
    vocabulary = read_vocabulary(data_dir() / "prompts")
    assert len(vocabulary.objects) >= 20 and len(vocabulary.styles) >= 10 and len(vocabulary.names) >= 8
    assert vocabulary.openings[0] == "a photo of {}"
    wanted = drawings(Concept("Elon Musk", kind="identity"), vocabulary=vocabulary)
    assert wanted[0].prompt == "a photo of Elon Musk" and not any("{" in d.prompt for d in wanted)
    assert 24 <= sum(d.role == "retain" for d in wanted) <= 100


def test_a_concept_that_is_in_the_list_is_not_in_the_retain_set():
    vocabulary = read_vocabulary(data_dir() / "prompts")
    for concept in (Concept("dogs"), Concept("a dog"), Concept("guide dog")):
        labels = {d.label for d in drawings(concept, vocabulary=vocabulary) if d.role == "retain"}
        assert "dog" not in labels and "cat" in labels
    styles = {d.style for d in drawings(Concept("van gogh", kind="style"), vocabulary=vocabulary)}
    assert "Vincent van Gogh" not in styles and "van gogh" in styles


@pytest.mark.parametrize(("name", "text", "says"), [
    ("identity", "a photo of a person", "must hold {} once"), ("objects", "", "empty or says something twice"),
    ("styles", "ink\nink", "empty or says something twice"), ("names", None, "is missing"),
])
def test_wrong_prompt_lists_are_named(prompts, name, text, says):
    path = prompts / f"{name}.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(PromptListError, match=says):
        read_vocabulary(prompts)
