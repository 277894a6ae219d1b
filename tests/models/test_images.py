"""Images: read from files whatever their kind, drawn whatever the batch, and how far they moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from snapshots import noise_images
from tiny import tiny_sd

from fmn_nb.models.images import ReferenceImageError, generate_latents, image_change, load_images


def test_images_of_any_kind_are_read_and_bad_ones_named_together(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I;16"):
        Image.new(mode, (30, 20)).save(tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'PNG'}")
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_images(tmp_path)
    assert len(images) == 8 and {image.mode for image in images} == {"RGB"}
    names = [file.name for file in sorted(tmp_path.iterdir()) if file.suffix != ".txt"]
    assert images[names.index("RGBA.PNG")].getpixel((0, 0)) == (255, 255, 255)  # transparent becomes white
    (tmp_path / "bad.png").write_bytes(b"no")
    (tmp_path / "worse.jpg").write_bytes(b"")
    noise_images(1, size=(64, 64))[0].save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-500])
    with pytest.raises(ReferenceImageError, match=r"(?s)3 of 11.*bad.png.*cut.jpg.*worse.jpg"):
        load_images(tmp_path)
    with pytest.raises(ReferenceImageError, match="doesn't exist"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReferenceImageError, match="no image"):
        load_images(tmp_path / "empty")


def test_deep_pictures_keep_their_brightness_and_photographs_stand_upright() -> None:
    half = {"I;16": 32768, "I": 32768, "F": 0.5, "L": 128, "CMYK": (0, 0, 0, 127), "YCbCr": (128, 128, 128),
            "HSV": (0, 0, 128), "LAB": (137, 128, 128), "RGBX": (128,) * 4, "La": (128, 255), "PA": None}
    for mode, value in half.items():
        picture = Image.new("L", (2, 2), 128).convert("P").convert("PA") if value is None else Image.new(
            mode, (2, 2), value)
        (read,) = load_images([picture])
        assert read.mode == "RGB" and read.getpixel((0, 0)) == pytest.approx((128,) * 3, abs=4), mode
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6  # held upright, stored lying
    assert load_images([turned])[0].size == (2, 4)


def test_generated_references_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a cat", "a dog", "a frog"]
    at_once = generate_latents(tiny_sd(), prompts, seed=1, steps=2, guidance=3.0)
    monkeypatch.setattr("fmn_nb.models.images._GENERATED_AT_ONCE", 1)
    singly = generate_latents(tiny_sd(), prompts, seed=1, steps=2, guidance=3.0)
    torch.testing.assert_close(at_once.mean, singly.mean, rtol=1e-4, atol=1e-5)
    assert not torch.equal(at_once.mean[0], at_once.mean[1])


def test_the_same_is_0_black_against_white_is_1_and_half_is_half() -> None:
    black, white = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), "white")
    assert image_change([black, white], [black, white]) == 0
    assert image_change([black], [white]) == image_change([white], [black]) == 1
    assert image_change([black, black], [black, white]) == 0.5
    assert image_change([Image.new("L", (4, 2), 51)], [black]) == pytest.approx(0.2)
    for other in ([], [black, black], [Image.new("RGB", (2, 4))]):
        with pytest.raises(ValueError, match="against"):
            image_change([black], other)
