"""Figures of images and verdicts: what they show, and what they refuse."""

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fmn_nb.plots_evaluation import collateral_figure, confusion_figure, image_grid

IMAGES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]


def test_an_image_grid_shows_every_image_under_its_title():
    figure = image_grid(IMAGES, columns=2, titles=["a", "b", "c"], row_names=["first", "second"])
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", ""]
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_an_image_grid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="no images"):
        image_grid([], columns=2)
    with pytest.raises(ValueError, match="1 titles for 3 images"):
        image_grid(IMAGES, columns=2, titles=["a"])


def test_a_confusion_figure_shows_shares_of_rows():
    confusion = pd.DataFrame([[3, 1], [0, 2]], index=["cat", "dog"], columns=["cat", "dog"])
    drawn = confusion_figure(confusion, "t").axes[0]
    assert drawn.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["cat", "dog"]


def test_a_collateral_figure_puts_the_worst_on_top():
    table = pd.DataFrame({"after": [0.1, 0.9], "before": [1.0, 0.9], "change": [-0.9, 0.0]}, index=["dog", "frog"])
    axes = collateral_figure(table).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["frog", "dog"]
