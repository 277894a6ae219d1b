"""The bundled models as they are committed: plain libraries load them, and they know their world."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import tiny_sd
from transformers import CLIPModel

from fmn_nb.concepts.world import vocabulary_of, world_of
from fmn_nb.emoji.scenes import sample_scenes
from fmn_nb.emoji.training.card import Figure, Quality
from fmn_nb.emoji.training.networks import through_vae
from fmn_nb.emoji.training.recipe import redraw, telling_caption
from fmn_nb.emoji.world import IDENTITIES, MAX_TOKENS, OBJECTS, VOCABULARY, caption
from fmn_nb.evaluation.quality import frechet_distance
from fmn_nb.files import data_dir
from fmn_nb.models.images import generate

MOST_BYTES = 30_000_000
MODELS = ("emoji-diffusion", "emoji-clip", "emoji-judge", "emoji-second-judge")


def test_the_models_are_small_safetensors_in_half_precision():
    files = [path for name in MODELS for path in (data_dir() / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_plain_diffusers_loads_the_pipeline_and_draws():
    plain = StableDiffusionPipeline.from_pretrained(data_dir() / "emoji-diffusion", safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    image = plain("a photo of a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert plain.tokenizer.model_max_length == MAX_TOKENS
    resolutions = [block for block in plain.unet.config.down_block_types if block.startswith("CrossAttn")]
    assert len(resolutions) == 3 and plain.unet.config.sample_size == 16


def test_the_clip_shares_the_pipelines_text_encoder(emoji):
    clip = CLIPModel.from_pretrained(data_dir() / "emoji-clip", dtype=torch.float32)
    for key, tensor in emoji.text_encoder.state_dict().items():
        assert torch.equal(tensor, clip.text_model.state_dict()[key]), key


def test_same_seed_same_pixels(emoji):
    prompts = ["a photo of a cat", "a photo of a frog in the style of noto"]
    first, again, other = (generate(emoji, prompts, seeds, steps=3) for seeds in ((1, 2), (1, 2), (1, 3)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("which, least", [("judge", 0.95), ("second_judge", 0.93)])
def test_the_judges_know_held_out_scenes_sharp_and_through_the_vae(emoji, world, which, least):
    """Every object of a scene, one or two, and no other; the second judge only checks the first."""
    judge = getattr(world, which)
    scenes = sample_scenes(150, seed=7, held_out=True)
    images = world.renderer.images(scenes)
    for pixels in (images, through_vae(emoji.vae, images)):
        verdicts = judge.verdicts(pixels)
        assert np.mean([v.seen == set(s.labels) for s, v in zip(scenes, verdicts, strict=True)]) > least
        assert np.mean([v.style == s.style for s, v in zip(scenes, verdicts, strict=True)]) > 0.93


def test_the_judge_calls_rubble_nothing(judge):
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    assert np.mean([v.label == "nothing" for v in judge.verdicts(noise)]) > 0.9


def test_drawn_objects_and_names_are_mostly_recognised(emoji, judge):
    names = [*list(OBJECTS)[::3], *IDENTITIES]
    prompts = [caption([name], None if name in IDENTITIES else "noto") for name in names]
    verdicts = judge.verdicts(generate(emoji, prompts, range(len(prompts)), steps=15))
    assert np.mean([v.label == name for v, name in zip(verdicts, names, strict=True)]) >= 0.7


def test_clip_prefers_the_right_caption_and_distances_the_same_images(world):
    scenes = sample_scenes(60, seed=3, held_out=True, sorts={"single": 1.0})
    images = world.renderer.images(scenes)
    right = [caption(scene.words, scene.style) for scene in scenes]
    assert world.scorer.score(images, right) > 10 + world.scorer.score(images, right[7:] + right[:7])
    same, far = (frechet_distance(world.features, images, other) for other in (images, 255 - images))
    assert same < 0.01 * far


def test_the_card_is_what_its_records_say():
    quality = Quality(data_dir(), data_dir() / "sprites")
    records = json.loads((quality.folder / "quality.json").read_text())
    figures = [Figure.of(record) for record in records]
    assert [figure.record for figure in figures] == records
    training = json.loads((quality.folder / "training.json").read_text())
    assert (quality.folder / "README.md").read_text(encoding="utf-8") == quality.text(figures, training)


def test_other_models_are_not_taken_for_the_emoji_world(world, tmp_path):
    tiny = tiny_sd()
    tiny.save_pretrained(tmp_path)
    assert world is not None and world_of(tiny) is None and vocabulary_of(tmp_path) is None
    assert vocabulary_of(data_dir() / "emoji-diffusion") is VOCABULARY


def test_scenes_drawn_again_are_the_models_own_and_show_the_same(emoji, world):
    scenes = sample_scenes(8, 3, held_out=True)
    images = world.renderer.images(scenes)
    redrawn = redraw(emoji, images, scenes, seed=0)
    assert redrawn.shape == images.shape and redrawn.dtype == np.uint8
    assert min(np.abs(redrawn.astype(float) - images).mean(axis=(1, 2, 3))) > 3, "an image came back as it was"
    assert sum(v.seen == set(s.labels) for v, s in zip(world.judge.verdicts(redrawn), scenes, strict=True)) >= 7
    assert np.array_equal(redraw(emoji, images[:8], scenes, seed=0), redrawn)


def test_a_scene_is_described_by_its_reading_and_by_its_style_where_it_has_one():
    scenes = sample_scenes(400, 0)
    said = [telling_caption(scene) for scene in scenes]
    for scene, text in zip(scenes, said, strict=True):
        assert all(label in text for label in scene.labels) and scene.background in text
        assert (f"in the style of {scene.style}" in text) == (scene.sort != "identity")
    assert {scene.sort for scene in scenes} == {"single", "pair", "identity", "ambiguous"}
