"""The evaluation evaluates itself: the whole of it, with the bundled judge, on images whose answers are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from quick import quick
from snapshots import noise_images
from synthetic import faultless, noise, without
from tiny import tiny_sd

import fmn_nb as fmn
from fmn_nb.attacks import m_score, paraphrase_attack
from fmn_nb.concepts import NOTHING, Concept
from fmn_nb.emoji import STYLES
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import Session, draw_images, drawings, judge_images
from fmn_nb.evaluation.quality import FeatureMismatchError
from fmn_nb.files import data_dir
from fmn_nb.models import drawing_key
from fmn_nb.patches import Patch, PatchMismatchError, applied_patches
from fmn_nb.runs.folder import record
from fmn_nb.runs.metrics import validate
from fmn_nb.stats import harmonic_mean_interval

CAT = Concept("cat")


@pytest.fixture(scope="module")
def patch(emoji):
    name, parameter = next((n, p) for n, p in emoji.unet.named_parameters() if "attn2.to_k" in n)
    return Patch("weights", {name: 0 * parameter.detach()}, {"base": {"fingerprint": fmn.fingerprint(emoji)}})


@pytest.fixture
def perfect(world):
    """What a faultless model draws."""
    return lambda wanted: faultless(world, wanted)


@pytest.fixture
def evaluated(emoji, perfect, patch, monkeypatch):
    """Evaluate with the images that a function makes of the drawings, after and before."""

    def run(after, concept=CAT, before=perfect, **options):
        models = iter((before, after))
        monkeypatch.setattr("fmn_nb.evaluation.session.draw_images", lambda pipe, wanted, **how: next(models)(wanted))
        return fmn.evaluate(emoji, concept, patch=patch, steps=1, **options)

    return run


def binomial_interval(count, share):
    """The numbers of successes between which a binomial variable lies with at least 95%, each tail at most 2.5%."""
    chances = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
    below = np.cumsum(chances)
    return int(np.searchsorted(below, 0.025)), int(np.searchsorted(below, 0.975))


def test_a_model_that_forgot_nothing_has_no_unlearning_accuracy(perfect, evaluated):
    report = evaluated(perfect)
    for found in (report.before, report.after):
        assert found.ua == 0 and found.ira > 0.97 and found.cra > 0.95 and found.h == 0
        assert found.probes["paraphrase_ua"].value < 0.2 and found.probes["pair_kept"].value > 0.8
    assert report.after.frechet == report.before.frechet
    assert (report.collateral()["change"] == 0).all()


def test_a_model_that_forgot_the_concept_alone_reaches_its_ceiling(world, evaluated):
    report = evaluated(lambda w: without(world, w, "cat", "umbrella"))
    assert report.after.ua == 1 and report.after.h == pytest.approx(report.after.ceiling)
    assert report.after.probes["pair_ua"].value == 1 and report.after.probes["pair_kept"].value > 0.8
    confusion = report.confusion("after")
    assert confusion.loc["cat", "umbrella"] == confusion.loc["cat"].sum() == 24


def test_a_model_that_draws_noise_is_not_praised(evaluated):
    report = evaluated(noise)
    assert report.after.ua > 0.95 and report.after.ira < 0.05 and report.after.h < 0.1
    retained = sum(d.role == "retain" for d in report.wanted)
    low, high = binomial_interval(retained, 1 / len(STYLES))
    assert low <= round(report.after.cra * retained) <= high, "the style of noise can only be guessed"
    assert report.after.frechet > 3 * report.before.frechet and report.after.kernel > report.before.kernel
    assert (report.outcomes.query("when == 'after'")["seen_label"] == NOTHING).mean() > 0.9


def test_swapping_two_prompts_images_is_noticed(perfect, evaluated):
    def swapped(wanted):
        images = perfect(wanted)
        retain = [i for i, d in enumerate(wanted) if d.role == "retain"]
        first = retain[0]
        second = next(i for i in retain if wanted[i].label != wanted[first].label)
        images[first], images[second] = images[second], images[first]
        return images

    report = evaluated(swapped)
    retained = sum(d.role == "retain" for d in report.wanted)
    assert report.after.ira == pytest.approx(report.before.ira - 2 / retained)
    assert (report.collateral()["change"] < 0).sum() >= 2


def test_a_missing_image_is_an_error(perfect, evaluated):
    with pytest.raises(ValueError, match="94 images were asked for, 93 are there"):
        evaluated(perfect, before=lambda w: perfect(w)[1:])


def test_a_judge_that_leaves_images_out_is_an_error(world, perfect, evaluated):
    class Lazy:
        def verdicts(self, images):
            return world.judge.verdicts(images)[:-1]

    with pytest.raises(ValueError, match="93 verdicts on 94 images"):
        evaluated(perfect, judge=Lazy())


def test_styles_identities_and_ambiguous_words_are_measured_alike(evaluated):
    for concept in (Concept("noto", kind="style"), Concept("Milo", kind="identity"), Concept("mouse")):
        report = evaluated(noise, concept)
        assert report.before.ua < 0.1 and min(report.before.ira, report.before.cra) > 0.9, concept
        least = 0.5 if concept.kind == "style" else 0.8  # in noise a style can be guessed, an object is not seen
        assert report.after.ua > least and report.after.h < 0.2, concept
        probes = set(report.before.probes)
        assert {"identity": {"own_class"}, "style": {"pair_kept"},
                "object": {"other_reading", "overshadowed"}}[concept.kind] <= probes, concept


def test_a_second_opinion_on_the_same_verdicts_agrees(world, evaluated):
    report = evaluated(noise)
    opinion = report.second_opinion(world.judge)
    assert opinion["within"].dropna().all() and (opinion["first"] == opinion["second"]).all()
    roles = report.outcomes.query("when == 'before'").groupby("role").size()
    totals = [int(roles[role]) for role in ("forget", "retain", "retain")]
    shares = (report.before.ua, report.before.ira, report.before.cra)
    hits = [round(share * total) for share, total in zip(shares, totals, strict=True)]
    interval = harmonic_mean_interval(hits, totals)
    assert tuple(opinion.loc[("before", "h"), ["low", "high"]]) == interval and interval[1] > 0


@pytest.mark.skipif(not (data_dir() / "emoji-second-judge" / "config.json").is_file(),
                    reason="the second judge isn't in data/: fmn-nb pretrain --stages second-judge")
def test_two_judges_agree_on_what_the_model_draws(emoji, world):
    forget_set = [d for d in drawings(CAT, VOCABULARY, size="full") if d.role == "forget"][:6]
    retain = [d for d in drawings(CAT, VOCABULARY) if d.role == "retain"]
    wanted = [*forget_set, *(retain[i * len(retain) // 18] for i in range(18))]
    images = draw_images(emoji, wanted)
    first, second = (judge_images(judge, CAT, wanted, images, VOCABULARY)
                     for judge in (world.judge, world.second_judge))
    same = (first["seen_label"] == second["seen_label"]).mean()
    assert len(images) == 24 and same >= 0.8, f"the same label in {same:.0%} of the images"


def test_distances_on_other_features_are_not_put_side_by_side(evaluated):
    report = evaluated(noise)
    foreign = replace(report, after=replace(report.after, features="inception-v3-compat 2048"))
    with pytest.raises(FeatureMismatchError, match="can't be compared"):
        foreign.table()


def test_the_pipeline_is_left_as_it_was(emoji, evaluated):
    before = drawing_key(emoji, 1, 1.0, 1)
    with pytest.raises(ValueError, match="images were asked for"):
        evaluated(lambda w: [])
    assert drawing_key(emoji, 1, 1.0, 1) == before and not applied_patches(emoji)


def test_a_report_shows_itself_and_fills_metrics(world, evaluated, tmp_path):
    report = evaluated(lambda w: without(world, w, "cat", "umbrella"))
    page = report._repr_html_()
    assert page.count("<img alt=") == len(report.figures()) == 4 and "evaluation_seconds" in page
    header = {"model": "emoji", "concept": {"name": "cat", "kind": "object"}, "preset": "balanced", "seed": 0,
              "versions": {}}
    validate(record(tmp_path, header | report.to_metrics()), ("before", "after", "attention", "cost"))
    costs = report.costs()
    assert set(costs.index) == set(report.cost) and costs.loc["patch_bytes"].tolist() == [report.cost["patch_bytes"],
                                                                                         "bytes"]
    assert costs.loc["evaluation_seconds", "unit"] == "s" and not set(report.cost) & set(report.table().index)
    report.save(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"outcomes.csv", "collateral.csv"}
    assert report.attention == {f"{of}_{when}": pytest.approx(report.attention_layers[f"{part}_{when}"].mean())
                                for of, part in (("mass", "words"), ("later", "later")) for when in ("before", "after")}
    assert list(report.attention_layers.columns) == ["words_before", "later_before", "words_after", "later_after"]


def test_a_patch_of_another_model_is_refused_before_anything_is_drawn(emoji, monkeypatch):
    patch = quick(tiny_sd(), references=noise_images(1))
    monkeypatch.setattr(Session, "draw", lambda *_: pytest.fail("drawn before the refusal"))
    monkeypatch.setattr("fmn_nb.attacks.memorization.invert", lambda *_, **__: pytest.fail("inverted"))
    for asked in (lambda: fmn.evaluate(emoji, "cat", patch=patch), lambda: m_score(emoji, Concept("cat"), patch),
                  lambda: paraphrase_attack(emoji, Concept("cat"), patch)):
        with pytest.raises(PatchMismatchError):
            asked()
