"""Figures, tables and the explorer: they show the record's own values, and leave no trace in matplotlib."""

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
from fmn_nb.attention import NotRecordedError, probabilities, record_attention
from fmn_nb.attention_tables import (
    comparison,
    describe,
    describe_pair,
    describe_qkv,
    describe_rows,
    describe_tokens,
    head_table,
    layer_table,
    place,
    step_table,
    token_table,
)
from fmn_nb.widgets import AttentionExplorer

PROMPT = "a photo of a cat and a frog"


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def record(sd):
    with record_attention(sd) as attention:
        attention.pixels = generate(sd, PROMPT, steps=3)
    return attention


@pytest.fixture(scope="module")
def picture(record):
    return Image.fromarray((record.pixels[0] * 255).astype("uint8"))


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
    for column in range(10):
        assert np.array_equal(shown[column], record.select(columns=[column]))
    assert np.array_equal(shown[10], record.select(part="padding"))
    assert all(word in texts(figure) for word in ("begin", "photo", "frog", "end", "padding (6)"))


def test_sheets_of_steps_layers_and_heads(record):
    shown = drawn(plots.step_layer_sheet(record, "cat"))
    assert len(shown) == 3 * 7
    assert np.array_equal(shown[4], record.select("cat", step=1, layer=record.layers[1]))
    figure = plots.head_sheet(record, "cat")
    assert len(drawn(figure)) == 2 * 7 and "head 1" in texts(figure) and "mid 0" in texts(figure)
    assert np.array_equal(drawn(figure)[3], record.select("cat", head=1, layer=record.layers[1]))


def test_comparisons(record, sd):
    first, second, difference = drawn(plots.cond_uncond(record, "cat"))
    assert np.array_equal(first, record.map("cat")) and np.array_equal(second, record.map("cat", branch="uncond"))
    assert np.array_equal(difference, first - second) and difference.any()
    with record_attention(sd) as other:
        generate(sd, PROMPT, seed=1)
    before, after, _ = drawn(plots.before_after(record, other, "cat"))
    assert np.array_equal(before, record.map("cat")) and np.array_equal(after, other.map("cat"))
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


def test_the_animation_has_a_frame_for_each_step(record, tmp_path):
    path = plots.step_gif(record, "cat", tmp_path / "cat.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 3 and gif.is_animated
    assert [file.name for file in tmp_path.iterdir()] == ["cat.gif"]
    with pytest.raises(ValueError, match=r"\.gif"):
        plots.step_gif(record, "cat", tmp_path / "cat.png")


@pytest.mark.parametrize("layer, short", [
    ("down_blocks.0.attentions.1.transformer_blocks.0.attn2", "down 0.1"),
    ("mid_block.attentions.0.transformer_blocks.0.attn2", "mid 0"),
    ("up_blocks.1.attentions.0.transformer_blocks.1.attn2", "up 1.0.1"),
    ("transformer_blocks.3.attn", "transformer_blocks.3"),
    ("single_transformer_blocks.3.attn", "single_transformer_blocks.3")])
def test_short_names(layer, short):
    assert plots.short_name(layer) == short


def test_tables_agree_with_the_maps(record):
    table = token_table(record)
    assert table["mass"].sum() == pytest.approx(1, abs=1e-5) and len(table) == 11
    assert table.set_index("token").loc["cat", "mass"] == pytest.approx(record.mass("cat"))
    assert table["part"].tolist() == ["begin"] + ["words"] * 8 + ["first_eot", "padding"]
    steps, layers = step_table(record, "cat"), layer_table(record, "cat")
    assert steps["mass"].mean() == pytest.approx(record.mass("cat"))
    assert layers["mass"].mean() == pytest.approx(record.mass("cat"))
    heads = head_table(record, "cat", record.layers[0])
    assert heads["mass"].mean() == pytest.approx(layers["mass"][0])
    assert record.mass("cat", layer=record.layers[0]) == pytest.approx(
        float(record.select("cat", layer=record.layers[0]).mean()))


def test_tables_need_what_was_recorded(sd):
    with record_attention(sd, phrases="cat") as attention:
        generate(sd)
    with pytest.raises(NotRecordedError, match="only the phrases 'cat'"):
        token_table(attention)
    assert layer_table(attention, "cat")["mass"].between(0, 1).all()


def test_maps_in_words():
    values = np.full((6, 6), 0.01)
    values[0, 5] = 0.5
    assert describe(values, "cat").startswith("'cat' gets 2.4% of the attention on average and 50.0% at its peak, "
                                              "at the upper right")
    assert place(0.5, 0.5) == "centre" and place(0.9, 0.5) == "lower centre" and place(0.5, 0.1) == "middle left"
    with pytest.raises(ValueError):
        describe(np.zeros((3, 3)))
    table = comparison([values, values[:, ::-1], np.full((6, 6), 0.1)], ["one", "mirrored", "flat"])
    assert table["where"].tolist()[:2] == ["upper right", "upper left"] and table["correlation"][0] == pytest.approx(1)
    assert table["correlation"][1] < 0.1 and np.isnan(table["correlation"][2])
    with pytest.raises(ValueError, match="one shape"):
        comparison([values, values[:3]], ["one", "two"])


def test_sentences_by_hand():
    flat, corner = np.full((3, 3), 0.02), np.full((3, 3), 0.01)
    corner[0, 2] = 0.4
    assert describe_pair(corner, flat, ("before", "after")) == (
        "On average 5.3% before and 2.0% after; the largest difference is +38.0%, at the upper right.")
    assert describe_rows([[flat, corner], [flat, None]], ["down", "mid"], ["step 0", "step 1"]) == (
        "Mean attention by row. down: most at step 1 (5.3%), least at step 0 (2.0%); mid: most at step 0 (2.0%).")
    masses = [("begin", 0.7), ("a", 0.1), ("cat", 0.15), ("end", 0.05)]
    assert describe_tokens(masses, {"a", "cat"}) == (
        "Of 4 tokens 'begin' gets most attention (70.0%), of the words 'cat' (15.0%).")
    assert describe_tokens(masses[1:], {"a", "cat"}) == "Of 3 tokens 'cat' gets most attention (15.0%)."
    shares = np.array([[0.9, 0.1, 0.0], [0.3, 0.4, 0.3], [0.3, 0.4, 0.3]])
    assert describe_qkv(shares, ["begin", "cat", "end"]) == (
        "Of 3 tokens 'begin' gets most attention (50% on average); for 2 of the 3 pixels shown 'cat' has the largest "
        "share. Each row of A sums to 1.")


def test_every_figure_says_in_words_what_it_shows(record, picture, tmp_path):
    values, uncond = record.map("cat"), record.map("cat", branch="uncond")
    matrices = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3, 4)
    expected = {
        plots.attention_map(values, "cat"): describe(values, "cat"),
        plots.overlay(picture, values, "cat"): describe(values, "cat"),
        plots.cond_uncond(record, "cat"): describe_pair(values, uncond, ("with the prompt (cond)", "without (uncond)")),
        plots.before_after(record, record, "cat"): describe_pair(values, values, ("before", "after")),
        plots.qkv(*matrices, ["a", "b", "c"]): describe_qkv(
            probabilities(matrices[0], matrices[1]).numpy(), ["a", "b", "c"])}
    for figure, words in expected.items():
        assert figure.words == words == repr(figure)
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


