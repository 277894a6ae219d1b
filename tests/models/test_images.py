"""Images: read from files whatever their kind, drawn whatever the batch, and how far they moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from snapshots import assert_unchanged, noise_images, snapshot
from tiny import quiet, tiny_sd, tiny_sdxl

from fmn_nb.evaluation import draw_images
from fmn_nb.evaluation.protocol import Drawing
from fmn_nb.models import UnsupportedPipelineError, conditions, generate, pixel_size
from fmn_nb.models.images import (
    FilteredImageError,
    ReferenceImageError,
    as_image,
    encode,
    generate_latents,
    image_change,
    load_images,
    to_pixels,
)


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


def test_hidden_files_are_no_images_and_a_folder_too_high_is_told(tmp_path: Path) -> None:
    (tmp_path / "10_toy").mkdir()
    noise_images(1)[0].save(tmp_path / "10_toy" / "toy.png")
    (tmp_path / "10_toy" / "._toy.png").write_bytes(b"\0\5\26\7" + bytes(78))
    assert len(load_images(tmp_path / "10_toy")) == 1
    with pytest.raises(ReferenceImageError, match="images are in '.*10_toy': give that"):
        load_images(tmp_path)
    with pytest.raises(ReferenceImageError, match="doesn't exist"):
        load_images("")


def test_one_image_and_arrays_are_taken_as_pipelines_give_them_out() -> None:
    (image,) = noise_images(1, size=(6, 4))
    array = np.asarray(image)
    channels_first = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for given in (image, array, [array], array[None], array / 255, (array / 255).astype(np.float16), channels_first,
                  channels_first[None], channels_first / 255):
        (read,) = load_images(given)
        assert np.abs(np.asarray(read, int) - array).max() <= (1 if getattr(given, "dtype", "") == np.float16 else 0)
    assert as_image(array[..., 0]).size == image.size and as_image(array[..., 0] > 9).getpixel((0, 0))[0] in (0, 255)
    assert len(load_images([image, array, np.stack([array] * 3)])) == 5


@pytest.mark.parametrize("wrong", [None, 5, b"a.png", {}, [None], [5], np.zeros(3), np.zeros((2, 2, 5)),
                                   np.full((4, 4, 3), np.nan), np.full((4, 4, 3), -1.0), np.zeros((4, 4, 3), int),
                                   torch.zeros(3, 0, 4), torch.full((3, 4, 4), 2.0)])
def test_what_is_no_image_is_refused_with_what_is_taken(wrong) -> None:
    with pytest.raises(ReferenceImageError, match="give a folder, or one or several of"):
        load_images(wrong)


def dc_vae() -> AutoencoderDC:
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, encoder_block_types=("ResBlock",) * 2,
                         decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8),
                         decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
                         decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
                         decoder_qkv_multiscales=((), ()), scaling_factor=0.5).eval()


def tiny_taesd() -> AutoencoderTiny:
    return AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()


@pytest.mark.parametrize("vae, name, scale", [(tiny_taesd, "latents", 1.0), (dc_vae, "latent", 0.5)])
@torch.no_grad()
def test_autoencoders_without_a_distribution_give_exact_latents(vae, name, scale) -> None:
    pipe, images = tiny_sd(), noise_images(2, size=(16, 16))
    pipe.vae = vae()
    encoded = encode(pipe, images)
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in images])
    torch.testing.assert_close(encoded.mean, getattr(pipe.vae.encode(pixels), name) * scale)
    assert not encoded.std.any()


def test_latents_are_centred_where_the_pipeline_does_it() -> None:
    images, mean, std = noise_images(1, size=(16, 16)), [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 4.0]
    for make, centred in ((tiny_sdxl, True), (tiny_sd, False)):
        pipe = make()
        plain = encode(pipe, images)
        pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
        now, scale = encode(pipe, images), pipe.vae.config.scaling_factor
        m, s = (torch.tensor(values).reshape(1, 4, 1, 1) for values in (mean, std))
        torch.testing.assert_close(now.mean, (plain.mean - m * scale) / s if centred else plain.mean)
        torch.testing.assert_close(now.std, plain.std / s if centred else plain.std)


def test_an_unknown_autoencoder_is_named() -> None:
    pipe = tiny_sd()
    pipe.vae.encode = lambda pixels: object()
    with pytest.raises(ReferenceImageError, match="AutoencoderKL"):
        encode(pipe, noise_images(1))


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


def test_pixels_of_arrays_are_those_of_the_same_pictures() -> None:
    pictures = noise_images(2)
    expected, arrays = to_pixels(pictures, 16), np.stack([np.asarray(one) for one in pictures])
    assert expected.shape == (2, 3, 16, 16) and torch.equal(to_pixels(arrays, 16), expected)
    assert torch.equal(to_pixels(arrays / 255, 16), expected), "as pipelines give them out with output_type='np'"
    size = pictures[0].size[0]
    assert torch.equal(to_pixels(arrays, size), to_pixels(pictures, size))
    for wrong in (arrays.astype(np.float32), arrays.astype(np.int64)):
        with pytest.raises(ValueError, match="type"):
            to_pixels(wrong, 16)


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


SMALL = {"height": 16, "width": 16, "steps": 2}


@pytest.mark.parametrize(("prompts", "seeds", "options"), [
    (["a cat"], [0], {"batch": -1}), (["a cat"], [0], {"batch": 0}), (["a cat"], [0], {"batch": 1.5}),
    (["a cat"], [0], {"steps": -1}), (["a cat"], [0], {"steps": 0}), (["a cat"], [0], {"steps": True}),
    (["a cat"], [0], {"guidance": float("nan")}), (["a cat"], [0], {"guidance": float("inf")}),
    (["a cat"], [0], {"guidance": -1e30}), (["a cat"], [0], {"guidance": "4"}), (["a cat"], [1.5], {}),
    (["a cat"], [-1], {}), (["a cat"], [2**64], {}), (["a cat"], [True], {}), ("a cat", [0] * 5, {}),
    ([None], [0], {}), (["a cat"], 0, {}), (["a cat"], [0, 1], {})])
def test_what_is_drawn_is_checked_first(prompts, seeds, options, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("drawn before the check"))
    with pytest.raises(ValueError, match="batch|steps|guidance|seed|prompts"):
        generate(pipe, prompts, seeds, **{**SMALL, **options})
    if "batch" not in options and isinstance(seeds, list) and len(seeds) == 1:
        with pytest.raises(ValueError, match="steps|guidance|seed|prompts"):
            generate_latents(pipe, prompts, seed=seeds[0], **{"steps": 2, "guidance": 4.0, **options})


def test_drawing_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    images = generate(pipe, ["a cat"] * 3, np.arange(3), batch=2, **SMALL)
    generate_latents(pipe, ["a cat"], seed=0, steps=2, guidance=4.0)
    assert len(images) == 3
    assert_unchanged(pipe, before)


def checked(flag: str) -> StableDiffusionPipeline:
    """A pipeline whose safety checker blacks out what is asked for with a "cat"; `flag`: does it say so?"""
    class Checker(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, images, clip_input):
            black = 0.0 if flag == "flagged" else -1.0  # diffusers leaves flagged pictures as they are, in [0, 1]
            return torch.full_like(images, black), [flag == "flagged"] * len(images)

    pipe = tiny_sd()
    pipe.safety_checker = Checker()
    object.__setattr__(pipe, "feature_extractor", lambda pictures, **_: SimpleNamespace(
        to=lambda *_: SimpleNamespace(pixel_values=torch.zeros(len(pictures), 3, 2, 2))))
    return pipe


@pytest.mark.parametrize("flag", ["flagged", "black alone"])
def test_pictures_that_a_safety_checker_blacked_out_are_no_drawings(flag: str, tmp_path: Path) -> None:
    pipe = checked(flag)
    with pytest.raises(FilteredImageError, match="safety checker.*pipe.safety_checker = None"):
        generate(pipe, ["a cat"], [0], **SMALL)
    with pytest.raises(FilteredImageError, match="safety checker"):
        draw_images(pipe, [Drawing("a cat", 0, "forget", "cat", None, "object")], steps=2, batch=2, cache=tmp_path)
    assert not list(tmp_path.rglob("*.png"))
    pipe.safety_checker = None
    assert len(generate(pipe, ["a cat"], [0], **SMALL)) == 1


def test_numbers_that_overflow_are_no_drawings() -> None:
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias += float("nan")
    for output in ("pil", "np", "latent"):
        with pytest.raises(FilteredImageError, match="NaN.*float32"):
            generate(pipe, ["a cat"], [0], output_type=output, **SMALL)
    with pytest.raises(FilteredImageError, match="NaN.*float32"):
        generate_latents(pipe, ["a cat"], seed=0, steps=2, guidance=4.0)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_pipelines_that_need_a_picture_are_refused_and_left_alone(kind: type) -> None:
    pipe = quiet(kind.from_pipe(tiny_sd()))
    before = snapshot(pipe)
    for use in (lambda: generate(pipe, ["a cat"], [0]), lambda: conditions(pipe, ["a cat"]), lambda: pixel_size(pipe),
                lambda: generate_latents(pipe, ["a cat"], seed=0, steps=2, guidance=4.0)):
        with pytest.raises(UnsupportedPipelineError, match=f"{kind.__name__}.*from_pipe"):
            use()
    assert_unchanged(pipe, before)


def test_without_an_autoencoder_nothing_is_decoded_or_encoded() -> None:
    pipe = tiny_sd()
    pipe.vae = None
    assert generate(pipe, ["a cat"], [0], steps=1, output_type="latent")[0].shape == (4, 8, 8)
    for asked in (lambda: generate(pipe, ["a cat"], [0], steps=1), lambda: encode(pipe, noise_images(1))):
        with pytest.raises(ValueError, match="has no autoencoder"):
            asked()


def test_a_pipeline_in_training_mode_draws_the_same_twice_and_stays_in_it() -> None:
    pipe = tiny_sd(dropout=0.5)
    pipe.unet.train()
    first, second = (generate(pipe, ["a cat"], [0], steps=1, output_type="np")[0] for _ in range(2))
    assert np.array_equal(first, second) and pipe.unet.training and pipe.unet.mid_block.training
