"""Floors: curves that end where the attacks end, budgets from the oracle's curve, excess and interval, distances."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from judges import cats
from quick import quick
from sessions import session
from snapshots import assert_unchanged, noise_images, snapshot
from tiny import tiny_flux, tiny_sd

import fmn_nb as fmn
from fmn_nb.attacks import (
    InversionBudget,
    SearchBudget,
    Tries,
    adversarial_prompt,
    attacked,
    choose_budgets,
    concept_inversion,
    curves,
    fix_budgets,
    read_budgets,
    success_curve,
)
from fmn_nb.attacks import floor as floors
from fmn_nb.attacks.budgets import UNFIXED, Budgets
from fmn_nb.attacks.floor import at_budget
from fmn_nb.concepts import Concept
from fmn_nb.evaluation import MeasurementError, Session
from fmn_nb.evaluation import oracle as oracles
from fmn_nb.evaluation.oracle import NO_ORACLE, Distance, distances, loss_difference, mean_loss, side
from fmn_nb.models import generate
from fmn_nb.stats import difference_interval, mean_difference_interval, mean_share_interval

CAT, FROG = Concept("cat"), Concept("frog")


def curve(**shares):
    """A curve of 24 images at each number of steps: curve(s5=0.25)."""
    rows = [{"steps": int(name[1:]), "successes": round(24 * share), "images": 24, "share": share}
            for name, share in shares.items()]
    return pd.DataFrame(rows)


def test_budgets_are_the_last_quiet_one_and_the_one_at_a_half():
    assert choose_budgets(curve(s0=0.0, s5=0.04, s10=0.04, s20=0.3, s40=0.45, s80=0.9)) == {"first": 10, "half": 40}
    assert choose_budgets(curve(s0=0.0, s5=0.2, s10=0.04, s20=0.6)) == {"first": 0, "half": 20}, "quiet up to there"
    assert choose_budgets(curve(s0=0.1, s5=0.5)) == {"half": 5}, "it never was quiet"
    assert choose_budgets(curve(s0=0.0, s5=0.02, s10=0.2)) == {"first": 5}, "nowhere near a half"
    assert choose_budgets(curve(s0=0.0, s5=0.4, s10=0.6)) == {"first": 0, "half": 5}, "the fewer of two as near"


def test_budgets_for_those_in_a_hurry_stay_within_the_first():
    known = Budgets({"relearning": {"first": 80, "half": 90}, "concept inversion": {"first": 5, "half": 20}}, "fixed",
                    {"relearning": (0, 80, 90), "concept inversion": (0, 5, 20)})
    quick = known.at_most(30)
    assert quick.steps == {"relearning": {"first": 30}, "concept inversion": {"first": 5, "half": 20}}
    assert quick.tried["relearning"] == (0,) and quick.source == "fixed; here at most 30 steps"
    known = replace(known, steps=known.steps | {"adversarial prompt": {"first": 16}})
    quick = known.at_most(30, rounds=8)
    assert quick.steps["adversarial prompt"] == {"first": 8} and quick.steps["relearning"] == {"first": 30}
    assert quick.source == "fixed; here at most 30 steps or 8 rounds"


def test_the_excess_by_hand_and_its_interval():
    models = {"forgetting model": [curve(s5=0.75), curve(s5=0.25)], "oracle": [curve(s5=0.25)],
              "unchanged model": [curve(s5=1.0), curve(s5=1.0)]}
    found = at_budget(models, 5)
    assert (found["success"], found["floor"], found["unchanged"], found["excess"]) == (0.5, 0.25, 1.0, 0.25)
    assert found["residual"] == pytest.approx(1 / 3) and found["images"] == 48
    assert found["low"] < 0 < 0.25 < found["high"] and found["withstood"], "two seeds scatter this much"
    sure = at_budget(models | {"forgetting model": [curve(s5=0.75)] * 2}, 5)
    assert sure["low"] > 0 and not sure["withstood"]
    assert at_budget(models | {"unchanged model": [curve(s5=0.4)]}, 5)["residual"] is None


def test_the_intervals_hold_the_truth_and_narrow_with_images():
    few, many = (difference_interval([(n // 2, n)] * 3, [(n // 4, n)] * 3) for n in (12, 200))
    assert few[0] < many[0] < 0.25 < many[1] < few[1]
    low, high = difference_interval([(0, 24)], [(0, 24)])
    assert low < 0 < high, "none of 24 is not surely none"
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        sides = [[(int(rng.binomial(24, p)), 24) for _ in range(3)] for p in (0.5, 0.3)]
        low, high = difference_interval(*sides)
        held += low <= 0.2 <= high
    assert held >= 180
    with pytest.raises(ValueError, match="not repetitions"):
        difference_interval([], [(1, 2)])


def test_a_mean_over_concepts_counts_their_images_and_how_they_differ():
    nothing = [[(0, 24)]] * 5
    low, high = mean_difference_interval(nothing, nothing)
    assert low < 0 < high, "none of 120 is not surely none"
    assert mean_share_interval(nothing)[0] == 0 < mean_share_interval(nothing)[1] < mean_share_interval([[(0, 24)]])[1]
    alike, unlike = [[(12, 24)]] * 4, [[(0, 24)], [(0, 24)], [(24, 24)], [(24, 24)]]
    widths = [high - low for low, high in map(mean_share_interval, (alike, unlike))]
    assert widths[0] < widths[1], "which concepts were asked matters where they differ"
    assert mean_difference_interval([[(3, 24)]], [[(1, 24)]]) == difference_interval([(3, 24)], [(1, 24)])
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        shares = rng.uniform(0, 0.1, 5)  # of the superpopulation: 0.05 on average
        sides = [[[(int(rng.binomial(24, share)), 24)] for share in some] for some in (shares, [0.01] * 5)]
        low, high = mean_difference_interval(*sides)
        held += low <= 0.04 <= high
    assert held >= 180
    with pytest.raises(ValueError, match="both sides need the same"):
        mean_difference_interval([[(1, 2)]], [])
    with pytest.raises(ValueError, match="at least one"):
        mean_share_interval([])


def test_a_curve_ends_where_the_attack_of_that_budget_ends(emoji):
    """The same images, one by one, after an inversion that was judged on the way and after one that wasn't."""
    quickly = Session.of(emoji, steps=2)
    at = success_curve(quickly, CAT, None, "concept inversion", Tries((3, 0, 2), images=4))
    assert at["steps"].tolist() == [0, 2, 3]
    for steps in (2, 3):
        attack = concept_inversion(quickly, CAT, None, budget=InversionBudget(steps=steps, images=4))
        assert at.set_index("steps").loc[steps, "successes"] == attack.successes
        assert at["share"][0] == attack.before.value


