"""The notebooks beyond their committed run: other models, prompts, concepts and sweeps, and their exercises solved."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from course import WRONG, run_notebook, run_solution
from tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb.files import data_dir, write_json
from fmn_nb.runs.folder import read_sweep

MODELS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
#: what makes a notebook quick, where the result doesn't matter
SMALL = {
    "00": {}, "01": {"draw_steps": 6}, "02": {"draw_steps": 6}, "03": {"steps": 4}, "04": {},
    "05": {"inversion_steps": 5, "images": 4, "draw_steps": 4},
    "06": {"steps": 3, "images": 2, "draw_steps": 4, "sizes": "1, 3"},
    "08": {"steps": 2, "images": 3, "draw_steps": 3},
    "09": {"steps": 2, "images": 3, "draw_steps": 2},
    "10": {"more_presets": "", "images": 2, "draw_steps": 3},
}
FORGETTING = ("03", "04", "05", "06", "08")


@pytest.mark.slow
@pytest.mark.parametrize("number", SMALL)
def test_every_solution_passes_its_check_and_a_wrong_one_does_not(number, tmp_path):
    run_solution(number, tmp_path, SMALL[number], WRONG)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["01", "02"])
@pytest.mark.parametrize("kind", MODELS)
def test_attention_is_seen_in_any_model_prompt_phrase_and_seed(number, kind, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / kind)
    word = {"01": {"phrase": "blue background"}, "02": {"concept": "blue background", "out": str(tmp_path / "run")}}
    run_notebook(number, tmp_path, {"model": str(tmp_path / kind), "prompt": "a fish on a blue background", "seed": 3,
                                    "draw_steps": 2} | word[number])
    if number == "02":
        assert (tmp_path / "run" / "images" / "attention_steps.gif").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("concept, kind", [("frog", "object"), ("noto", "style")])
def test_notebook_02_looks_for_other_concepts(concept, kind, tmp_path):
    run_notebook("02", tmp_path, {"concept": concept, "kind": kind, "draw_steps": 4})


@pytest.mark.slow
@pytest.mark.parametrize("number", ["03", "04", "05", "08"])
@pytest.mark.parametrize("concept, kind", [("noto", "style"), ("Milo", "identity"), ("birthday cake", "object")])
def test_any_kind_of_concept_is_forgotten(number, concept, kind, tmp_path):
    run_notebook(number, tmp_path, {"concept": concept, "kind": kind, "seed": 1} | SMALL[number])
    assert number == "08" or json.loads((tmp_path / "runs" / "notebooks" / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("number", FORGETTING)
@pytest.mark.parametrize("model", [tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def test_real_checkpoints_are_taken(number, model, tmp_path):
    """Pipelines of the real architectures, saved and loaded as a checkpoint's folder is."""
    model().save_pretrained(tmp_path / "model")
    run_notebook(number, tmp_path, {"model": str(tmp_path / "model")} | SMALL[number])


@pytest.mark.slow
@pytest.mark.parametrize("number", ["02", "03", "04", "05", "06", "08"])
def test_a_model_of_the_world_with_joint_attention_is_taken(number, joint_model, tmp_path):
    run_notebook(number, tmp_path, {"model": str(joint_model)} | SMALL[number])


@pytest.fixture(scope="module")
def joint_model(tmp_path_factory):
    """The folder of the organism with joint attention in its smoke size."""
    from fmn_nb.emoji.training.recipe import pretrain
    from fmn_nb.emoji.training.request import Request

    request = Request(tmp_path_factory.mktemp("models"), organism="joint", smoke=True, stages=["joint"])
    return pretrain(request, lambda line: None) / request.made.folder


@pytest.mark.slow
def test_notebook_08_compares_any_presets_and_fuses_any_number_of_concepts(tmp_path):
    few = {"presets": "uce, esd-u", "others": "frog, alarm clock, dog"}
    run_notebook("08", tmp_path, few | SMALL["08"])


@pytest.mark.slow
def test_several_concepts_of_two_words_and_another_ambiguous_word(tmp_path):
    run_notebook("06", tmp_path, {"concepts": "birthday cake, alarm clock, frog", "word": "bow"} | SMALL["06"])


def test_the_bundled_example_is_whole_and_small():
    folder = data_dir() / "sweep-example"
    results = read_sweep(folder)
    assert list(results.runs["status"]) == ["done"] * results.planned and results.planned == 6 and not results.notes
    assert results.specification["grid"] == {"concept": ["cat", "frog"], "steps": [5, 15, 35]}
    assert all(results.images(run) for run in results.runs.index)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    texts = [path.read_text(encoding="utf-8") for path in files if path.suffix in (".json", ".csv", ".yaml")]
    assert not [text for text in texts if "/work/" in text or "/home/" in text or "/tmp/" in text]


def test_the_sweep_s_exercises_have_solutions_that_pass_and_checks_that_refuse(tmp_path):
    run_solution("07", tmp_path, {"out": str(tmp_path / "out")}, WRONG)
    assert len(list((tmp_path / "out" / "images").glob("sweep_*.png"))) == 3


@pytest.mark.parametrize("varied", [["seed"], ["concept", "seed"], []])
def test_notebook_07_reads_a_sweep_of_one_s_own_with_failed_and_missing_parts(tmp_path, varied):
    sweep = tmp_path / "mine"
    write_json(sweep / "sweep.json", {"runs": 4, "varied": varied, "notebooks": ["04"], "specification": {}})
    rows = [{"folder": f"frog-{seed}", "concept": "frog", "preset": "paper", "seed": seed, "status": "done",
             "seconds": 3.0, "error": "", "after.ua": 0.25 * seed, "after.ira": 0.5, "after.cra": 0.5, "after.h": 0.3}
            for seed in range(3)]
    failed = {**rows[0], "folder": "frog-9", "seed": 9, "status": "failed", "error": "04_evaluate.ipynb failed"}
    pd.DataFrame([*rows, failed]).to_csv(sweep / "results.csv", index=False)
    notebook = run_notebook("07", tmp_path, {"sweep": str(sweep), "measure": "ua", "out": str(tmp_path / "out")})
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "04_evaluate.ipynb failed" in shown and "4 runs planned: 3 done, 1 failed" in shown
    assert "images were not kept" in shown
