"""The evaluation on judges and images with known answers: every figure equals the one computed by hand."""

import math

import numpy as np
import pytest
from judges import Puppet, faithful, outcomes, picture
from PIL import Image

from fmn_nb.concepts import Concept
from fmn_nb.emoji import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import Measures, drawings, harmonic_mean, judge_images, measure
from fmn_nb.evaluation.protocol import FORGET_SET, REPEATS, image_seed
from fmn_nb.stats import harmonic_mean_interval, wilson

CAT = Concept("cat")


def figures(concept, sees):
    return measure(outcomes(concept, sees), concept)


def test_wilson_intervals_are_the_textbook_ones():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0
    for successes, count in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="is not a share"):
            wilson(successes, count)


def test_the_harmonic_means_interval_has_a_width_at_its_ends_and_contains_the_figure():
    low, high = harmonic_mean_interval((0, 24, 24), (24, 24, 24))
    assert low == 0 and 0.1 < high < 0.4, "0 of 24 can be a share of a tenth"
    low, high = harmonic_mean_interval((24, 24, 24), (24, 24, 24))
    assert 0.85 < low < 0.98 and high == 1
    for successes in ((0, 0, 0), (1, 23, 12), (23, 24, 24), (24, 0, 24)):
        low, high = harmonic_mean_interval(successes, (24, 24, 24), seed=5)
        assert 0 <= low <= harmonic_mean(*(hits / 24 for hits in successes)) <= high <= 1 and low < high
        assert (low, high) == harmonic_mean_interval(successes, (24, 24, 24), seed=5)
    for successes, totals in (((1,), (1, 2)), ((), ()), ((1, 0), (1, 0)), ((3, 1), (2, 1))):
        with pytest.raises(ValueError, match=r"one total for each|is not a share"):
            harmonic_mean_interval(successes, totals)


@pytest.mark.parametrize("truth", [(0.03, 0.95, 0.95), (0.97, 0.95, 0.95), (0.5, 0.9, 0.8), (0.97, 0.5, 0.97)])
def test_the_harmonic_means_interval_covers_the_truth_as_often_as_it_says(truth):
    totals, rng = (24, 46, 46), np.random.default_rng(0)
    counts = rng.binomial(totals, truth, (400, 3))
    intervals = [harmonic_mean_interval(tuple(row), totals, seed) for seed, row in enumerate(counts.tolist())]
    covered = np.mean([low <= harmonic_mean(*truth) <= high for low, high in intervals])
    assert 0.91 < covered < 0.995, f"{covered:.3f} of the intervals hold the truth"


def test_the_harmonic_mean_praises_nobody_for_one_figure():
    assert harmonic_mean(1, 0, 1 / 6) == 0
    assert harmonic_mean(1, 1, 1) == 1
    assert harmonic_mean(1, 0.5, 0.25) == pytest.approx(3 / 7)


@pytest.mark.parametrize(("sees", "by_hand", "interval"), [
    (faithful, (0, 1, 1, 0), (0, 0.3)),
    (lambda d: ("dog", d.style) if d.role == "forget" else faithful(d), (1, 1, 1, 1), (0.9, 1)),
    (lambda d: ("nothing", "noto"), (1, 0, 1 / len(STYLES), 0), (0, 0.1)),
], ids=["nothing forgotten", "the concept alone", "noise"])
def test_figures_of_models_whose_answers_are_known(sees, by_hand, interval):
    found = figures(CAT, sees)
    assert (found.ua, found.ira, found.cra, found.h) == pytest.approx(by_hand)
    low, high = found.ci95["h"]
    assert interval[0] <= low < high <= interval[1] and high - low > 0.01, "so many images can't rule out everything"


def test_figures_by_hand_for_an_object():
    def sees(drawing):
        if drawing.role == "forget":
            return ("cat" if drawing.style == "noto" else "dog"), drawing.style
        label = "frog" if drawing.label == "dog" else drawing.label
        return label, ("noto" if drawing.style == "fluent" else drawing.style)

    found = figures(CAT, sees)
    assert found.ua == pytest.approx(5 / 6)
    assert found.ira == pytest.approx(22 / 23)
    assert found.cra == pytest.approx(5 / 6)
    assert found.h == pytest.approx(3 / (6 / 5 + 23 / 22 + 6 / 5))
    assert found.images == FORGET_SET["full"] + REPEATS["full"] * 6 * 23


def test_figures_by_hand_for_a_style():
    def sees(drawing):
        return drawing.label, ("noto" if drawing.style == "twemoji" else drawing.style)

    found = figures(Concept("twemoji", kind="style"), sees)
    assert (found.ua, found.ira, found.cra) == (1, 1, 1)
    kept = figures(Concept("twemoji", kind="style"), lambda d: ("cat", d.style))
    assert (kept.ua, kept.ira) == (0, 1) and kept.cra == pytest.approx(1 / len(OBJECTS))


