"""Diagrams: every box is joined, nothing overlaps, and the words say the same."""

import pytest

from fmn_nb.plots.diagrams import _DRAWINGS, diagram


@pytest.mark.parametrize("name", _DRAWINGS)
def test_every_box_is_joined_and_none_covers_another(name):
    boxes, arrows, words = _DRAWINGS[name]
    assert {end for ends in arrows for end in ends.split()} == set(boxes)
    figure = diagram(name)
    figure.canvas.draw()
    drawn = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts
             if text.get_text() in {box.text for box in boxes.values()}]
    assert len(drawn) == len(boxes) and figure.words == words
    assert not [one for number, one in enumerate(drawn) for other in drawn[:number] if one.overlaps(other)]
    assert all(figure.bbox.x0 <= one.x0 and one.x1 <= figure.bbox.x1 for one in drawn), "cut off"


def test_a_diagram_that_is_none_is_named():
    with pytest.raises(ValueError, match="no diagram 'maths'; there are cross-attention"):
        diagram("maths")
