"""The composer: turns, numbers and canvas move the same boxes, and the picture follows."""

import pytest
from gated import gated

from fmn_nb.control import things_of
from fmn_nb.widgets import Composer


@pytest.fixture(scope="module")
def pipe(emoji):
    return gated(emoji)


def test_turns_numbers_and_undo(pipe):
    board = Composer(pipe, turns=["a cat"], steps=2)
    board.turn.value = "add a frog chasing it"
    assert list(board.thing.options) == ["frog", "cat"] and board.turn.value == ""
    assert "<td>chasing</td>" in board.words.value and "<li>a cat</li>" in board.words.value
    board.thing.value = "cat"
    board.numbers["right"].value = 0.5
    assert things_of(board.state.interactions)["cat"][2] == 0.5 and "move the cat to" in board.words.value
    board.undo.click()
    board.undo.click()
    assert [str(one) for one in board.state.interactions] == ["cat"]
    assert board.numbers["right"].value == things_of(board.state.interactions)["cat"][2]


def test_the_picture_is_of_what_stands_and_goes_when_that_changes(pipe):
    board = Composer(pipe, turns=["cat=above=frog"], steps=2)
    assert board.picture.value == b"" and bytes(board.plan.value).startswith(b"\x89PNG")
    plan = bytes(board.plan.value)
    board.draw.click()
    first = bytes(board.picture.value)
    assert first.startswith(b"\x89PNG") and not board.draw.disabled
    board.turn.value = "move the cat left"
    assert bytes(board.picture.value) == b"" and bytes(board.plan.value) != plan
    board.draw.click()
    assert bytes(board.picture.value) not in (b"", first)


def test_trouble_is_said_and_nothing_changes(pipe):
    board = Composer(pipe, turns=["a cat"], steps=2)
    before = board.state.interactions
    board.turn.value = "move the dog up"
    assert "there is no dog" in board.trouble.value and board.state.interactions == before
    board.numbers["left"].value = 0.99
    assert "turned inside out" in board.trouble.value and board.state.interactions == before
    board.turn.value = "a unicorn"
    board.draw.click()
    assert "the model doesn&#x27;t know &#x27;unicorn&#x27;" in board.trouble.value and board.picture.value == b""


def test_a_drawing_that_fails_is_not_said_to_go_on(pipe, monkeypatch):
    def out_of_memory(*_given, **_options):
        raise RuntimeError("out of memory")

    board = Composer(pipe, turns=["a cat"], steps=2)
    monkeypatch.setattr("fmn_nb.widgets.composer.draw_interactions", out_of_memory)
    with pytest.raises(RuntimeError):
        board.show_image()
    assert board.trouble.value == "not drawn: out of memory" and not board.draw.disabled


def test_a_box_that_is_moved_on_the_canvas_is_a_turn(pipe):
    pytest.importorskip("anywidget", reason="anywidget is missing: pip install '.[lab]'")
    board = Composer(pipe, turns=["cat=above=frog"], steps=2)
    boxes = [dict(one) for one in board.canvas.boxes]
    assert [one["name"] for one in boxes] == ["cat", "frog"] and boxes[0]["colour"] != boxes[1]["colour"]
    board.canvas.selected = 1
    assert board.thing.value == "frog"
    boxes[1]["box"] = [0.0, 0.6, 0.4, 1.0]
    board.canvas.boxes = boxes
    board.canvas.moved += 1
    assert things_of(board.state.interactions)["frog"] == (0.0, 0.6, 0.4, 1.0)
    assert board.numbers["top"].value == 0.6 and board.canvas.selected == 1
    said = list(board.state.said)
    board.draw.click()
    board.canvas.moved += 1
    assert board.state.said == said and board.picture.value, "nothing moved, so nothing changes"


def test_without_the_canvas_a_drawing_shows_the_boxes(pipe, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fmn_nb.widgets.canvas", None)
    board = Composer(pipe, turns=["a cat"], steps=2)
    assert board.canvas is None and board.plan in board.children[0].children
    assert len(repr(board)) <= 110
