"""Models that aren't of the emoji world: prompt lists, a zero-shot judge, and reasons for what is skipped."""

from types import SimpleNamespace

import pytest
import torch
from judges import Puppet
from PIL import Image
from snapshots import noise_images
from tiny import clip_tokenizer, tiny_sd
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import fmn_nb as fmn
from fmn_nb.attention import AttentionBudgetError, MissedLayersError, UnknownArchitectureError
from fmn_nb.concepts import NOTHING, Concept, NotThereError
from fmn_nb.evaluation import Clip, ClipJudge, drawings
from fmn_nb.evaluation.checkpoints import CheckpointWorld, PromptListError, read_vocabulary
from fmn_nb.evaluation.clip import similar_names, similarities
from fmn_nb.evaluation.quality import Features
from fmn_nb.files import data_dir
from fmn_nb.models import ModelLoadError, ReferenceImageError


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
    return fmn.evaluate(tiny_sd(), concept, steps=1, guidance=1.0, **options)


@pytest.fixture
def features(monkeypatch):
    """Mean colours in Inception's place, whose weights may not be here."""
    class Colours(torch.nn.Module):
        num_features = 3

        def forward(self, images):
            return images.float().mean(dim=(2, 3)) / 255

    monkeypatch.setattr("fmn_nb.evaluation.checkpoints.inception_features", lambda: Features("colours", Colours(), 8))


def always_a_cat():
    return Puppet(lambda call, image: ("cat", "ink"))


def test_without_a_judge_or_anything_to_compare_with_attention_is_left(monkeypatch):
    monkeypatch.setattr("fmn_nb.evaluation.session.draw_images", lambda *_, **__: pytest.fail("drawn for nothing"))
    report = evaluate(Concept("cat"))
    assert report.before.ua is None and report.before.h is None and report.before.images == 0
    skipped = report.before.to_metrics()["skipped"]
    assert {"ua", "ira", "cra", "h", "ceiling", "frechet", "kernel", "clip_score"} == set(skipped)
    assert "name a CLIPModel (clip=FOLDER)" in skipped["ua"]
    assert "give real=FOLDER" in skipped["frechet"] and "give clip=FOLDER" in skipped["clip_score"]
    assert 0 < report.attention["mass_before"] < 1
    assert (report.table()["before"].drop("images") == "skipped").all() and len(report.skipped()) == 8


def test_distances_need_no_judge(prompts, features):
    report = evaluate(Concept("cat"), prompts=prompts, real=noise_images(4))
    found = report.before
    assert found.frechet > 0 and found.kernel is not None and found.features == "colours" and found.images == 0
    assert set(found.skipped) == {"ua", "ira", "cra", "h", "ceiling", "clip_score"}
    assert {d.role for d in report.wanted} == {"retain"} and len(report.images["before"]) == len(report.wanted)
    assert found.frechet == pytest.approx(
        evaluate(Concept("cat"), prompts=prompts, real=noise_images(4), judge=always_a_cat()).before.frechet)
    assert set(report.figures()) == {"images"} and "evaluation_seconds" in report._repr_html_()
    for wrong in (report.collateral, lambda: report.second_opinion(always_a_cat())):
        with pytest.raises(ValueError, match="no judge judged these images: evaluate with clip=FOLDER"):
            wrong()


def test_the_clip_score_needs_no_judge(clip_folder, prompts, monkeypatch):
    class Unjudged(CheckpointWorld):
        def judge_for(self, concept):
            raise NotThereError("no judge was trained")

    monkeypatch.setattr("fmn_nb.evaluation.evaluator.world_of", lambda pipe: Unjudged(clip_folder, prompts=prompts))
    found = evaluate(Concept("cat")).before
    assert 0 <= found.clip_score <= 100 and found.skipped["h"] == "no judge was trained"
    assert set(found.skipped) == {"ua", "ira", "cra", "h", "ceiling", "frechet", "kernel"}


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"real": "nowhere"}, ReferenceImageError, "'nowhere' doesn't exist"),
    ({"real": noise_images(1)}, ValueError, "at least 2 real images, not 1"),
    ({"clip": "nowhere"}, ModelLoadError, "no CLIPModel could be read from 'nowhere'"),
])
def test_what_cannot_be_read_is_named_before_anything_is_drawn(prompts, features, monkeypatch, options, error, says):
    monkeypatch.setattr("fmn_nb.evaluation.session.draw_images",
                        lambda *_, **__: pytest.fail("drawn before it was looked for"))
    with pytest.raises(error, match=says):
        evaluate(Concept("cat"), judge=always_a_cat(), prompts=prompts, **options)


def test_an_object_may_be_given_by_its_name_and_a_judge_of_ones_own_is_asked(prompts):
    options = {"judge": always_a_cat(), "prompts": prompts}
    report = evaluate("cat", **options)
    assert report.concept == Concept("cat") and report.table().equals(evaluate(Concept("cat"), **options).table())
    assert report.before.ua == 0 and report.before.ira == 0 and report.before.cra == pytest.approx(0.5)
    assert "similar" in report.before.skipped and "clip_score" in report.before.skipped
    for wrong in (None, 3, ["cat"]):
        with pytest.raises(ValueError, match="is not a concept: give one"):
            evaluate(wrong, **options)


def test_a_named_clip_judges_without_training(clip_folder, prompts, tmp_path):
    for number, image in enumerate(noise_images(4, size=(20, 30))):
        image.save(tmp_path / f"{number}.png")
    report = evaluate(Concept("cat"), clip=clip_folder, prompts=prompts, real=tmp_path)
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


