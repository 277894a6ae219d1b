"""Drawn images never depend on order, interruption or what lies in the cache."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import fmn_nb as fmn
from fmn_nb import evaluation_images
from fmn_nb.concepts import Concept
from fmn_nb.digests import drawing_key
from fmn_nb.evaluation_images import ImageCache, draw_images, images_at_once
from fmn_nb.protocol import drawings

WANTED = drawings(Concept("cat"))[20:34]


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


@pytest.fixture(scope="module")
def pipe():
    return fmn.load("emoji")


@pytest.fixture
def painter(monkeypatch):
    """Instead of the model: an image that its prompt and seed decide. Its calls, and how many it takes until a kill."""
    calls, limit = [], [10**6]

    def paint(pipe, prompts, seeds, **options):
        if len(calls) == limit[0]:
            raise KeyboardInterrupt
        calls.append(list(prompts))
        return [Image.fromarray(np.random.default_rng([seed % 2**32, len(prompt)]).integers(
            0, 256, (8, 8, 3), dtype=np.uint8)) for prompt, seed in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(evaluation_images, "generate", paint)
    return calls, limit


def test_order_and_neighbours_never_change_an_image(pipe):
    first = pixels(draw_images(pipe, WANTED, steps=2, batch=8))
    order = list(range(len(WANTED)))
    random.Random(0).shuffle(order)
    shuffled = pixels(draw_images(pipe, [WANTED[i] for i in order], steps=2, batch=8))
    assert [first[i] for i in order] == shuffled
    alone = pixels(draw_images(pipe, WANTED[3:4], steps=2, batch=8))
    assert alone == first[3:4], "a filled-up call draws the same"


def test_another_batch_size_differs_by_rounding_at_most(pipe):
    one, other = (draw_images(pipe, WANTED[:5], steps=2, batch=batch) for batch in (5, 3))
    for a, b in zip(one, other, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_every_call_draws_the_same_number_of_images(pipe, painter):
    calls, _ = painter
    assert len(draw_images(pipe, WANTED, batch=4)) == len(WANTED)
    assert {len(call) for call in calls} == {4}
    assert images_at_once(pipe) == 24


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_images(pipe, painter, tmp_path):
    calls, limit = painter
    whole = pixels(draw_images(pipe, WANTED, batch=4))
    calls.clear()
    limit[0] = 2
    with pytest.raises(KeyboardInterrupt):
        draw_images(pipe, WANTED, batch=4, cache=tmp_path)
    calls.clear()
    limit[0] = 10**6
    assert pixels(draw_images(pipe, WANTED, batch=4, cache=tmp_path)) == whole
    assert len(calls) == 2, "eight of fourteen images were there"
    assert pixels(draw_images(pipe, WANTED, batch=4, cache=tmp_path)) == whole and len(calls) == 2


def test_damaged_and_foreign_files_are_drawn_anew(pipe, painter, tmp_path):
    calls, _ = painter
    whole = pixels(draw_images(pipe, WANTED, batch=4, cache=tmp_path))
    cache = ImageCache(tmp_path, drawing_key(pipe, 20, 4.0, 4))
    empty, cut, swapped, painted, gone = (cache.path(d) for d in WANTED[:5])
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-40])
    swapped.write_bytes(cache.path(WANTED[6]).read_bytes())
    Image.new("RGB", (8, 8)).save(painted)
    gone.unlink()
    calls.clear()
    assert pixels(draw_images(pipe, WANTED, batch=4, cache=tmp_path)) == whole
    assert len(calls) == 2, "five images, four a call"


def test_a_change_of_one_pixel_is_noticed(pipe, painter, tmp_path):
    draw_images(pipe, WANTED[:1], batch=4, cache=tmp_path)
    cache = ImageCache(tmp_path, drawing_key(pipe, 20, 4.0, 4))
    with Image.open(cache.path(WANTED[0])) as file:
        file.load()
        image, text = file.copy(), dict(file.text)
    image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    info = evaluation_images.PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    image.save(cache.path(WANTED[0]), pnginfo=info)
    assert cache.load(WANTED[0]) is None


def test_a_model_with_a_patch_or_other_settings_has_a_key_of_its_own(pipe):
    plain = drawing_key(pipe, 20, 4.0, 24)
    others = {drawing_key(pipe, 21, 4.0, 24), drawing_key(pipe, 20, 5.0, 24), drawing_key(pipe, 20, 4.0, 12)}
    name, parameter = next(iter(pipe.unet.named_parameters()))
    with fmn.Patch("weights", {name: 0 * parameter.detach() + 1e-3}).applied(pipe):
        others.add(drawing_key(pipe, 20, 4.0, 24))
    assert len(others | {plain}) == 5 and drawing_key(pipe, 20, 4.0, 24) == plain


def test_the_same_drawing_asked_twice_is_drawn_once(pipe, painter):
    calls, _ = painter
    twice = draw_images(pipe, [WANTED[0], WANTED[0]], batch=4)
    assert len(calls) == 1 and pixels(twice[:1]) == pixels(twice[1:])


def test_progress_counts_up_to_all(pipe, painter, tmp_path):
    heard = []
    for _ in range(2):
        draw_images(pipe, WANTED, batch=4, cache=tmp_path, progress=lambda done, of: heard.append((done, of)))
    assert heard == [(4, 14), (8, 14), (12, 14), (14, 14)]


def test_what_two_draw_at_once_is_drawn_once(pipe, painter, tmp_path):
    calls, _ = painter
    whole = pixels(draw_images(pipe, WANTED, batch=4))
    once = len(calls)
    calls.clear()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: pixels(draw_images(pipe, WANTED, batch=4, cache=tmp_path)), range(2)))
    assert both == [whole, whole]
    assert len(calls) == once, "the second one drew again what the first one had drawn"


def test_a_lock_that_is_never_freed_only_costs_time(pipe, painter, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_images, "PATIENCE", 0.01)
    with ImageCache(tmp_path, drawing_key(pipe, 20, 4.0, 4)).alone():
        assert len(draw_images(pipe, WANTED[:4], batch=4, cache=tmp_path)) == 4