def test_a_judged_inversion_learns_what_an_unjudged_one_learns(monkeypatch):
    pipe = tiny_sd()
    references, before, learned, patch = noise_images(6), snapshot(pipe), [], quick(pipe)

    def invert(*given, **options):
        learned.append(fmn.invert(*given, **options))
        return learned[-1]

    monkeypatch.setattr(curves, "invert", invert)
    for at in ((3,), (0, 1, 3)):
        success_curve(session(pipe, cats(0, 1, 2)), CAT, patch, "concept inversion",
                      Tries(at, images=2, references=references))
        assert_unchanged(pipe, before)
    assert len(learned) == 2 and torch.equal(*(one.vectors[0] for one in learned))
    success_curve(session(pipe, cats(0, 1)), CAT, patch, "concept inversion",
                  Tries((3,), images=2, references=references, tokens=2, initial="dog"))
    assert learned[-1].vectors[0].shape[0] == 2 != learned[0].vectors[0].shape[0], "as many tokens as asked for"
    assert not torch.equal(learned[-1].vectors[0][:1], learned[0].vectors[0][:1])


def test_a_search_goes_on_where_it_was_judged():
    pipe, pictures = tiny_sd(), noise_images(4)
    whole = adversarial_prompt(session(pipe, cats(0, 0, 1)), CAT, None, references=pictures,
                               budget=SearchBudget(rounds=3, images=2))
    seen = []
    watching = session(pipe, cats(*[1] * 9))
    object.__setattr__(watching, "seen", lambda *given: seen.append(given[2][0]) or pd.Series([True, False]))
    success_curve(watching, CAT, None, "adversarial prompt", Tries((0, 1, 3), images=2, references=pictures))
    assert seen[0].startswith(whole.found["random_prefix"]) and seen[-1].startswith(whole.found["prefix"])


