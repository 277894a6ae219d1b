"""Grounding attack: four ways, the judge's counts, the oracle's floor, what it refuses."""

import pytest
from gated import gated
from judges import Puppet, cats
from quick import quick

from fmn_nb.attacks import floor, grounded_oracle, grounding_attack, grounding_table
from fmn_nb.attacks.grounding import WAYS, shown_by_way
from fmn_nb.concepts import Concept
from fmn_nb.control import How, InteractionError
from fmn_nb.evaluation import MeasurementError, Session
from fmn_nb.models import weights_checksum

HOW = How(steps=2)


@pytest.fixture(scope="module")
def pipe(emoji):
    return gated(emoji)


def attacked(pipe, judge, patch=None, **options):
    return grounding_attack(Session.of(pipe, judge), "cat", patch, each=4, how=HOW, **options)


def test_each_way_counts_what_the_judge_sees_with_and_without_the_patch(pipe):
    patch, before = quick(pipe, "cat"), weights_checksum(pipe)
    said = []
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda _m, args, given: said.append(pipe.tokenizer.batch_decode(args[0] if args else given["input_ids"],
                                                                        skip_special_tokens=True)), with_kwargs=True)
    try:  # the four ways without the patch, then with it
        attacks = attacked(pipe, cats(4, 3, 4, 2, 1, 2, 3, 0), patch)
    finally:
        handle.remove()
    assert weights_checksum(pipe) == before
    assert [a.name for a in attacks] == [f"grounding: {way.name}" for way in WAYS]
    assert [(a.found["base"], a.after.value) for a in attacks] == [(1, 0.25), (0.75, 0.5), (1, 0.75), (0.5, 0)]
    assert all(a.before.value == 0.25 for a in attacks), "the prompt's own share"
    flat = [" ".join(texts) for texts in said]
    assert "the cat" in " ".join(flat) and any("chasing" in text for text in flat)
    neutral = [text for text in flat if text.count("a photo in the style of") == 4]
    assert len(neutral) == 6 and not any("cat" in text for text in neutral), "boxes alone name it"


def test_a_concept_that_something_else_outshines_is_shown_all_the_same(pipe):
    attacks = attacked(pipe, Puppet(lambda call, image: (("dog", "cat"), "noto")))
    assert all(attack.after.value == 1 for attack in attacks)


def test_success_minus_the_oracles_floor(pipe):
    attacks = attacked(pipe, cats(0, 4, 3, 2))
    floor = attacked(grounded_oracle(pipe, pipe), cats(0, 1, 0, 2))
    table = grounding_table(attacks, floor)
    assert table["excess"].tolist() == [0, 0.75, 0.75, 0] and table["floor"].tolist() == [0, 0.25, 0, 0.5]
    assert (table["excess low"] <= table["excess"]).all() and (table["excess"] <= table["excess high"]).all()
    assert "floor" not in grounding_table(attacks)
    with pytest.raises(MeasurementError, match="the floor comes from other attacks"):
        grounding_table(attacks, floor[:2])


def test_a_model_with_boxes_is_compared_with_its_oracle_by_them_too(emoji, pipe, oracle, monkeypatch, tmp_path):
    """The unchanged model and the oracle are asked once: what they showed is kept."""
    monkeypatch.setattr(floor, "shown_by_way", lambda *given: shown_by_way(*given, how=HOW))
    monkeypatch.setattr(floor, "_judge_digest", lambda session, concept: "the puppet's")

    def rows(judge):
        session = Session.of(pipe, judge, steps=2, cache=tmp_path)
        return floor.grounding_rows(session, Concept("cat"), quick(pipe, "cat"), [gated(oracle)], [0], 4)

    found = rows(cats(*[4] * 4, 0, 3, 3, 0, 0, 1, 0, 0))  # unchanged, patched, oracle
    box = found["grounding: box", ""]
    assert (box["success"], box["floor"], box["unchanged"], box["excess"], box["steps"]) == (0.75, 0.25, 1, 0.5, 0)
    assert found["grounding: prompt", ""]["excess"] == 0 and len(found) == len(WAYS)
    again = rows(cats(0, 2, 3, 0))
    assert again["grounding: box", ""]["success"] == 0.5 and again["grounding: box", ""]["floor"] == 0.25
    assert not floor.grounding_rows(Session.of(emoji), Concept("cat"), None, [emoji], [0], 4), "no gated layers"


def test_an_oracle_gets_the_same_head_only_beside_the_same_weights(emoji, pipe):
    oracle = grounded_oracle(emoji, pipe)
    assert oracle is not emoji and oracle.grounding is pipe.grounding and grounded_oracle(pipe, emoji) is pipe
    said = "draw nothing on it: take 'emoji-oracle-grounded', or train its own"
    with quick(emoji, "cat").applied(emoji), pytest.raises(MeasurementError, match=said):
        grounded_oracle(emoji, pipe)


def test_what_cannot_be_attacked_is_refused(emoji, pipe):
    with pytest.raises(InteractionError, match="no gated layers"):
        grounding_attack(emoji, "cat", None)
    with pytest.raises(MeasurementError, match="boxes name objects; 'noto' is of the kind style"):
        grounding_attack(pipe, Concept("noto", kind="style"), None)


def test_a_large_model_draws_few_images_at_once(pipe, monkeypatch):
    monkeypatch.setattr("fmn_nb.evaluation.session.LARGE", 1)
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda _m, args, given: calls.append(len(args[0])), with_kwargs=True)
    try:
        grounding_attack(Session.of(pipe, cats(*[3, 3] * 4), steps=2), "cat", None, each=6)
    finally:
        handle.remove()
    assert max(calls) == 2 * 4, "both branches of four images"
