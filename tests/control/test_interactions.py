"""Interactions: words, boxes, their text form, the between box, and places where none are given."""

import math
import random

import pytest

import fmn_nb as fmn
from fmn_nb.control import ACTIONS, InteractionError, as_text, between, holds, laid_out, parse_interactions, union

LEFT, RIGHT = (0.1, 0.3, 0.4, 0.6), (0.6, 0.2, 0.9, 0.7)


def test_the_between_box_is_made_of_the_middle_sides():
    assert between(LEFT, RIGHT) == (0.4, 0.3, 0.6, 0.6), "the gap"
    assert between((0.0, 0.0, 0.6, 0.6), (0.4, 0.4, 1.0, 1.0)) == (0.4, 0.4, 0.6, 0.6), "the common part"
    assert between((0.0, 0.0, 1.0, 1.0), (0.2, 0.3, 0.4, 0.5)) == (0.2, 0.3, 0.4, 0.5), "what lies inside"
    assert between(LEFT, RIGHT) == between(RIGHT, LEFT) and union(LEFT, RIGHT) == (0.1, 0.2, 0.9, 0.7)
    assert fmn.Interaction("cat", "chasing", "frog", RIGHT, LEFT).between == between(LEFT, RIGHT)
    assert fmn.Interaction("cat", "chasing", "frog", RIGHT).between is None


@pytest.mark.parametrize(("box", "says"), [
    ((-0.1, 0, 0.5, 0.5), "reaches out of the image"), ((0, 0, 1.2, 0.5), "reaches out of the image"),
    ((0.5, 0, 0.2, 0.5), "turned inside out"), ((0, 0.5, 0.5, 0.5), "turned inside out"),
    ((0, 0, 1), "must be four numbers"), ("0011", "must be four numbers"), (3, "must be four numbers"),
    ((0, 0, math.nan, 1), "finite number"), ((0, 0, "1", 1), "finite number"), ((0, True, 1, 1), "finite number"),
])
def test_a_bad_box_is_one_clear_line(box, says):
    with pytest.raises(InteractionError, match=says) as error:
        fmn.Interaction("cat", "chasing", "frog", subject_box=box)
    assert "subject box" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", [("",), ("cat", "chasing"), ("cat", "", "frog"), ("cat", 3, "frog"), ("", "is", "x")])
def test_missing_words_are_refused(words):
    with pytest.raises(InteractionError, match="lacks a word|must be a word"):
        fmn.Interaction(*words)
    with pytest.raises(InteractionError, match="a box for the object of 'cat', which has none"):
        fmn.Interaction("cat", object_box=LEFT)


def test_the_text_form_goes_both_ways():
    text = "cat=chasing=frog; dog=above=alarm clock; house"
    read = parse_interactions("  cat = chasing=frog;\ndog=above= alarm  clock ;house;")
    assert as_text(read) == text and read == parse_interactions(text)
    assert read[1].object == "alarm clock" and read[2] == fmn.Interaction("house")
    for broken in ("cat=chasing", "cat==frog", "cat=a=b=c", "", " ; "):
        with pytest.raises(InteractionError, match="SUBJECT=ACTION=OBJECT"):
            parse_interactions(broken)
    with pytest.raises(InteractionError, match="as a text"):
        parse_interactions(None)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("beside", ["", "dog=above=crown", "dog=chasing=crown", "dog=inside=crown; fish=below=car"])
def test_what_has_no_box_stands_as_the_action_says(action, beside):
    wanted = parse_interactions(f"cat={action}=frog;{beside}")
    placed = laid_out(wanted)
    assert [str(one) for one in placed] == [str(one) for one in wanted]
    for one in placed:
        assert holds(one.action, one.subject_box, one.object_box), one.words
        opposite = {"above": "below", "below": "above", "holding up": "above", "left of": "right of"}
        assert not holds(opposite.get(one.action, "left of"), one.subject_box, one.object_box)
        assert all(0 <= side <= 1 for side in (*one.subject_box, *one.object_box))


@pytest.mark.parametrize("action", ACTIONS)
def test_a_missing_box_stands_beside_the_one_that_is_given(action):
    both = laid_out([fmn.Interaction("cat", action, "frog")])[0]
    moved = tuple(0.05 + 0.8 * side for side in both.subject_box)
    found = laid_out([fmn.Interaction("cat", action, "frog", subject_box=moved)])[0]
    assert found.subject_box == moved and holds(action, moved, found.object_box), found.words
    moved = tuple(0.05 + 0.8 * side for side in both.object_box)
    found = laid_out([fmn.Interaction("cat", action, "frog", object_box=moved)])[0]
    assert found.object_box == moved and holds(action, found.subject_box, moved), found.words


@pytest.mark.parametrize("action", ACTIONS)
def test_a_missing_box_stands_as_the_action_says_where_there_is_room(action):
    rng, not_so = random.Random(0), 0
    for _ in range(100):
        side = rng.uniform(0.15, 0.4)
        x, y = (rng.uniform(0, 1 - side) for _ in range(2))
        for given in ("subject_box", "object_box"):
            found = laid_out([fmn.Interaction("cat", action, "frog", **{given: (x, y, x + side, y + side)})])[0]
            not_so += not holds(action, found.subject_box, found.object_box)
            assert all(0 <= side <= 1 for side in (*found.subject_box, *found.object_box))
    assert not_so < 30, "of 200, and those at a rim"


def test_given_boxes_stay_and_an_unknown_action_needs_both():
    given = fmn.Interaction("cat", "kissing", "frog", LEFT, RIGHT)
    assert laid_out([given]) == [given]
    with pytest.raises(InteractionError, match="things stand for the action 'kissing': give both boxes"):
        laid_out([fmn.Interaction("cat", "kissing", "frog", LEFT)])


def test_an_interaction_in_words():
    assert fmn.Interaction("cat", "chasing", "frog", RIGHT, LEFT).words == (
        "cat (x 0.60 to 0.90, y 0.20 to 0.70) chasing frog (x 0.10 to 0.40, y 0.30 to 0.60)")
    assert fmn.Interaction("cat").words == "cat"
