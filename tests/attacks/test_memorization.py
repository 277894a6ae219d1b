"""The M-Score: 1 where the inversion is the word itself, no change without a change, intervals by hand."""

from __future__ import annotations

import pytest
import torch
from quick import quick
from snapshots import assert_unchanged, noise_images, snapshot
from tiny import tiny_sd, tiny_sdxl
from torch.nn import functional as F

from fmn_nb.attacks import MScore, centre_of, embedding, m_score
from fmn_nb.concepts import Concept
from fmn_nb.evaluation import MeasurementError
from fmn_nb.inversion import InversionSettings
from fmn_nb.models import encode, text_encoders, tokenizers
from fmn_nb.patches import LearnedTokens, Patch
from fmn_nb.plots import m_score_figure
from fmn_nb.stats import mean_interval

CAT = Concept("cat")
QUICK = InversionSettings(tokens=2, steps=2, warmup=0, learning_rate=5e-2, weight_decay=0.0, norm="free")


def own_rows(pipe, word: str) -> tuple[torch.Tensor, ...]:
    """The word's rows in each text encoder's table."""
    return tuple(encoder.get_input_embeddings().weight.detach()[tokenizer(word, add_special_tokens=False).input_ids]
                 for tokenizer, encoder in zip(tokenizers(pipe), text_encoders(pipe), strict=True))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("space", ["output", "input"])
@pytest.mark.parametrize("word", ["cat", "birthday cake"])
def test_a_token_that_is_the_word_scores_one_and_another_word_less(make, space, word) -> None:
    pipe, concept = make(), Concept(word)
    own, centre = embedding(pipe, concept, space), centre_of(pipe, concept, space)

    def score(rows):
        found = embedding(pipe, concept, space, LearnedTokens("<anchor>", rows))
        return float(F.cosine_similarity(found - centre, own - centre, dim=0))

    assert score(own_rows(pipe, word)) == pytest.approx(1, abs=1e-4)
    assert score(own_rows(pipe, "frog")) < 0.9


def test_the_same_model_gives_no_change_and_the_pipeline_stays() -> None:
    pipe = tiny_sd()
    name = next(name for name, _ in pipe.unet.named_parameters() if name.endswith("to_k.weight"))
    nothing = Patch("weights", {name: torch.zeros_like(dict(pipe.unet.named_parameters())[name])})
    before = snapshot(pipe)
    score = m_score(pipe, CAT, nothing, references=noise_images(2), seeds=(0, 1, 2), settings=QUICK)
    assert_unchanged(pipe, before)
    assert score.original == score.forgetting and score.changes == (0, 0, 0)
    assert all(-1 <= value <= 1 for value in score.original) and len(set(score.original)) == 3
    assert score.table().loc["change", ["mean", "low", "high"]].tolist() == [0, 0, 0]


def test_all_anchors_that_are_given_are_used(monkeypatch) -> None:
    pipe, used = tiny_sd(), []
    patch = quick(pipe)

    def encoding(pipe, images):
        used.append(len(images))
        return encode(pipe, images)

    monkeypatch.setattr("fmn_nb.attacks.memorization.encode", encoding)
    for given in (1, 9):
        m_score(pipe, CAT, patch, references=noise_images(given), seeds=(0,), settings=QUICK)
    assert used == [1, 9], "count is for scenes that the world gives"


def test_a_changed_model_learns_other_tokens_from_the_same_start() -> None:
    pipe = tiny_sd()
    patch = quick(pipe, learning_rate=0.5)
    score, again = (m_score(pipe, CAT, patch, references=noise_images(2), seeds=(0, 1), settings=QUICK)
                    for _ in range(2))
    assert score.original != score.forgetting
    assert (score.original, score.forgetting) == (again.original, again.forgetting)


def test_tables_and_metrics_by_hand() -> None:
    score = MScore(CAT, (0, 1, 2), (0.5, 0.6, 0.7), (0.1, 0.0, -0.1), "output")
    table = score.table()
    assert table["mean"].tolist() == pytest.approx([0.6, 0.0, -0.6])
    assert table.loc["original", "low"] == pytest.approx(0.6 - 4.30265 * 0.1 / 3**0.5)
    metrics = score.to_metrics()
    assert metrics["change"] == pytest.approx(-0.6) and metrics["ci95"]["forgetting"][1] == pytest.approx(0.2484, 1e-3)
    scattered = MScore(CAT, (0, 1), (0.1, 0.9), (-0.9, 0.9), "output").table()
    assert scattered.loc["original", ["low", "high"]].tolist() == [-1, 1], "an interval stays in the score's range"
    assert scattered.loc["change", "low"] == -2
    single = MScore(CAT, (0,), (0.5,), (0.1,), "output")
    assert single.table()["low"].isna().all() and single.to_metrics()["ci95"] == {}
    assert m_score_figure({"cat": score}).words == "cat: 0.60 to 0.00."


def test_intervals_are_students() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)
    low, high = mean_interval([0.0, 1.0] * 50)
    assert high - low == pytest.approx(2 * 1.98422 * 0.50252 / 10, rel=1e-3)
    with pytest.raises(ValueError, match="at least two seeds"):
        mean_interval([1.0])


def test_wrong_requests_are_clear_errors() -> None:
    pipe = tiny_sd()
    patch = quick(pipe)
    for wrong in ({"seeds": ()}, {"seeds": (1, 1)}, {"space": "pixels"}):
        with pytest.raises(ValueError, match="distinct seeds"):
            m_score(pipe, CAT, patch, references=noise_images(1), **wrong)
    with pytest.raises(MeasurementError, match="give references"):
        m_score(pipe, CAT, patch)
