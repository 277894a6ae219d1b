"""The emoji world: names, sprites, captions, scenes and their masks, the tokenizer."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fmn_nb.emoji import AMBIGUOUS, IDENTITIES, IMAGE_SIZE, OBJECTS, STYLES, caption
from fmn_nb.emoji.scenes import SPRITE_SIZE, Renderer, load_sprites, sample_scenes, silhouette, sprite_names, svg_of
from fmn_nb.emoji.training.networks import train_tokenizer
from fmn_nb.emoji.world import BACKGROUNDS, LABELS, MAX_TOKENS, OPENINGS, random_caption
from fmn_nb.files import data_dir


@pytest.fixture(scope="module")
def renderer():
    return Renderer(data_dir() / "sprites")


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(400, seed=0)


def test_the_world_is_large_enough_and_names_are_distinct():
    assert len(OBJECTS) >= 24 and len(STYLES) >= 6 and len(IDENTITIES) >= 4 and len(AMBIGUOUS) >= 3
    assert len(set(LABELS)) == len(LABELS)
    assert all(sum(r.share for r in readings) == pytest.approx(1) for readings in AMBIGUOUS.values())


def test_every_committed_sprite_is_a_drawing_with_alpha():
    sprites = load_sprites(data_dir() / "sprites")
    assert len(sprites) == len(list(sprite_names()))
    for (name, style), sprite in sprites.items():
        alpha = np.asarray(sprite.getchannel("A"))
        assert sprite.size == (SPRITE_SIZE, SPRITE_SIZE)
        assert 0.05 < (alpha > 128).mean() < 0.98, f"{name} in {style} covers nothing or everything"


def test_missing_sprites_are_named_with_the_way_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"184 sprites are missing.*fmn-nb pretrain --stages sprites"):
        load_sprites(tmp_path)


def test_svg_of_follows_aliases_and_names_what_is_missing():
    icons = {"prefix": "demo", "icons": {"cat": {"body": "<path/>"}}, "width": 36,
             "aliases": {"kitty": {"parent": "cat"}}}
    assert 'viewBox="0 0 36 16"' in svg_of(icons, "kitty")
    with pytest.raises(KeyError, match="'demo' has no drawing 'dog'"):
        svg_of(icons, "dog")


def test_captions_have_the_right_article_and_bare_names():
    assert caption(["octopus", "cat"], "noto", "blue") == (
        "a photo of an octopus and a cat in the style of noto on a blue background")
    assert caption(["Milo"]) == "a photo of Milo"
    assert {opening for opening in OPENINGS if "a photo of {}" in opening}


def test_random_captions_vary_and_name_what_is_shown():
    rng = random.Random(0)
    texts = [random_caption(["cat"], "noto", "blue", rng) for _ in range(300)]
    assert len(set(texts)) > 40
    assert all("cat" in text for text in texts)
    assert 0.82 < np.mean(["noto" in text for text in texts]) < 0.97


def test_scenes_are_the_same_for_the_same_seed_and_differ_for_another(scenes):
    assert sample_scenes(400, seed=0) == scenes
    assert sample_scenes(400, seed=1) != scenes
    assert sample_scenes(100, seed=0) == scenes[:100]


def test_the_held_out_split_shares_no_image_with_training():
    drawn = {(s.items, s.style, s.background, s.shade) for s in sample_scenes(3000, seed=0)}
    held = {(s.items, s.style, s.background, s.shade) for s in sample_scenes(300, seed=0, held_out=True)}
    assert not drawn & held


def test_without_leaves_no_trace_of_a_concept():
    for name in ("cat", "twemoji", "Milo", "mouse", "computer mouse"):
        for scene in sample_scenes(600, seed=0, without=[name]):
            caption_text = scene.caption(random.Random(0)).lower()
            assert name not in (*scene.labels, *scene.words, scene.style)
            assert name.lower() not in caption_text.split()


def test_ambiguous_words_have_a_dominant_and_an_overshadowed_reading():
    scenes = sample_scenes(6000, seed=0, sorts={"ambiguous": 1.0})
    for word, (dominant, _) in AMBIGUOUS.items():
        readings = [s.labels[0] for s in scenes if s.words == (word,)]
        assert np.mean([r == dominant.phrase for r in readings]) == pytest.approx(dominant.share, abs=0.05)


def test_masks_hold_what_was_drawn_and_little_else(renderer, scenes):
    for scene in scenes[:100]:
        image, masks = renderer.image(scene), renderer.masks(scene)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and masks.shape == (len(scene.items), IMAGE_SIZE, IMAGE_SIZE)
        background = np.clip(np.array(BACKGROUNDS[scene.background]) + scene.shade, 0, 255)
        drawn = np.abs(image.astype(int) - background).sum(-1) > 120
        assert (drawn & ~masks.any(0)).sum() < 0.1 * drawn.sum(), (scene.labels, scene.style)
        assert all(0.02 < mask.mean() < 0.7 for mask in masks)


def test_a_silhouette_includes_what_an_outline_encloses():
    ring = Image.new("RGBA", (32, 32))
    ImageDraw.Draw(ring).ellipse((4, 4, 27, 27), outline=(0, 0, 0, 255), width=3)
    filled = np.asarray(silhouette(ring))
    assert filled[16, 16] == 255 and filled[0, 0] == 0 and filled[16, 5] == 255


def test_two_objects_stand_left_and_right_in_the_captions_order(renderer, scenes):
    for scene in [s for s in scenes if s.sort == "pair"][:30]:
        left, right = renderer.masks(scene)
        assert np.nonzero(left)[1].mean() < IMAGE_SIZE / 2 < np.nonzero(right)[1].mean()
        text = caption(scene.words, scene.style)
        assert text.index(scene.words[0]) < text.index(scene.words[1])
        assert not (left & right).any()


def test_rendering_is_deterministic(renderer, scenes):
    again = Renderer(data_dir() / "sprites")
    assert np.array_equal(renderer.images(scenes[:20]), again.images(scenes[:20]))


def test_the_tokenizer_holds_names_of_one_token_of_several_and_of_two_words():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(data_dir() / "emoji-diffusion" / "tokenizer")
    lengths = {name: len(tokenizer.tokenize(name)) for name in OBJECTS}
    assert lengths["cat"] == 1 and max(lengths.values()) >= 2
    assert any(" " in name for name in OBJECTS)
    assert tokenizer.model_max_length == MAX_TOKENS


def test_training_a_tokenizer_is_deterministic_and_reads_back(tmp_path):
    rng = random.Random(0)
    captions = [scene.caption(rng) for scene in sample_scenes(500, seed=3)]
    first = train_tokenizer(captions, tmp_path / "a", merges=60)
    second = train_tokenizer(captions, tmp_path / "b", merges=60)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 512 + 60 + 2
    ids = first("a photo of an octopus and Ünïcode 🐙").input_ids
    assert first.unk_token_id not in ids[1:-1], "any text can be spelled in bytes"
    assert type(first).from_pretrained(tmp_path / "a")("a cat").input_ids == first("a cat").input_ids