def test_figures_by_hand_for_an_identity():
    def sees(drawing):
        if drawing.label == "Milo":
            return "cat", "noto"
        return ("Milo" if drawing.label == "Luna" else drawing.label), "noto"

    found = figures(Concept("Milo", kind="identity"), sees)
    assert found.ua == 1 and found.ira == pytest.approx(2 / 3) and found.cra == 1


def test_too_few_images_for_a_figure_are_an_error():
    wanted = [d for d in drawings(CAT, VOCABULARY) if d.role == "forget"]
    with pytest.raises(ValueError, match="no image was judged for IRA, CRA"):
        measure(outcomes(CAT, faithful, wanted), CAT)


@pytest.mark.parametrize("size", ["quick", "full"])
@pytest.mark.parametrize("concept", [CAT, Concept("birthday cake"), Concept("mouse"), Concept("noto", kind="style"),
                                     Concept("Milo", kind="identity")])
def test_the_forget_set_names_the_concept_and_the_retain_set_never(concept, size):
    wanted = drawings(concept, VOCABULARY, size=size)
    for drawing in wanted:
        assert (concept.name in drawing.prompt) == (drawing.role == "forget"), drawing.prompt
    assert {d.role for d in wanted} == {"forget", "retain"}
    assert list(outcomes(concept, faithful, wanted)["prompt"]) == [d.prompt for d in wanted], "a row an image"


def test_full_draws_every_object_in_every_style_several_times():
    wanted = drawings(CAT, VOCABULARY, size="full")
    retained = [(d.label, d.style) for d in wanted if d.role == "retain"]
    assert REPEATS["full"] >= 3 and len(retained) == REPEATS["full"] * (len(OBJECTS) - 1) * len(STYLES)
    assert {(d.label, d.style) for d in wanted} == {(o, s) for o in OBJECTS for s in STYLES}
    classes = {d.label for d in drawings(Concept("Milo", kind="identity"), VOCABULARY, size="full")}
    assert classes == {*IDENTITIES, *OBJECTS}, "an identity is measured against its class and the other names"


def test_every_image_has_a_seed_of_its_own_that_never_changes():
    wanted = drawings(CAT, VOCABULARY, seed=3, size="full")
    assert len({d.seed for d in wanted}) == len(wanted)
    assert wanted == drawings(CAT, VOCABULARY, seed=3, size="full")
    assert not {d.seed for d in wanted} & {d.seed for d in drawings(CAT, VOCABULARY, seed=4, size="full")}
    quick = {d.prompt: d.seed for d in reversed(drawings(CAT, VOCABULARY, seed=3))}
    assert all(quick[d.prompt] == d.seed for d in wanted if d.prompt in quick and d.seed == image_seed(d.prompt, 3, 0))


def test_wrong_concepts_and_sizes_list_what_there_is():
    with pytest.raises(match="no object 'unicorn'; its objects:.*umbrella"):
        drawings(Concept("unicorn"), VOCABULARY)
    with pytest.raises(match="holds that name as another kind"):
        drawings(Concept("noto"), VOCABULARY)
    with pytest.raises(ValueError, match="choose quick or full"):
        drawings(CAT, VOCABULARY, size="huge")


def test_an_ambiguous_word_is_judged_by_its_dominant_reading():
    assert VOCABULARY.target_label(Concept("mouse")) == AMBIGUOUS["mouse"][0].phrase
    found = figures(Concept("mouse"), lambda d: ("computer mouse", d.style) if d.role == "forget" else faithful(d))
    assert found.ua == 1


def test_what_could_not_be_computed_is_absent_with_its_reason():
    metrics = Measures(ua=0.5, images=4, skipped={"frechet": "no real images"}).to_metrics()
    assert "frechet" not in metrics and metrics["skipped"] == {"frechet": "no real images"}
    assert not [v for v in metrics.values() if isinstance(v, float) and math.isnan(v)]


@pytest.mark.parametrize(("image", "why"), [
    (None, "is not an image but NoneType"), (np.zeros(3), "is not an image but ndarray"),
    (np.full((4, 4, 3), np.nan), "holds NaN"), (Image.new("RGB", (4, 4)), "is one colour throughout"),
    (np.full((4, 4, 3), 200, np.uint8), "is one colour throughout"),
    (Image.new("L", (4, 4), 255), "is one colour throughout")])
def test_what_is_no_image_is_never_judged(image, why) -> None:
    wanted, judge = drawings(CAT, VOCABULARY)[:2], Puppet(lambda *_: ("dog", "noto"))
    with pytest.raises(ValueError, match=f"{wanted[1].prompt}', seed {wanted[1].seed}, {why}"):
        judge_images(judge, CAT, wanted, [picture(), image], VOCABULARY)
    assert judge.calls == 0 and len(judge_images(judge, CAT, wanted, [picture(), np.eye(4)], VOCABULARY)) == 2
