"""Figures of attention show the record's own values, say in words what they show, and leave no trace in matplotlib."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny import generate, tiny_sd

from fmn_nb import plots
from fmn_nb.attention import NotRecordedError, head_table, probabilities, record_attention, step_table, token_table
from fmn_nb.models import ReferenceImageError
from fmn_nb.plots import as_png, comparison, describe


@pytest.fixture(autouse=True)
def no_traces():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert not matplotlib._pylab_helpers.Gcf.get_all_fig_managers()


def drawn(figure: Figure) -> list[np.ndarray]:
    """The arrays a figure shows, colour bars left out."""
    figure.canvas.draw()
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def texts(figure: Figure) -> str:
    """Every word on a figure."""
    return " ".join(item.get_text() for item in figure.findobj(matplotlib.text.Text))


def test_a_map_lies_over_arrays_and_what_is_no_image_is_refused(picture):
    values = np.ones((2, 2))
    for given in (np.asarray(picture), np.asarray(picture)[None] / 255):
        assert plots.overlay(given, values, "cat").words == plots.overlay(picture, values, "cat").words
    for wrong in (None, [picture, picture], np.zeros(3)):
        with pytest.raises(ReferenceImageError):
            plots.overlay(wrong, values)
    with pytest.raises(ValueError, match="a map is"):
        plots.overlay(picture, np.ones(3))


def test_one_map_and_its_overlay(record, picture):
    values = record.map("cat")
    figure = plots.attention_map(values, "cat")
    assert np.array_equal(drawn(figure)[0], values) and "cat" in texts(figure) and "share of attention" in texts(figure)
    figure = plots.overlay(picture, values, "cat")
    plain, _, alone = drawn(figure)
    assert np.array_equal(plain, np.asarray(picture)) and np.array_equal(alone, values)
    laid = figure.axes[1].images[1]
    assert np.array_equal(np.asarray(laid.get_array()), values) and laid.get_alpha() == 0.6


def test_a_panel_for_each_token(record):
    figure = plots.token_panel(record)
    shown = drawn(figure)
    assert len(shown) == 11  # begin, eight words, end, padding
    padding, limit = record.select(part="padding"), max(shown[column].max() for column in range(1, 9))
    for column in range(1, 9):
        assert np.array_equal(shown[column], record.select(columns=[column]))
    assert padding.max() > limit, "it would be one colour on the words' scale"
    assert np.allclose(shown[10], (padding - padding.min()) / np.ptp(padding) * limit)
    assert f"({padding.min():.2g} to {padding.max():.2g})" in texts(figure)
    assert all(word in texts(figure) for word in ("begin", "photo", "frog", "end", "padding (6)"))


def test_sheets_of_steps_layers_and_heads(record):
    shown = drawn(plots.step_layer_sheet(record, "cat"))
    assert len(shown) == 3 * 7
    assert np.array_equal(shown[4], record.select("cat", step=1, layer=record.layers[1]))
    figure = plots.head_sheet(record, "cat")
    assert len(drawn(figure)) == 2 * 7 and "head 1" in texts(figure) and "mid 0" in texts(figure)
    assert np.array_equal(drawn(figure)[3], record.select("cat", head=1, layer=record.layers[1]))


def test_comparisons(record):
    first, second, difference = drawn(plots.cond_uncond(record, "cat"))
    assert np.array_equal(first, record.map("cat")) and np.array_equal(second, record.map("cat", branch="uncond"))
    assert np.array_equal(difference, first - second) and difference.any()
    pipe = tiny_sd()
    with record_attention(pipe) as other:
        generate(pipe, "a photo of a cat and a frog", seed=1)
    before, after, _ = drawn(plots.before_after(record, other, "cat"))
    assert np.array_equal(before, record.map("cat")) and np.array_equal(after, other.map("cat"))
    with record_attention(pipe) as negated:
        generate(pipe, "a photo of a cat", negative_prompt="a cat drawing")
    columns = negated.columns_of("cat")
    assert columns != negated.columns_of("cat", branch="uncond")
    assert np.array_equal(drawn(plots.cond_uncond(negated, "cat"))[1],
                          negated.select(columns=columns, branch="uncond")), "the same columns in both"
    with record_attention(pipe, phrases=["cat"]) as summed:
        generate(pipe, "a photo of a cat", negative_prompt="a cat drawing")
    assert "in the negative prompt" in plots.cond_uncond(summed, "cat").words
    with pytest.raises(ValueError, match="same size"):
        plots.compare(np.ones((2, 2)), np.ones((3, 3)), ("a", "b"))


def test_the_qkv_picture_shows_the_equations():
    torch.manual_seed(0)
    query, key, value = torch.randn(10, 4), torch.randn(3, 4), torch.randn(3, 4)
    figure = plots.qkv(query, key, value, ["begin", "cat", "end"], rows=5)
    q, k, logits, shares, v, output = drawn(figure)
    assert np.array_equal(q, query[[0, 2, 4, 7, 9]]) and np.array_equal(k, key) and np.array_equal(v, value)
    np.testing.assert_allclose(logits, q @ k.T / 2, atol=1e-6)
    np.testing.assert_allclose(shares, probabilities(torch.tensor(q), key), atol=1e-6)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(output, shares @ v, atol=1e-6)
    with pytest.raises(ValueError, match="a label for each token"):
        plots.qkv(query, key, value, ["cat"])


def test_a_drawing_with_fewer_steps_than_another_is_shown_at_its_own(tmp_path):
    pipe = tiny_sd()
    with record_attention(pipe) as attention:
        generate(pipe, "a cat", steps=3)
        generate(pipe, "a dog", steps=2)
    assert "step 1" in texts(plots.step_layer_sheet(attention, "dog", image=1))
    with Image.open(plots.step_gif(attention, "dog", tmp_path / "dog.gif", image=1)) as gif:
        assert gif.n_frames == 2 == len(step_table(attention, "dog", image=1))
    with record_attention(pipe, keep="mean", heads="mean") as mean:
        generate(pipe, "a cat")
    for table, choice in ((step_table, {}), (head_table, {"layer": mean.layers[0]})):
        with pytest.raises(NotRecordedError, match="only the mean over"):
            table(mean, "cat", **choice)


def test_the_animation_has_a_frame_for_each_step(record, tmp_path):
    path = plots.step_gif(record, "cat", tmp_path / "cat.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 3 and gif.is_animated
    assert [file.name for file in tmp_path.iterdir()] == ["cat.gif"]
    with pytest.raises(ValueError, match=r"\.gif"):
        plots.step_gif(record, "cat", tmp_path / "cat.png")


def test_every_figure_says_in_words_what_it_shows(record, picture, tmp_path):
    values, uncond = record.map("cat"), record.map("cat", branch="uncond")
    matrices = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3, 4)
    expected = {
        plots.attention_map(values, "cat"): describe(values, "cat"),
        plots.overlay(picture, values, "cat"): describe(values, "cat"),
        plots.cond_uncond(record, "cat"): f"{values.mean():.1%} with the prompt (cond) and {uncond.mean():.1%} without",
        plots.before_after(record, record, "cat"): "the largest difference is +0.0%",
        plots.qkv(*matrices, ["a", "b", "c"]): "Of 3 tokens "}
    for figure, words in expected.items():
        assert words in figure.words == repr(figure)
    table, words = token_table(record).set_index("token"), plots.token_panel(record).words
    own = table[table["part"] == "words"]["mass"]
    assert f"gets most attention ({table['mass'].max():.1%}), of the words {own.idxmax()!r} ({own.max():.1%})" in words
    layer, words = record.layers[0], plots.step_layer_sheet(record, "cat").words
    steps = [record.mass("cat", layer=layer, step=step) for step in record.steps]
    assert f"down 0.0: most at step {np.argmax(steps)} ({max(steps):.1%})" in words and words.count("most at") == 7
    heads = [record.mass("cat", layer=layer, head=head) for head in (0, 1)]
    assert f"down 0.0: most at head {np.argmax(heads)} ({max(heads):.1%})" in plots.head_sheet(record, "cat").words
    with Image.open(plots.step_gif(record, "cat", tmp_path / "cat.gif")) as gif:
        strongest = step_table(record, "cat")["mass"].idxmax()
        assert f"cat: most at step {strongest} (" in gif.info["comment"].decode()
    assert plots.attention_map(np.zeros((2, 2)), "cat").words == "'cat' gets no attention anywhere."


def test_a_notebook_shows_a_figure_without_pyplot(record):
    """IPython asks a cell's last value for `_repr_png_`; nothing may have to be switched on before."""
    for figure in (plots.attention_map(record.map("cat")), plots.token_panel(record)):
        png, described = figure._repr_png_()
        assert png.startswith(b"\x89PNG") and described == {"alt": figure.words}


