"""Paraphrases, two objects, classes, names and readings: what is asked, and every share by hand."""

import pandas as pd
import pytest
from judges import faithful, outcomes

from fmn_nb.concepts import Concept, Vocabulary, same_name
from fmn_nb.emoji import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES
from fmn_nb.emoji.world import VOCABULARY, caption
from fmn_nb.evaluation import Measures, Report, drawings, measure, probe_shares, share_of
from fmn_nb.evaluation.probes import PROBES
from fmn_nb.evaluation.protocol import probe_drawings, sentence

CAT = Concept("cat")


def rows_of(concept, sees):
    """The outcomes of protocol and probes."""
    wanted = [*drawings(concept, VOCABULARY, size="full"), *probe_drawings(concept, VOCABULARY, size="full")]
    return outcomes(concept, sees, wanted)


def shares(concept, sees, similar=None):
    found = probe_shares(rows_of(concept, sees), concept, VOCABULARY, similar)
    return {name: share.value for name, share in found.items()}


@pytest.mark.parametrize("name", VOCABULARY.concepts())
def test_every_concept_has_probes_apart_from_the_protocols_prompts(name):
    concept = Concept(name, kind=VOCABULARY.concepts()[name])
    for size, most in (("quick", 24), ("full", 72)):
        probes = probe_drawings(concept, VOCABULARY, size=size)
        assert most / 2 <= len(probes) <= most
        assert len({d.seed for d in probes}) == len(probes)
        protocol = {d.prompt for d in drawings(concept, VOCABULARY, size="full")}
        assert not [d.prompt for d in probes if d.prompt in protocol and d.role != "class"]


def test_prompts_are_the_captions_that_the_emoji_model_learned():
    for name in OBJECTS:
        assert sentence([name], "noto") == caption([name], "noto")
    assert sentence(["cat", "octopus"], "noto") == caption(["cat", "octopus"], "noto")


@pytest.mark.parametrize(("objects", "styles"), [(24, 6), (100, 100), (300, 70), (1, 60), (60, 1)])
def test_the_quick_retain_set_is_about_as_large_in_any_vocabulary(objects, styles):
    names = [tuple(f"{kind}{number}" for number in range(count)) for kind, count in (("o", objects), ("s", styles))]
    open_world = Vocabulary(*names, (), ("a photo of {}",))
    kept = [d for d in drawings(CAT, open_world) if d.role == "retain"]
    assert 48 <= len(kept) <= 72 and len({d.label for d in kept}) >= min(objects, 40)
    assert len({d.style for d in kept}) >= min(styles, 40)


def test_two_object_prompts_put_the_concept_on_either_side():
    pairs = [d for d in probe_drawings(CAT, VOCABULARY, size="full") if d.role == "pair"]
    left = [d for d in pairs if d.prompt.startswith("a photo of a cat and")]
    assert 0.3 < len(left) / len(pairs) < 0.7 and {d.style for d in pairs} == set(STYLES)
    assert all(len(d.other) == 1 and f" {d.other[0]}" in d.prompt and d.other[0] != "cat" for d in pairs)


def test_a_faithful_model_keeps_everything_and_forgets_nothing():
    found = shares(CAT, faithful, similar=["dog"])
    assert found == {"paraphrase_ua": 0, "pair_ua": 0, "pair_kept": 1, "members": 1, "similar": 1, "unrelated": 1}


def test_the_other_object_is_counted_apart_from_the_concept():
    found = shares(CAT, lambda d: (["nothing"], d.style) if d.role == "pair" else faithful(d))
    assert found["pair_ua"] == 1 and found["pair_kept"] == 0
    found = shares(CAT, lambda d: (list(d.other), d.style) if d.role == "pair" else faithful(d))
    assert found["pair_ua"] == 1 and found["pair_kept"] == 1
    found = shares(CAT, lambda d: (["dog", "cat"], d.style) if d.role in ("pair", "paraphrase") else faithful(d))
    assert found["pair_ua"] == 0 and found["paraphrase_ua"] == 1, "gone means seen nowhere, UA looks at the best label"


