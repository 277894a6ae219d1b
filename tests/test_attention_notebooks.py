"""Notebooks 01 and 02 beyond their committed run: on other models, prompts and phrases, and with their solutions."""

from __future__ import annotations

from functools import partial

import pytest
from course import run_notebook, solve
from tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

NOTEBOOKS = ("01", "02")
MODELS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
#: an answer to each exercise that its check must refuse
WRONG = {"shares": "[0.2, 0.3, 0.5]", "factor": "1.0", "head": "(head + 1) % layer.heads", "blind": "image",
         "causal_map": "taught_map", "photo": "attention.mass(target) + 0.5", "early": "whole + 0.1",
         "crossed": "(True, 0.5, 0.5)", "chosen": "min(seen.layers, key=lambda name: mean_scores(layer=name)['iou'])"}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_every_solution_passes_its_check_and_a_wrong_one_does_not(number, tmp_path):
    run_notebook(number, tmp_path, {"draw_steps": 6}, partial(solve, wrong=WRONG))


@pytest.mark.parametrize("number", NOTEBOOKS)
@pytest.mark.parametrize("kind", MODELS)
def test_they_run_on_any_model_prompt_phrase_and_seed(number, kind, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / kind)
    word = {"01": {"phrase": "blue background"}, "02": {"concept": "blue background", "out": str(tmp_path / "run")}}
    run_notebook(number, tmp_path, {"model": str(tmp_path / kind), "prompt": "a fish on a blue background", "seed": 3,
                           "draw_steps": 2} | word[number])
    if number == "02":
        assert (tmp_path / "run" / "images" / "attention_steps.gif").is_file()


@pytest.mark.parametrize("concept, kind", [("frog", "object"), ("noto", "style")])
def test_notebook_02_looks_for_other_concepts(concept, kind, tmp_path):
    run_notebook("02", tmp_path, {"concept": concept, "kind": kind, "draw_steps": 4})