def test_what_has_no_curve_says_so():
    with pytest.raises(MeasurementError, match="'paraphrases' has no curve; there are concept inversion"):
        success_curve(tiny_sd(), CAT, None, "paraphrases", Tries((1,)))
    with pytest.raises(MeasurementError, match="numbers of steps from 0"):
        Tries(())


def test_budgets_are_written_with_their_date_and_read(oracle, tmp_path):
    sessions = Session.of(oracle, steps=1)
    path = fix_budgets([sessions], [CAT], tmp_path / "b.json", images=2, tried={"relearning": (0, 1)})
    content = json.loads(path.read_text())
    assert content["date"] and content["concepts"] == ["cat"] and len(content["oracles"]) == 1
    assert content["attacks"]["relearning"]["budgets"] == {"first": 1}, "a smoke oracle never shows a cat"
    read = read_budgets(path)
    assert read.steps == {"relearning": {"first": 1}} and content["date"] in read.source
    assert read.judged_at("relearning") == [1]
    assert replace(read, whole=("relearning",)).judged_at("relearning") == [0, 1]
    missing = read_budgets(tmp_path / "none.json")
    assert missing.steps == UNFIXED and missing.source.startswith("not fixed")


SMALL = Budgets({"relearning": {"first": 0, "half": 1}, "concept inversion": {"half": 1}}, "of this test",
                {"relearning": (0, 1), "concept inversion": (0, 1)})


