"""How far images moved, and the curves of a fine-tune."""

import numpy as np
import pytest
from PIL import Image

from fmn_nb.image_change import image_change
from fmn_nb.plots_forgetting import beginning_and_end, curves


def test_the_same_is_0_black_against_white_is_1_and_half_is_half():
    black, white = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), "white")
    assert image_change([black, white], [black, white]) == 0
    assert image_change([black], [white]) == image_change([white], [black]) == 1
    assert image_change([black, black], [black, white]) == 0.5
    assert image_change([Image.new("L", (4, 2), 51)], [black]) == pytest.approx(0.2)
    for other in ([], [black, black], [Image.new("RGB", (2, 4))]):
        with pytest.raises(ValueError, match="against"):
            image_change([black], other)


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
