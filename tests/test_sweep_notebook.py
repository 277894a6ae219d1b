"""Notebook 07: its exercises, and sweeps other than the bundled one."""

from __future__ import annotations

import pandas as pd
import pytest
from course import run_notebook, solve

from fmn_nb.files import write_json
from fmn_nb.paths import data_dir
from fmn_nb.sweep_reading import read_sweep

WRONG = {
    "best": 'done["after.h"].idxmin()',
    "cheap": 'done["forgetting.seconds"].idxmax()',
    "sure": "[(rows[0].run, rows[0].run)]",
    "sequel": '{"notebooks": ["03"], "grid": {"seed": [0, 1, 2]}}',
}


def test_the_bundled_example_is_whole_and_small():
    folder = data_dir() / "sweep-example"
    results = read_sweep(folder)
    assert list(results.runs["status"]) == ["done"] * results.planned and results.planned == 6 and not results.notes
    assert results.specification["grid"] == {"concept": ["cat", "frog"], "steps": [5, 15, 35]}
    assert all(results.images(run) for run in results.runs.index)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    texts = [path.read_text(encoding="utf-8") for path in files if path.suffix in (".json", ".csv", ".yaml")]
    assert not [text for text in texts if "/work/" in text or "/home/" in text or "/tmp/" in text]


def test_its_exercises_have_solutions_that_pass_and_checks_that_refuse(tmp_path):
    run_notebook("07", tmp_path, {"out": str(tmp_path / "out")}, lambda notebook: solve(notebook, WRONG))
    assert len(list((tmp_path / "out" / "images").glob("sweep_*.png"))) == 3


@pytest.mark.parametrize("varied", [["seed"], ["concept", "seed"], []])
def test_it_reads_a_sweep_of_ones_own_with_failed_and_missing_parts(tmp_path, varied):
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
    assert "the runs\' images were not kept" in shown or "images were not kept" in shown