def test_a_notebook_s_smaller_picture_keeps_the_colours(record):
    pngs = as_png(plots.cond_uncond(record, "cat")), plots.cond_uncond(record, "cat")._repr_png_()[0]
    full, small = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int) for png in pngs)
    assert len(pngs[1]) < len(pngs[0]) / 2 and abs(full - small).max() < 24


def test_a_sheet_names_all_columns_where_its_first_row_is_short():
    values = np.ones((2, 2))
    figure = plots.sheet([[values, None], [values, values]], column_names=["head 0", "head 1"])
    assert [axes.get_title() for axes in figure.axes] == ["head 0", "head 1", "", ""]


def test_maps_in_words():
    values = np.full((6, 6), 0.01)
    values[0, 5] = 0.5
    assert describe(values, "cat").startswith("'cat' gets 2.4% of the attention on average and 50.0% at its peak, "
                                              "at the upper right")
    for row, column, where in ((2, 3, "centre"), (5, 3, "lower centre"), (2, 0, "middle left")):
        assert f"at the {where};" in describe(np.eye(36)[6 * row + column].reshape(6, 6))
    with pytest.raises(ValueError, match="height, width"):
        describe(np.zeros(3))
    table = comparison([values, values[:, ::-1], np.full((6, 6), 0.1)], ["one", "mirrored", "flat"])
    assert table["where"].tolist()[:2] == ["upper right", "upper left"] and table["correlation"][0] == pytest.approx(1)
    assert table["correlation"][1] < 0.1 and np.isnan(table["correlation"][2])
    with pytest.raises(ValueError, match="one shape"):
        comparison([values, values[:3]], ["one", "two"])


def test_sentences_by_hand():
    flat, corner = np.full((3, 3), 0.02), np.full((3, 3), 0.01)
    corner[0, 2] = 0.4
    assert plots.compare(corner, flat, ("before", "after")).words == (
        "On average 5.3% before and 2.0% after; the largest difference is +38.0%, at the upper right.")
    rows = plots.sheet([[flat, corner], [flat, None]], row_names=["down", "mid"], column_names=["step 0", "step 1"])
    assert rows.words == (
        "Mean attention by row. down: most at step 1 (5.3%), least at step 0 (2.0%); mid: most at step 0 (2.0%).")
    shares = torch.tensor([[0.9, 0.1, 1e-9], [0.3, 0.4, 0.3], [0.3, 0.4, 0.3]])
    assert plots.qkv(2 * torch.eye(4)[:3], shares.log().T @ torch.eye(4)[:3], torch.eye(4)[:3], [
        "begin", "cat", "end"]).words == (
        "Of 3 tokens 'begin' gets most attention (50% on average); for 2 of the 3 pixels shown 'cat' has the largest "
        "share. Each row of A sums to 1.")
