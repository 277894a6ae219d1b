"""Turns: what can be said, what it does to the boxes, and undoing it; the picture and the table of boxes."""

import numpy as np
import pytest

from fmn_nb.control import InteractionError, Turns, boxes_picture, boxes_table, holds, things_of


def said(*turns):
    state = Turns()
    for turn in turns:
        state.say(turn)
    return state


def test_a_picture_is_built_up_and_taken_down_again():
    state = said("a cat")
    large = things_of(state.interactions)["cat"]
    state.say("add a frog chasing it")
    assert [str(one) for one in state.interactions] == ["frog=chasing=cat"]
    cat = things_of(state.interactions)["cat"]
    assert cat[2] - cat[0] < large[2] - large[0], "a thing alone makes room"
    assert all(holds(one.action, one.subject_box, one.object_box) for one in state.interactions)
    state.say("move the cat up by 0.05")
    assert things_of(state.interactions)["cat"][1] == pytest.approx(cat[1] - 0.05)
    assert [state.undo(), state.undo(), state.undo(), state.undo()] == [
        "move the cat up by 0.05", "add a frog chasing it", "a cat", ""]
    assert state.interactions == []


def test_things_are_moved_sized_and_taken_away():
    state = said("cat=left of=frog", "move the frog down")
    before = things_of(said("cat=left of=frog").interactions)
    after = things_of(state.interactions)
    assert after["cat"] == before["cat"] and after["frog"][1] == pytest.approx(before["frog"][1] + 0.1)
    state.say("move the frog right by 5")
    assert things_of(state.interactions)["frog"][2] == 1, "the image ends there"
    state.say("make the cat smaller")
    sides = things_of(state.interactions)["cat"]
    assert sides[2] - sides[0] == pytest.approx((before["cat"][2] - before["cat"][0]) * 0.8, abs=1e-3)
    state.say("remove the frog")
    assert [str(one) for one in state.interactions] == ["cat"] and things_of(state.interactions)["cat"] == sides


def test_what_was_moved_or_does_something_already_keeps_its_place():
    state = said("a cat", "make the cat smaller", "make the cat smaller", "move the cat left by 0.1")
    cat = things_of(state.interactions)["cat"]
    state.say("a frog left of the cat")
    assert things_of(state.interactions)["cat"] == cat
    state = said("a cat", "a frog chasing it")
    before = things_of(state.interactions)
    state.say("a dog above the cat")
    assert {name: box for name, box in things_of(state.interactions).items() if name != "dog"} == before
    assert [str(one) for one in state.interactions] == ["frog=chasing=cat", "dog=above=cat"]
    state.say("the frog is below the cat")
    assert {name: box for name, box in things_of(state.interactions).items() if name != "dog"} == before


def test_names_of_several_words_and_articles():
    state = said("a birthday cake", "add an alarm clock above the birthday cake")
    assert str(state.interactions[0]) == "alarm clock=above=birthday cake"
    state = said("dog", "cat=above=frog", "the dog is holding up a crown")
    assert [str(one) for one in state.interactions] == ["cat=above=frog", "dog=holding up=crown"]
    assert all(holds(one.action, one.subject_box, one.object_box) for one in said("cat=above=frog").interactions)


@pytest.mark.parametrize(("turn", "says"), [
    ("move the dog up", "there is no dog; there is cat"), ("a cat", "there is cat already"),
    ("make it so that everything is nice", "not understood: write"), ("", "not understood"),
    ("remove the frog", "there is no frog"), ("cat=chasing", "is not an interaction"), ("!!", "not understood"),
])
def test_what_is_not_understood_leaves_everything_as_it_was(turn, says):
    state = said("a cat")
    before = state.interactions
    with pytest.raises(InteractionError, match=says):
        state.say(turn)
    assert state.interactions == before and state.said == ["a cat"]
    with pytest.raises(InteractionError, match="there is nothing yet"):
        said("a frog chasing it")


def test_boxes_to_look_at_and_in_words():
    interactions = said("cat=above=frog").interactions
    table = boxes_table(interactions)
    assert table["word"].tolist() == ["cat", "frog", "above"] and table["role"].tolist() == [
        "subject", "object", "action"]
    box = things_of(interactions)["cat"]
    assert table.iloc[0, 3:].tolist() == [round(side, 2) for side in box]
    drawn = np.asarray(boxes_picture(interactions, size=100))
    x, y = round(99 * box[0]), round(99 * (box[1] + box[3]) / 2)
    assert drawn[y, x].tolist() == [0xC1, 0x12, 0x1F] and drawn[1, 1].tolist() == [255, 255, 255]
    assert boxes_table([]).empty


@pytest.mark.parametrize("turns", [("a cat", "move the cat up", "add a frog chasing it"),
                                   ("a cat", "move the cat right by 0.3", "a frog chasing the cat"),
                                   ("a cat", "make the cat larger", "a frog left of the cat")])
def test_a_lone_thing_that_was_moved_makes_room_for_another(turns):
    state = Turns()
    for turn in turns:
        state.say(turn)
    (one,) = state.interactions
    assert holds(one.action, one.subject_box, one.object_box), one.words


def test_where_there_is_no_room_a_turn_is_refused():
    state = said("a cat", "make the cat smaller", "make the cat smaller", "move the cat left by 0.3")
    with pytest.raises(InteractionError, match="no room for frog there; move cat, or make it smaller"):
        state.say("a frog left of the cat")
    assert [str(one) for one in state.interactions] == ["cat"]


def test_a_name_is_one_thing_also_within_a_turn():
    state = Turns()
    state.say("cat=chasing=frog; cat=above=key")
    first, second = state.interactions
    assert first.subject_box == second.subject_box
    before = list(state.states)
    for turn, says in (("a cat chasing the cat", "can't be both"), ("a cat chasing a frog", "chasing frog already")):
        with pytest.raises(InteractionError, match=says):
            state.say(turn)
    assert state.states == before


def test_no_thing_is_put_in_twice():
    assert [str(one) for one in said("a cat", "cat=chasing=frog").interactions] == ["cat=chasing=frog"]
    with pytest.raises(InteractionError, match="there is cat already"):
        said("a cat", "cat")
    with pytest.raises(InteractionError, match="there is cat already"):
        said("cat=chasing=frog", "frog=above=key; cat")
    state = said("a cat", "add a frog chasing it", "add a dog above the frog", "remove the cat")
    assert [str(one) for one in state.interactions] == ["dog=above=frog"]
    state = said("cat=chasing=frog; dog=above=frog", "remove the cat", "remove the dog")
    assert [str(one) for one in state.interactions] == ["frog"]