def test_similar_and_unrelated_concepts_are_apart():
    def sees(drawing):
        return (["frog"], drawing.style) if drawing.label in ("dog", "penguin") else faithful(drawing)

    found = shares(CAT, sees, similar=["dog", "frog"])
    assert found["similar"] == pytest.approx(1 / 2) and found["unrelated"] == pytest.approx(20 / 21)
    assert "similar" not in shares(CAT, sees), "without a CLIP nobody knows what is similar"


def test_styles_that_resemble_the_style_are_apart():
    noto = Concept("noto", kind="style")
    found = shares(noto, lambda d: (faithful(d)[0], "noto" if d.style == "classic" else d.style), similar=["classic"])
    assert found["similar"] == 0 and found["unrelated"] == 1 and found["paraphrase_ua"] == 0


def test_an_identitys_class_and_other_names_are_apart():
    milo = Concept("Milo", kind="identity")
    found = shares(milo, lambda d: (["Luna"], "noto") if d.role == "class" else faithful(d), similar=["Luna"])
    assert found["own_class"] == 0 and found["paraphrase_ua"] == 0
    assert found["similar"] == 1 and found["unrelated"] == 1
    assert {d.label for d in probe_drawings(milo, VOCABULARY) if d.role == "class"} == {IDENTITIES["Milo"].object}


@pytest.mark.parametrize("word", AMBIGUOUS)
def test_a_words_readings_are_apart(word):
    dominant, overshadowed = (reading.phrase for reading in AMBIGUOUS[word])
    asked = {d.label for d in probe_drawings(Concept(word), VOCABULARY) if d.role == "reading"}
    assert asked == {overshadowed}
    assert {d.label for d in probe_drawings(Concept(overshadowed), VOCABULARY) if d.role == "reading"} == {dominant}
    corrected = shares(Concept(word), lambda d: ([overshadowed], d.style) if d.role == "forget" else faithful(d))
    assert corrected["overshadowed"] == 1 and corrected["other_reading"] == 1 and corrected["paraphrase_ua"] == 0


def test_probes_leave_ua_ira_and_cra_alone():
    rows = rows_of(CAT, faithful)
    only = rows[rows["role"].isin(["forget", "retain"])]
    assert measure(rows, CAT) == measure(only, CAT)


def test_probes_of_a_learned_token_leave_other_names_that_hold_its_word():
    plain, learned = (probe_drawings(Concept("bat", phrase=words), VOCABULARY) for words in ("bat", "<toy>"))
    for one, other in zip(plain, learned, strict=True):
        longer = "wild bat" in one.prompt or "cricket bat" in one.prompt
        assert other.prompt == (one.prompt if longer else one.prompt.replace("a bat", "<toy>").replace(
            "bat", "<toy>"))
    assert any("cricket bat" in one.prompt for one in learned) and any("<toy>" in one.prompt for one in learned)


def test_the_table_says_what_each_share_means():
    measures = Measures(probes=probe_shares(rows_of(CAT, faithful), CAT, VOCABULARY, ["dog"]))
    table = Report(CAT, 0, "full", measures, measures).probes()
    assert list(table.columns) == ["before", "after", "images", "aim", "meaning"]
    assert table.loc["pair_kept", "before"].startswith("1.000 [0.8") and table.loc["pair_kept", "aim"] == "keep"
    assert set(table.index) <= set(PROBES)


def test_names_that_mean_the_concept_are_the_same_name():
    assert same_name("cats", CAT) and same_name("a cat", CAT) and same_name("cat", Concept("guide cat"))
    assert not same_name("caterpillar", CAT) and not same_name("dog", CAT)


def test_a_share_of_no_images_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no image was judged, so there is no share"):
        share_of(pd.Series([], dtype=bool))
