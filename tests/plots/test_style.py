"""The look of figures: grids of images, groups apart."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fmn_nb.plots.style import image_grid, look

IMAGES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]


def test_an_image_grid_shows_every_image_under_its_title():
    figure = image_grid(IMAGES, columns=2, titles=["a", "b", "c"], row_names=["first", "second"])
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", ""]
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    png, described = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and described == {"alt": "3 images in rows of 2: first; second."}


@pytest.mark.parametrize("names", [("before", "after"), ("a name of many letters", "and another one")])
def test_the_names_of_rows_leave_the_images_their_size(names):
    figure = image_grid([Image.new("RGB", (64, 64))] * 12, columns=6, row_names=names, width=0.8)
    figure.canvas.draw()
    sides = [axes.get_window_extent().width / figure.dpi for axes in figure.axes]
    extents = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert min(sides) > 0.65 and len(extents) == 2 and not extents[0].overlaps(extents[1])
    assert all(one.x0 >= 0 and one.y0 >= 0 for one in extents)


def test_an_image_grid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="no images"):
        image_grid([], columns=2)
    with pytest.raises(ValueError, match="1 titles for 3 images"):
        image_grid(IMAGES, columns=2, titles=["a"])


def test_rows_are_as_high_as_their_images_and_the_words_name_them():
    wide = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]
    assert image_grid(wide, 2, width=2.0).get_size_inches().tolist() == [4.0, 1.0]
    figure = image_grid(wide, 1, ["before", "after"], width=6.4)
    assert figure.get_size_inches().tolist() == pytest.approx([6.4, 6.84])
    assert figure.words == "2 images in rows of 1: before; after."


def test_thirty_six_groups_look_different_and_a_few_differ_in_both():
    assert len({look(number) for number in range(36)}) == 36
    assert all(len(set(part)) == 6 for part in zip(*map(look, range(6)), strict=True))
