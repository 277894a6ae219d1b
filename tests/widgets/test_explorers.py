"""Explorers show what is chosen, say why where there is none, and leave the model as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator

import ipywidgets
import pytest
from ipywidgets.widgets.widget_description import DescriptionWidget
from quick import quick
from snapshots import noise_images
from tiny import generate, tiny_sd

import fmn_nb.models
from fmn_nb.attention import record_attention
from fmn_nb.concepts import Concept
from fmn_nb.files import data_dir
from fmn_nb.plots import as_png, describe, image_grid, map_picture
from fmn_nb.runs import read_sweep
from fmn_nb.widgets import AttentionExplorer, PatchScale, SweepExplorer


def test_the_explorer_shows_what_is_chosen(record, picture):
    explorer = AttentionExplorer(record, [picture])
    first = bytes(explorer.picture.value)
    assert first.startswith(b"\x89PNG") and "'a' gets" in explorer.words.value.replace("&#x27;", "'")
    explorer.token.value = (5,)
    explorer.layer.value, explorer.head.value, explorer.step.value = record.layers[2], 1, 2
    expected = record.select("cat", layer=record.layers[2], head=1, step=2)
    assert explorer.words.value.replace("&#x27;", "'") == describe(expected, "cat")
    assert bytes(explorer.picture.value) == as_png(map_picture(expected, picture)) != first
    explorer.branch.value = "uncond"
    assert [label.split(" ")[1] for label, _ in explorer.token.options] == ["begin", "end", "padding"]


def test_the_explorer_begins_with_what_was_asked_for(record, picture):
    assert AttentionExplorer(record, [picture], phrase="cat").token.value == (5,)
    explorer = AttentionExplorer(record, [picture], phrase=Concept("photo of"))
    assert explorer.token.label.endswith("photo of") and len(explorer.token.value) == 2
    assert AttentionExplorer(record, phrase="dog").token.value == AttentionExplorer(record).token.value


def test_without_a_kernel_a_sentence_stands_where_the_explorer_was(record, picture):
    explorer = AttentionExplorer(record, [picture])
    shown = explorer._repr_mimebundle_()["text/plain"]
    assert shown == AttentionExplorer.without_kernel and shown.endswith("."), "ipywidgets cuts at 110 characters"
    assert max(len(one.without_kernel) for one in (AttentionExplorer, PatchScale, SweepExplorer)) <= 110


def inside(widget: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    for child in getattr(widget, "children", ()):
        yield from (child, *inside(child))


def test_every_control_has_a_name_that_a_screen_reader_reads_out(record, picture):
    """ipywidgets ties its description to a select or a text field, but not to a slider."""
    pipe = tiny_sd()
    scale = PatchScale(pipe, quick(pipe, references=noise_images(1)), ["a cat"], steps=1)
    sweep = SweepExplorer(read_sweep(data_dir() / "sweep-example"))
    for explorer in (AttentionExplorer(record, [picture]), scale, sweep):
        controls = [one for one in inside(explorer) if isinstance(one, DescriptionWidget)
                    and not isinstance(one, ipywidgets.HTML)]
        assert controls and all(one.description for one in controls)
        assert not [one for one in controls if "Slider" in type(one).__name__]


def test_the_explorer_answers_at_once(record, picture):
    explorer, started = AttentionExplorer(record, [picture]), time.process_time()
    for step in record.steps[:3]:
        explorer.step.value = step
    assert time.process_time() - started < 3 * 0.2


def test_the_explorer_of_phrases_and_of_means():
    pipe = tiny_sd()
    with record_attention(pipe, phrases=["cat", "photo"], keep="mean", heads="mean") as attention:
        generate(pipe, ["a photo of a cat", "a cat"])
    explorer = AttentionExplorer(attention)
    assert [label for label, _ in explorer.token.options] == ["0 cat", "1 photo"]
    assert [label for label, _ in explorer.step.options] == ["all"]
    explorer.image.value = 1
    explorer.token.value = "photo"
    assert "Nothing to show" in explorer.words.value and "is not in the prompt" in explorer.words.value
    explorer.token.value = "cat"
    assert "of the attention" in explorer.words.value


def test_no_picture_stands_beside_nothing_to_show():
    pipe = tiny_sd()
    with record_attention(pipe, phrases=["cat", "dog"]) as attention:
        generate(pipe, ["a cat", "a dog"], steps=1)
    explorer = AttentionExplorer(attention)
    assert explorer.token.value == "dog" and explorer.words.value.startswith("Nothing to show")
    explorer.image.value = 1
    assert explorer.picture.value and "dog" in explorer.words.value
    explorer.image.value = 0
    assert explorer.picture.value == b"" and explorer.words.value.startswith("Nothing to show")


def test_a_branch_that_did_not_run_has_nothing_to_show_and_images_are_those_recorded(picture):
    pipe = tiny_sd()
    with record_attention(pipe) as attention:
        generate(pipe, "a cat")
        generate(pipe, "a dog", guidance_scale=1.0)
    explorer = AttentionExplorer(attention, [picture, picture])
    explorer.branch.value = "uncond"
    explorer.image.value = 1
    assert explorer.picture.value == b"" and explorer.token.options == ()
    assert "the branch uncond of image 1 didn" in explorer.words.value
    explorer.branch.value = "cond"
    assert explorer.picture.value and "of the attention" in explorer.words.value
    with pytest.raises(ValueError, match="2 images, and 1 are given"):
        AttentionExplorer(attention, [picture])


def test_a_scale_that_was_not_drawn_has_no_picture_and_a_text_is_one_prompt(monkeypatch):
    pipe = tiny_sd()
    chosen = PatchScale(pipe, quick(pipe, references=noise_images(1)), "a cat", steps=1)
    first = chosen.picture.value
    assert chosen.prompts == ["a cat"]

    def out_of_memory(*_given, **_options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr("fmn_nb.widgets.explorers.generate", out_of_memory)
        chosen.scale.value = 0.5
    assert chosen.picture.value == b"" and chosen.state.value == "not drawn: out of memory"
    chosen.scale.value = 1.0
    assert chosen.picture.value == first and chosen.state.value == ""


def test_a_chosen_scale_shows_the_patch_at_that_scale(monkeypatch) -> None:
    pipe, prompts = tiny_sd(), ["a photo of a cat", "a frog"]
    patch = quick(pipe, learning_rate=5e-2, retain_weight=0.0, references=noise_images(1))
    own = [(parameter, parameter.clone()) for parameter in pipe.unet.parameters()]
    chosen = PatchScale(pipe, patch, prompts, seed=3, steps=2)
    with patch.applied(pipe):
        drawn = fmn_nb.models.generate(pipe, prompts, [3, 4], steps=2)
    assert bytes(chosen.picture.value) == as_png(image_grid(drawn, columns=2, titles=prompts))
    assert PatchScale(pipe, patch, prompts, drawn={1: drawn}).picture.value == chosen.picture.value
    for scale in (0.0, 0.5):
        chosen.scale.value = scale
        with patch.applied(pipe, scale):
            expected = fmn_nb.models.generate(pipe, prompts, [3, 4], steps=2)
        assert bytes(chosen.picture.value) == as_png(image_grid(expected, columns=2, titles=prompts))
    half = chosen.picture.value
    chosen.scale.value = 0.0
    assert chosen.picture.value != half
    monkeypatch.setattr("fmn_nb.widgets.explorers.generate", lambda *_, **__: 1 / 0)
    chosen.scale.value = 0.5  # seen before, so not drawn again
    assert chosen.picture.value == half
    assert all(p is its and p.equal(before) for p, (its, before) in zip(pipe.unet.parameters(), own, strict=True))