def test_the_explorer_shows_what_is_chosen(record, picture):
    explorer = AttentionExplorer(record, [picture])
    first = bytes(explorer.picture.value)
    assert first.startswith(b"\x89PNG") and "'a' gets" in explorer.words.value.replace("&#x27;", "'")
    explorer.token.value = (5,)
    explorer.layer.value, explorer.head.value, explorer.step.value = record.layers[2], 1, 2
    expected = record.select("cat", layer=record.layers[2], head=1, step=2)
    assert explorer.words.value.replace("&#x27;", "'") == describe(expected, "cat")
    assert bytes(explorer.picture.value) == plots.as_png(plots.overlay(picture, expected, "cat")) != first
    explorer.branch.value = "uncond"
    assert [label.split(" ")[1] for label, _ in explorer.token.options] == ["begin", "end", "padding"]


def test_the_explorer_of_phrases_and_of_means(sd):
    with record_attention(sd, phrases=["cat", "photo"], keep="mean", heads="mean") as attention:
        generate(sd, ["a photo of a cat", "a cat"])
    explorer = AttentionExplorer(attention)
    assert [label for label, _ in explorer.token.options] == ["0 cat", "1 photo"]
    assert [label for label, _ in explorer.step.options] == ["all"]
    explorer.image.value = 1
    explorer.token.value = "photo"
    assert "Nothing to show" in explorer.words.value and "is not in the prompt" in explorer.words.value
    explorer.token.value = "cat"
    assert "of the attention" in explorer.words.value


def test_a_notebook_shows_a_figure_without_pyplot(record):
    """IPython asks a cell's last value for `_repr_png_`; nothing may have to be switched on before."""
    for figure in (plots.attention_map(record.map("cat")), plots.token_panel(record)):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_notebook_s_smaller_picture_keeps_the_colours(record):
    pngs = plots.as_png(plots.cond_uncond(record, "cat")), plots.cond_uncond(record, "cat")._repr_png_()
    full, small = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int) for png in pngs)
    assert len(pngs[1]) < len(pngs[0]) / 2 and abs(full - small).max() < 24


def test_a_sheet_names_all_columns_where_its_first_row_is_short():
    values = np.ones((2, 2))
    figure = plots.sheet([[values, None], [values, values]], column_names=["head 0", "head 1"])
    assert [axes.get_title() for axes in figure.axes] == ["head 0", "head 1", "", ""]