def test_clip_features_have_length_one_and_scores_a_prompt_each(clip_folder):
    clip = Clip.load(clip_folder)
    images = [Image.new("RGB", (20, 12), colour) for colour in ("red", "blue", "white")]
    assert torch.allclose(clip.images(images).norm(dim=-1), torch.ones(3), atol=1e-5)
    with pytest.raises(ValueError, match="3 images but 1 prompts"):
        clip.score(images, ["a cat"])


def test_the_clip_score_is_a_mean_cosine_by_hand():
    """Of networks whose features are known: an image's is (red, green), a text's two numbers are read from it."""
    class Network(torch.nn.Module):
        config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=2))
        device = "cpu"
        visual_projection = text_projection = torch.nn.Identity()

        def vision_model(self, pixel_values):
            return SimpleNamespace(pooler_output=pixel_values)

        def text_model(self, input_ids):
            return SimpleNamespace(pooler_output=input_ids.float())

    def pixels(images, return_tensors):
        return {"pixel_values": torch.tensor([image.getpixel((0, 0))[:2] for image in images]).float()}

    def numbers(texts, **_):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()] for text in texts])}

    clip = Clip(Network(), numbers, pixels, "by hand")
    images = [Image.new("RGB", (2, 2), colour) for colour in ((30, 40, 0), (5, 0, 9), (7, 7, 0))]
    # cosines: (30 * 4 + 40 * 3) / (50 * 5) = 0.96, 5 * 3 / (5 * 5) = 0.6, and a negative one that counts as 0
    assert clip.score(images, ["4 3", "3 4", "-1 0"]) == pytest.approx(100 * (0.96 + 0.6 + 0) / 3)


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
    wanted = drawings(Concept("Elon Musk", kind="identity"), vocabulary)
    assert wanted[0].prompt == "a photo of Elon Musk" and not any("{" in d.prompt for d in wanted)
    assert 24 <= sum(d.role == "retain" for d in wanted) <= 100


def test_a_concept_that_is_in_the_list_is_not_in_the_retain_set():
    vocabulary = read_vocabulary(data_dir() / "prompts")
    for concept in (Concept("dogs"), Concept("a dog"), Concept("guide dog")):
        labels = {d.label for d in drawings(concept, vocabulary) if d.role == "retain"}
        assert "dog" not in labels and "cat" in labels
    styles = {d.style for d in drawings(Concept("van gogh", kind="style"), vocabulary)}
    assert "Vincent van Gogh" not in styles and "van gogh" in styles


def test_a_known_world_takes_no_other_real_images_or_prompts(emoji, prompts):
    for given, name in (({"real": noise_images(2)}, "real"), ({"prompts": prompts}, "prompts")):
        with pytest.raises(ValueError, match=f"the emoji world, .* leave out {name}"):
            fmn.evaluate(emoji, "cat", **given)


def test_a_prompt_list_may_begin_with_the_mark_that_windows_writes(prompts):
    path = prompts / "objects.txt"
    before = read_vocabulary(prompts).objects
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_vocabulary(prompts).objects == before


@pytest.mark.parametrize(("name", "text", "says"), [
    ("identity", "a photo of a person", "must hold {} once"), ("objects", "", "empty or repeats a line"),
    ("styles", "ink\nink", "empty or repeats a line"), ("names", None, "is missing"),
])
def test_wrong_prompt_lists_are_named(prompts, name, text, says):
    path = prompts / f"{name}.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(PromptListError, match=says):
        read_vocabulary(prompts)


@pytest.mark.parametrize(("concept", "names", "says"), [
    (Concept("ink", kind="style"), {"styles": "ink"}, "objects and styles hold too few"),
    (Concept("Ada", kind="identity"), {"names": "Ada"}, "names hold too few"),
    (Concept("watercolour cat", kind="style"), {"objects": "cat"}, "no object to draw in the style"),
])
def test_lists_with_nothing_to_compare_with_are_named_before_anything_is_drawn(prompts, monkeypatch, concept, names,
                                                                               says):
    monkeypatch.setattr("fmn_nb.evaluation.session.draw_images", lambda *_, **__: pytest.fail("drawn for nothing"))
    for name, text in names.items():
        (prompts / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        evaluate(concept, judge=always_a_cat(), prompts=prompts)


@pytest.mark.parametrize("error", [AttentionBudgetError, MissedLayersError, UnknownArchitectureError])
def test_attention_that_cant_be_heard_is_skipped_with_the_reason(prompts, monkeypatch, error):
    def deaf(*_, **__):
        raise error("too much to hear")

    monkeypatch.setattr("fmn_nb.evaluation.evaluator.record_attention", deaf)
    report = evaluate(Concept("cat"), judge=always_a_cat(), prompts=prompts)
    assert report.before.skipped["attention"] == "too much to hear" and report.before.ira == 0


def test_rows_of_few_images_stand_under_their_own_names(prompts):
    (prompts / "objects.txt").write_text("cat\nfish")
    report = evaluate(Concept("cat"), judge=always_a_cat(), prompts=prompts)
    few = sum(d.role == "retain" for d in report.wanted)
    assert few < 6 < sum(d.role == "forget" for d in report.wanted)
    assert report.figures()["images"].words.startswith(f"{2 * few} images in rows of {few}: forget set, before; retain")