@pytest.fixture(scope="module")
def report(emoji, oracle, tmp_path_factory):
    """A patch of nothing beside an oracle that draws noise: it has all its knowledge."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as quickly:
        quickly.setattr(floors, "read_budgets", lambda: SMALL)
        few, every = floors.attacked, oracles.drawings
        quickly.setattr(floors, "attacked", lambda *given: few(*given, 6))
        quickly.setattr(oracles, "drawings", lambda *given: every(*given)[:24:4])
        patch = quick(emoji, steps=1, learning_rate=0.0)
        return floors.compared(Session.of(emoji, steps=4, cache=cache), CAT, patch, [oracle], 0, "quick"), cache


def test_a_patch_of_nothing_has_all_its_knowledge_left(report):
    found = report[0]
    row = found.attacks.loc["relearning", "first"]
    assert row["floor"] == 0 and row["success"] == row["unchanged"] > 0.5 and row["excess"] == row["success"]
    assert row["residual"] == 1 and row["low"] > 0 and not row["withstood"]
    assert found.revive.loc["relearning", "forgetting model"] == 0
    assert np.isnan(found.revive.loc["relearning", "oracle"])
    for distance in found.distances.values():
        assert distance.unchanged > 0 and distance.scaled == pytest.approx(1, abs=1e-3)
    assert set(found.distances) == {"denoising", "kernel"} and not found.skipped


def test_the_report_and_its_metrics_tell_the_oracle(report):
    nothing = fmn.evaluate(tiny_sd(), CAT, steps=1)
    found = replace(nothing, oracle=report[0])
    assert nothing.oracle.skipped == {"oracle": NO_ORACLE} and "oracle" not in nothing.to_metrics()
    metrics = found.to_metrics()["oracle"]
    assert len(metrics["attacks"]) == 3 and metrics["budgets"] == "of this test"
    assert metrics["steps_to_revive"]["relearning"] == {"forgetting model": 0}
    json.dumps(metrics, allow_nan=False)
    assert "Attacks, above the oracle" in found._repr_html_() and "Distance to the oracle" in found._repr_html_()


def test_what_belongs_to_the_unpatched_models_is_kept(report, emoji, monkeypatch):
    kept = Session.of(emoji, steps=4, cache=report[1])
    monkeypatch.setattr(floors, "success_curve", lambda *_, **__: pytest.fail("measured again"))
    again = floors.curve_of(kept, CAT, None, "relearning", Tries([0, 1], 6))
    with pytest.raises(pytest.fail.Exception, match="measured again"):  # by another judge
        floors.curve_of(replace(kept, judge=cats(0)), CAT, None, "relearning", Tries([0, 1], 6))
    assert again["successes"].iloc[0] == round(6 * report[0].attacks.loc["relearning", "first"]["unchanged"])
    for path in (report[1] / "attacks").glob("*.csv"):
        path.write_text("")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        floors.curve_of(kept, CAT, None, "relearning", Tries([0, 1], 6))


def test_what_is_no_oracle_of_the_concept_is_refused(emoji, oracle):
    taught = floors.compared(Session.of(emoji), FROG, None, [oracle], 0, "quick")
    assert taught.skipped == {"oracle": "the oracle was taught 'frog'; it never learned cat, fluent, Milo, Luna"}
    with pytest.raises(ValueError, match="an oracle is a pipeline, not 'emoji-oracle'; load it"):
        fmn.evaluate(emoji, CAT, oracle=["emoji-oracle"])


def test_a_model_of_another_kind_is_no_oracle():
    report = fmn.evaluate(tiny_sd(), CAT, steps=1, oracle=tiny_flux())
    assert report.oracle.skipped == {"oracle": "an oracle is the same kind of model: this one has a "
                                               "UNet2DConditionModel, the oracle a FluxTransformer2DModel"}


def test_any_pipeline_may_be_the_oracle_and_what_is_missing_is_said():
    report = fmn.evaluate(tiny_sd(), CAT, steps=1, oracle=tiny_sd(seed=1))
    assert set(report.oracle.distances) == {"denoising"} and "kernel distance" in report.oracle.skipped
    assert "give references" in report.oracle.skipped["attacks"] and ("oracle", "attacks") in report.skipped().index
    metrics = report.to_metrics()["oracle"]
    assert metrics["distance"]["denoising"]["value"] == metrics["distance"]["denoising"]["unchanged"] != 0
    assert set(metrics["skipped"]) == {"kernel distance", "attacks"}


def test_the_scale_runs_from_the_second_oracle_to_the_unchanged_model():
    assert Distance(3.0, 5.0).scaled == 0.6 and Distance(3.0, 5.0, 1.0, True).scaled == 0.5
    assert Distance(1.0, 5.0, 1.0, True).scaled == 0 and Distance(5.0, 5.0, 1.0, True).scaled == 1
    assert Distance(1.0, 1.0, 2.0, True).scaled is None


def test_a_models_own_images_are_likelier_under_itself(emoji, oracle):
    asked = session(emoji).fresh_drawings(FROG, 2, 0)
    prompts = [drawing.prompt for drawing in asked]
    sides = [side(Session.of(pipe, steps=4), None, asked) for pipe in (emoji, oracle)]
    assert loss_difference(sides[0], sides[0], prompts, 0) == 0
    assert mean_loss(sides[0], sides[0].images, prompts, 0) < mean_loss(sides[1], sides[0].images, prompts, 0)
    found, _ = distances(sides[0], sides[0], [sides[1], sides[1]], asked, 0)
    assert found["denoising"].zero == 0 and found["denoising"].second and found["denoising"].scaled == 1


def test_an_attack_that_a_model_cannot_take_is_skipped():
    pipe = tiny_sd()
    judged = session(pipe, cats(*[1] * 20))
    pictures = noise_images(6)
    object.__setattr__(judged, "references", lambda *_: pictures)
    found = attacked(judged, CAT, None, [pipe], Budgets({"relearning": {}}, "none", {}), (0,))
    assert found.skipped == {"relearning": "the oracle's curve has none of its budgets"} and found.attacks.empty
    assert generate(pipe, ["a cat"], [0], steps=1)
