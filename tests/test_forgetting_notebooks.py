"""Notebooks 03 to 06 beyond their committed run: other models, kinds of concept, and their exercises solved."""

from __future__ import annotations

import json
from functools import partial

import pytest
from course import run_notebook, solve
from tiny import tiny_sd, tiny_sdxl

#: an answer to each exercise that its check must refuse
WRONG = {
    "mean_square": "0.5", "word_only": "patch", "loose": "patch", "both": "patch",
    "two_means": "(0.5, 0.5)", "needed": "30", "strict_ua": "1.5", "weaker": "report.after",
    "fair": "(1, report.after)",
    "mean_change": "0.4", "in_input": "score", "from_word": "fmn.LearnedTokens('<s>', (start,))",
    "control": "inverted['4 tokens']", "paper_back": "relearned",
    "sum_rank": "8", "pressed": "combined", "weighted": "tables['apart']", "reverse": "tables['one after another']",
    "dominated": "corrected",
}
SMALL = {  # what makes a notebook quick, where the result doesn't matter
    "03": {"steps": 4}, "04": {}, "05": {"inversion_steps": 5, "images": 4, "draw_steps": 4},
    "06": {"steps": 3, "images": 2, "draw_steps": 4},
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", SMALL)
def test_every_solution_passes_its_check_and_a_wrong_one_does_not(number, tmp_path):
    run_notebook(number, tmp_path, SMALL[number], partial(solve, wrong=WRONG))


@pytest.mark.parametrize("number", ["03", "04", "05"])
@pytest.mark.parametrize("concept, kind", [("noto", "style"), ("Milo", "identity"), ("birthday cake", "object")])
def test_they_take_any_kind_of_concept(number, concept, kind, tmp_path):
    run_notebook(number, tmp_path, {"concept": concept, "kind": kind, "seed": 1} | SMALL[number])
    assert json.loads((tmp_path / "runs" / "notebooks" / "metrics.json").read_text())


@pytest.mark.parametrize("number", SMALL)
@pytest.mark.parametrize("model", [tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def test_they_take_real_checkpoints(number, model, tmp_path):
    """Pipelines of the real architectures, saved and loaded as a checkpoint's folder is."""
    model().save_pretrained(tmp_path / "model")
    run_notebook(number, tmp_path, {"model": str(tmp_path / "model")} | SMALL[number])


def test_several_concepts_of_two_words_and_another_ambiguous_word(tmp_path):
    run_notebook("06", tmp_path, {"concepts": "birthday cake, alarm clock, frog", "word": "bow"} | SMALL["06"])
