"""Drawn images never depend on order, interruption or what lies in the cache."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from PIL import Image
from tiny import tiny_sd, tiny_sdxl

import fmn_nb as fmn
from fmn_nb.concepts import Concept
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import Session, draw_images, drawings, images_at_once
from fmn_nb.evaluation import session as evaluation_images
from fmn_nb.evaluation.session import ImageCache
from fmn_nb.files import one_at_a_time
from fmn_nb.models import drawing_key
from fmn_nb.patches import LearnedTokens

WANTED = drawings(Concept("cat"), VOCABULARY)[20:34]


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


class Painter:
    """Instead of a model: an image that its prompt and seed decide. Keeps its calls, and is killed after `limit`."""

    def __init__(self, pipe):
        self.pipe, self.calls, self.limit = pipe, [], 10**6

    def paint(self, pipe, prompts, seeds, **options):
        if len(self.calls) == self.limit:
            raise KeyboardInterrupt
        self.calls.append(list(prompts))
        return [Image.fromarray(np.random.default_rng([seed % 2**32, len(prompt)]).integers(
            0, 256, (8, 8, 3), dtype=np.uint8)) for prompt, seed in zip(prompts, seeds, strict=True)]

    def draw(self, wanted=WANTED, **options):
        """What is drawn, and in how many calls."""
        self.calls.clear()
        return pixels(draw_images(self.pipe, wanted, batch=4, **options)), len(self.calls)


@pytest.fixture
def painter(emoji, monkeypatch):
    painter = Painter(emoji)
    monkeypatch.setattr(evaluation_images, "generate", painter.paint)
    return painter


@pytest.fixture
def cache(emoji, tmp_path):
    return ImageCache(tmp_path, drawing_key(emoji, 20, 4.0, 4))


def test_order_and_neighbours_never_change_an_image(emoji):
    first = pixels(draw_images(emoji, WANTED, steps=2, batch=8))
    order = list(range(len(WANTED)))
    random.Random(0).shuffle(order)
    shuffled = pixels(draw_images(emoji, [WANTED[i] for i in order], steps=2, batch=8))
    assert [first[i] for i in order] == shuffled
    alone = pixels(draw_images(emoji, WANTED[3:4], steps=2, batch=8))
    assert alone == first[3:4], "a filled-up call draws the same"


def test_another_batch_size_differs_by_rounding_at_most(emoji):
    one, other = (draw_images(emoji, WANTED[:5], steps=2, batch=batch) for batch in (5, 3))
    for a, b in zip(one, other, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_every_call_draws_the_same_number_of_images(emoji, painter):
    assert len(painter.draw()[0]) == len(WANTED) and {len(call) for call in painter.calls} == {4}
    assert images_at_once(emoji) == 24


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_images(painter, tmp_path):
    whole, _ = painter.draw()
    painter.limit = 2
    with pytest.raises(KeyboardInterrupt):
        painter.draw(cache=tmp_path)
    painter.limit = 10**6
    assert painter.draw(cache=tmp_path) == (whole, 2), "eight of fourteen images were there"
    assert painter.draw(cache=tmp_path) == (whole, 0)


def test_damaged_and_foreign_files_are_drawn_anew(painter, cache, tmp_path):
    whole, _ = painter.draw(cache=tmp_path)
    empty, cut, swapped, painted, gone = (cache.path(d) for d in WANTED[:5])
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-40])
    swapped.write_bytes(cache.path(WANTED[6]).read_bytes())
    Image.new("RGB", (8, 8)).save(painted)
    gone.unlink()
    assert painter.draw(cache=tmp_path) == (whole, 2), "five images, four a call"


def test_a_change_of_one_pixel_is_noticed(painter, cache, tmp_path):
    painter.draw(WANTED[:1], cache=tmp_path)
    with Image.open(cache.path(WANTED[0])) as file:
        file.load()
        image, text = file.copy(), dict(file.text)
    image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    info = evaluation_images.PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    image.save(cache.path(WANTED[0]), pnginfo=info)
    assert cache.load(WANTED[0]) is None


def test_a_model_with_a_patch_or_other_settings_has_a_key_of_its_own(emoji):
    plain = drawing_key(emoji, 20, 4.0, 24)
    others = {drawing_key(emoji, 21, 4.0, 24), drawing_key(emoji, 20, 5.0, 24), drawing_key(emoji, 20, 4.0, 12)}
    name, parameter = next(iter(emoji.unet.named_parameters()))
    with fmn.Patch("weights", {name: 0 * parameter.detach() + 1e-3}).applied(emoji):
        others.add(drawing_key(emoji, 20, 4.0, 24))
    assert len(others | {plain}) == 5 and drawing_key(emoji, 20, 4.0, 24) == plain


def test_the_same_drawing_asked_twice_is_drawn_once(painter):
    (one, other), calls = painter.draw([WANTED[0], WANTED[0]])
    assert calls == 1 and one == other


def test_progress_counts_up_to_all(painter, tmp_path):
    heard = []
    for _ in range(2):
        painter.draw(cache=tmp_path, progress=lambda done, of: heard.append((done, of)))
    assert heard == [(4, 14), (8, 14), (12, 14), (14, 14)]


def test_what_two_draw_at_once_is_drawn_once(emoji, painter, tmp_path):
    whole, once = painter.draw()
    painter.calls.clear()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: pixels(draw_images(emoji, WANTED, batch=4, cache=tmp_path)), range(2)))
    assert both == [whole, whole]
    assert len(painter.calls) == once, "the second one drew again what the first one had drawn"


def test_a_lock_that_is_never_freed_only_costs_time(painter, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_images, "PATIENCE", 0.01)
    with one_at_a_time(cache.folder / ".lock", 1):
        assert len(painter.draw(WANTED[:4], cache=tmp_path)[0]) == 4


def test_a_judged_session_draws_as_it_says(painter, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation_images, "generate", lambda *given, **options: asked.append(options) or painter.paint(
        *given, **options))
    session = Session.of(painter.pipe, steps=3, guidance=7.5, batch=5)
    session.judged(Concept("cat"), WANTED)
    assert asked == [{"steps": 3, "guidance": 7.5, "batch": 5}]


def test_an_adapter_switched_off_or_down_is_another_drawing():
    pipe, keys = tiny_sd(), []
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), adapter_name="one")
    keys.append(drawing_key(pipe))
    pipe.unet.set_adapters(["one"], [0.3])
    keys.append(drawing_key(pipe))
    pipe.unet.disable_adapters()
    keys.append(drawing_key(pipe))
    pipe.unet.enable_adapters()
    pipe.unet.set_adapters(["one"], [1.0])
    assert len(set(keys)) == 3 and drawing_key(pipe) == keys[0]


def test_another_vector_under_the_same_name_is_another_drawing():
    pipe, keys = tiny_sd(), []
    for seed in (0, 1):
        vectors = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
        with LearnedTokens("<toy>", (vectors,)).loaded(pipe):
            keys.append(drawing_key(pipe))
    assert len({*keys, drawing_key(pipe)}) == 3


def test_attention_processors_and_configurations_are_another_drawing():
    pipe = tiny_sd()
    keys, usual = [drawing_key(pipe)], pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor())
    keys.append(drawing_key(pipe))

    class Other(AttnProcessor):
        """Somebody's own: nobody knows what it does, nor whether it does the same the next time."""

    pipe.unet.set_attn_processor(Other())
    keys += [drawing_key(pipe), drawing_key(pipe)]
    pipe.unet.set_attn_processor(usual)
    assert drawing_key(pipe) == keys[0]
    keys.append(drawing_key(tiny_sd(sample_size=16)))
    pipe = tiny_sdxl()
    keys.append(drawing_key(pipe))
    pipe.register_to_config(force_zeros_for_empty_prompt=not pipe.config.force_zeros_for_empty_prompt)
    keys.append(drawing_key(pipe))
    assert len(set(keys)) == 7


def test_freeu_and_tiles_are_another_drawing():
    pipe = tiny_sd()
    keys = [drawing_key(pipe)]
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    keys.append(drawing_key(pipe))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.5)
    keys.append(drawing_key(pipe))
    pipe.disable_freeu()
    assert drawing_key(pipe) == keys[0]
    pipe.vae.enable_tiling()
    assert len({*keys, drawing_key(pipe)}) == 4
