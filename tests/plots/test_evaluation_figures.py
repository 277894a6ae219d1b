"""Figures of what was measured: what the judge saw, what attacks brought back, how a fine-tune went."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from fmn_nb.plots import (
    attention_figure,
    beginning_and_end,
    collateral_figure,
    confusion_figure,
    curves,
    floor_figure,
    similarity_figure,
    success_figure,
)


def test_a_confusion_figure_shows_shares_of_rows():
    confusion = pd.DataFrame([[3, 1], [0, 2]], index=["cat", "dog"], columns=["cat", "dog"])
    drawn = confusion_figure(confusion, "t").axes[0]
    assert drawn.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["cat", "dog"]


def test_a_collateral_figure_puts_the_worst_on_top():
    table = pd.DataFrame({"after": [0.1, 0.9], "before": [1.0, 0.9], "change": [-0.9, 0.0]}, index=["dog", "frog"])
    axes = collateral_figure(table).axes[0]
    places = dict(zip((label.get_text() for label in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert places == {"dog": 1, "frog": 0}


def test_a_figure_without_a_loss_says_so_instead_of_showing_a_flat_line():
    table = pd.DataFrame({"after": [1.0, 0.9], "before": [1.0, 0.9], "change": [0.0, 0.0], "similarity": [0.1, 0.5]},
                         index=["dog", "frog"])
    for figure in (collateral_figure(table), similarity_figure(table, "cat")):
        assert figure.words == "Nobody lost anything."
        assert "nobody lost anything" in [text.get_text() for text in figure.axes[0].texts]
    assert similarity_figure(table, "cat").axes[0].get_ylim()[0] <= -0.25, "a range in which a loss would show"
    lost = table.assign(after=[0.5, 0.9], change=[-0.5, 0.0])
    assert collateral_figure(lost).words == "Lost accuracy: dog from 1.00 to 0.50."
    assert similarity_figure(lost, "cat").words == "Lost accuracy: dog -0.50, similarity 0.10."


def test_figures_say_in_words_what_they_show():
    confusion = pd.DataFrame([[3, 1], [0, 2]], index=["cat", "dog"], columns=["cat", "dog"])
    assert confusion_figure(confusion).words == "Seen as asked: cat 75%; all others always."
    many = pd.DataFrame(np.eye(8), index=list("abcdefgh"), columns=list("abcdefgh"))
    assert confusion_figure(many).words == "Seen as asked: every row."
    many.iloc[1:] = np.roll(np.eye(8), 1, axis=0)[1:]
    assert confusion_figure(many).words == ("Seen as asked: b 0%, c 0%, d 0%, e 0%, f 0%; 2 more not always; all "
                                            "others always.")
    layers = pd.DataFrame({"words_before": [0.2, 0.4], "words_after": [0.1, 0.1], "later_before": [0.5, 0.5],
                           "later_after": [0.5, 0.5]}, index=["mid_block.attn2", "up_blocks.0.attn2"])
    assert "on its words 30.0% before, 10.0% after" in attention_figure(layers).words
    assert "re-steering loss 2 to 1" in curves({"losses": [2.0, 1.0]}).words
    assert "loss of esd 2 to 1" in curves({"losses": [2.0, 1.0]}, method="esd").words


def test_a_skipped_attack_has_a_row_and_no_dots():
    share = SimpleNamespace(value=0.5, low=0.2, high=0.8)
    tried = SimpleNamespace(name="a", skipped="", before=SimpleNamespace(value=0.1), after=share)
    figure = success_figure([tried, SimpleNamespace(name="b", skipped="nothing answers")])
    axes = figure.axes[0]
    assert figure.words == "a: 0.10 before, 0.50 after. b: skipped, nothing answers."
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"] and axes.get_yticks().tolist() == [1, 0]
    assert [text.get_text() for text in axes.texts] == ["skipped"] and axes.texts[0].get_position()[1] == 0
    figure.canvas.draw()


def test_curves_show_each_step_and_the_mean_of_the_last_five():
    losses = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    figure = curves({"losses": losses, "masses": [0.5] * 7, "retain": [], "steps": 7})
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["re-steering loss", "concept mass"]
    each, mean = first.lines
    assert np.array_equal(each.get_ydata(), losses) and np.array_equal(each.get_xdata(), range(1, 8))
    assert np.allclose(mean.get_ydata(), [6, 5.5, 5, 4.5, 4, 3, 2])
    assert len(curves({"losses": losses, "masses": losses, "retain": losses}).axes) == 3
    assert second.get_ylim()[0] == 0


def test_the_table_has_the_means_of_both_ends():
    table = beginning_and_end({"losses": [float(n) for n in range(10)], "masses": [0.123456], "retain": []})
    assert table.loc["re-steering loss"].tolist() == ["0.5", "8.5"]
    assert table.loc["concept mass"].tolist() == ["0.12", "0.12"] and len(table) == 2


def test_the_floor_stands_beside_each_attack():
    rows = {("concept inversion", "first"): {"steps": 10, "success": 0.3, "floor": 0.05, "unchanged": 0.9},
            ("relearning", "half"): {"steps": 20, "success": 0.6, "floor": 0.5, "unchanged": 1.0}}
    attacks = pd.DataFrame.from_dict(rows, orient="index")
    figure = floor_figure(attacks)
    assert figure.words == ("concept inversion, 10 steps (first): 0.30, floor 0.05, unchanged 0.90; "
                            "relearning, 20 steps (half): 0.60, floor 0.50, unchanged 1.00.")
    floor, success, unchanged = (dots.get_offsets().data for dots in figure.axes[0].collections[1:])
    assert floor.tolist() == [[0.05, 1], [0.5, 0]] and success.tolist() == [[0.3, 1], [0.6, 0]]
    assert unchanged[:, 0].tolist() == [0.9, 1.0]
    with pytest.raises(ValueError, match="no attacks"):
        floor_figure(attacks[:0])
