"""The slider for a patch's scale: it draws what the patch gives, and leaves the model as it was."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from quick import quick
from snapshots import noise_images
from tiny import tiny_sd

from fmn_nb.generation import generate
from fmn_nb.plots_evaluation import image_grid
from fmn_nb.plots_figure import as_png
from fmn_nb.widgets_patches import PatchScale


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_a_moved_slider_shows_the_patch_at_that_scale(monkeypatch) -> None:
    pipe, prompts = tiny_sd(), ["a photo of a cat", "a frog"]
    patch = quick(pipe, learning_rate=5e-2, retain_weight=0.0, references=noise_images(1))
    own = {name: parameter for name, parameter in pipe.unet.named_parameters()}
    slider = PatchScale(pipe, patch, prompts, seed=3, steps=2)
    assert slider.picture.value == b"" and list(slider.children) == [slider.scale, slider.picture]
    for scale in (0.0, 0.5):
        slider.scale.value = scale
        with patch.applied(pipe, scale):
            expected = generate(pipe, prompts, [3, 4], steps=2)
        figure = as_png(image_grid(expected, columns=2, titles=prompts))
        assert np.array_equal(pixels(slider.picture.value), pixels(figure))
    half = slider.picture.value
    slider.scale.value = 0.0
    assert slider.picture.value != half
    monkeypatch.setattr("fmn_nb.widgets_patches.generate", lambda *_, **__: 1 / 0)
    slider.scale.value = 0.5  # seen before, so not drawn again
    assert slider.picture.value == half
    assert all(torch.equal(p, own[name]) and p is own[name] for name, p in pipe.unet.named_parameters())
