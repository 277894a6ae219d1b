"""A sweep's folder read as it was left, its figures, and the explorer that shows them."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fmn_nb.files import read_json, write_json
from fmn_nb.plots.tradeoff import cost_and_quality, forgotten_and_kept, measure_along
from fmn_nb.runs.folder import RunFolder, SweepReadingError, read_sweep, record, write_table
from fmn_nb.runs.metrics import MetricsError
from fmn_nb.widgets import SweepExplorer

GRID = [("cat", 5), ("cat", 35), ("frog", 5), ("frog", 35)]


def row(concept: str, steps: int) -> dict:
    ua = steps / 35
    figures = {"ua": ua, "ira": 1 - ua / 10, "cra": 0.9, "h": 0.8 * ua}
    ends = {f"after.ci95.{name}.{end}": value + sign * 0.1
            for name, value in figures.items() for end, sign in ((0, -1), (1, 1))}
    return {"folder": f"{concept}-{steps}", "concept": concept, "seed": 0, "steps": steps, "status": "done",
            "seconds": 10.0 + steps, "error": "", "forgetting.seconds": float(steps), "before.h": 0.1,
            "after.images": 70, **{f"after.{name}": value for name, value in figures.items()}, **ends}


@pytest.fixture
def folder(tmp_path):
    """Four finished runs, a failed one, and one whose process was killed before the table was written."""
    sweep = tmp_path / "sweep"
    write_json(sweep / "sweep.json", {"runs": 7, "varied": ["concept", "steps"], "notebooks": ["03", "04"],
                                     "specification": {"grid": {"concept": ["cat"]}}})
    failed = {"folder": "dog-5", "concept": "dog", "seed": 0, "steps": 5, "status": "failed", "error": "03: no luck"}
    pd.DataFrame([*(row(*one) for one in GRID), failed]).to_csv(sweep / "results.csv", index=False)
    write_json(sweep / "dog-35" / "run.json", {
        "status": "running", "settings": {"concept": "dog", "seed": 0}, "parameters": {"steps": 35}, "notebooks": {}})
    (sweep / "cat-5" / "images").mkdir(parents=True)
    for when, colour in (("before", "red"), ("after", "blue")):
        Image.new("RGB", (64, 64), colour).save(sweep / "cat-5" / "images" / f"{when}_forgetting.png")
    return sweep


def test_every_run_has_a_row_whatever_became_of_it(folder):
    results = read_sweep(folder)
    assert results.runs["status"].to_dict() == {
        "cat-5": "done", "cat-35": "done", "frog-5": "done", "frog-35": "done", "dog-5": "failed",
        "dog-35": "unfinished"}
    assert results.planned == 7 and results.varied == ("concept", "steps") and results.notes == ()
    assert results.specification == {"grid": {"concept": ["cat"]}}
    assert results.runs.loc["dog-5", "error"] == "03: no luck" and results.runs.loc["cat-5", "error"] == ""
    assert results.label("dog-35") == "concept dog, steps 35"
    assert list(results.images("cat-5")) == ["after_forgetting", "before_forgetting"] and results.images("cat-35") == {}


def test_measures_have_a_row_each_with_their_interval(folder):
    measures = read_sweep(folder).measures()
    assert set(measures["measure"]) == {"ua", "ira", "cra", "h"}
    assert set(measures["run"]) == {f"{concept}-{steps}" for concept, steps in GRID}
    (one,) = measures.query("run == 'frog-35' and measure == 'ua'").to_dict("records")
    assert (one["when"], one["value"], one["low"], one["high"]) == ("after", 1.0, 0.9, 1.1)
    assert measures.query("when == 'before'")["low"].isna().all()


def test_a_sweep_that_was_killed_before_its_table_is_read_from_its_runs(folder):
    (folder / "results.csv").unlink()
    for concept, steps in GRID[:2]:
        run = folder / f"{concept}-{steps}"
        write_json(run / "run.json", {"status": "done", "settings": {"concept": concept, "seed": 0},
                                      "parameters": {"steps": steps}, "notebooks": {"03": {"seconds": 2.5}}})
        write_json(run / "metrics.json", {
            "schema": 1, "model": "emoji", "concept": {"name": concept, "kind": "object"}, "preset": "balanced",
            "seed": 0, "versions": {"python": "3.11"}, "after": {"ua": 0.5, "ci95": {"ua": [0.4, 0.6]}}})
    (folder / "cat-35" / "metrics.json").write_text("{}")
    results = read_sweep(folder)
    assert results.runs["status"].to_dict() == {"cat-5": "done", "dog-35": "unfinished"}
    assert results.runs.loc["cat-5", "seconds"] == 2.5
    assert results.measures()[["value", "low", "high"]].to_numpy().tolist() == [[0.5, 0.4, 0.6]]
    assert "results.csv is not there yet" in results.notes[0] and "cat-35 can't be read" in results.notes[1]


def test_runs_of_notebooks_or_a_model_of_before_are_told_apart_from_those_of_now(folder):
    (folder / "results.csv").unlink()
    write_json(folder / "sweep.json", read_json(folder / "sweep.json") | {
        "digests": {"03": "new"}, "model_files": {"frog-35": "another"}})
    for (concept, steps), digest in zip(GRID, ("new", "old", "new", "new"), strict=True):
        run = folder / f"{concept}-{steps}"
        write_json(run / "run.json", {
            "status": "done", "settings": {"concept": concept, "seed": 0}, "parameters": {"steps": steps},
            "notebooks": {"03": {"seconds": 2.5, "sha256": digest}}, "model_files": "one"})
        write_json(run / "metrics.json", {
            "schema": 1, "model": "emoji", "concept": {"name": concept, "kind": "object"}, "preset": "balanced",
            "seed": 0, "versions": {"python": "3.11"}, "after": {"ua": 0.5, "ci95": {"ua": [0.4, 0.6]}}})
    results = read_sweep(folder)
    assert list(results.done.index) == ["cat-5", "frog-5"] and results.runs.loc["cat-35", "status"] == "unfinished"
    assert [note for note in results.notes if "other notebooks or another model" in note][0].startswith("cat-35")


def test_texts_are_read_as_they_were_written(folder):
    rows = [{**row("cat", 5), "folder": name, "mode": mode} for name, mode in (
        ("a", ""), ("b", "None"), ("c", "01"), ("d", "1"))]
    write_table(folder, rows)
    write_json(folder / "sweep.json", {"runs": 4, "varied": ["mode"], "notebooks": ["03"],
                                        "texts": ["concept", "mode"]})
    results = read_sweep(folder)
    assert [results.label(run) for run in "abcd"] == ["mode ''", "mode None", "mode 01", "mode 1"]
    assert results.runs.loc["a", "steps"] == 5 and results.measures()["low"].notna().any()


@pytest.mark.parametrize("damage", ["", "a,b\n1,2\n", '"'])
def test_a_damaged_table_is_told(folder, damage):
    (folder / "results.csv").write_text(damage)
    assert "results.csv" in read_sweep(folder).notes[0] and list(read_sweep(folder).runs.index) == ["dog-35"]


def test_a_folder_that_is_no_sweep_is_refused_with_what_was_looked_for(folder, tmp_path):
    with pytest.raises(SweepReadingError, match="nowhere holds no sweep.json; give the folder that `fmn-nb sweep`"):
        read_sweep(tmp_path / "nowhere")
    (folder / "sweep.json").write_text('{"runs": "many"}')
    with pytest.raises(SweepReadingError, match="sweep.json can't be read"):
        read_sweep(folder)


def test_figures_have_a_point_a_run_and_say_so_in_words(folder):
    results = read_sweep(folder)
    measures = results.measures()
    figure = forgotten_and_kept(measures, results.done, "concept", "steps")
    points = [point for line in figure.axes[0].lines if line.get_marker() in ("o", "^")
              for point in line.get_xydata().tolist()]
    assert points == [
        pytest.approx([ua, 1 - ua / 10]) for _, steps in GRID for ua in [steps / 35]]
    assert "4 runs" in figure.words and "UA from 0.14 to 1.00" in figure.words
    assert figure.words.endswith("largest for concept cat, steps 35.") and figure.axes[0].get_xlim()[0] < 0.1
    figure = measure_along(measures, results.done, "h", "steps", "concept")
    assert figure.words == "cat: 0.11 at 5, 0.80 at 35; frog: 0.11 at 5, 0.80 at 35."
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {
        "cat", "frog", "before, on average 0.10"}
    by_name = measure_along(measures, results.done, "ua", "concept")
    assert [label.get_text() for label in by_name.axes[0].get_xticklabels()] == ["cat", "frog"]
    assert "4 runs" in cost_and_quality(measures, results.done, by="concept").words


def test_what_can_not_be_drawn_is_told(folder):
    results = read_sweep(folder)
    measures = results.measures()
    with pytest.raises(ValueError, match="no finished run has the measure 'm_score'; those there are: cra, h, ira, ua"):
        measure_along(measures, results.done, "m_score", "steps")
    with pytest.raises(ValueError, match="no column 'colour'"):
        measure_along(measures, results.done, "h", "colour")
    with pytest.raises(ValueError, match="these come with notebook 04"):
        forgotten_and_kept(measures[measures["measure"] != "cra"], results.done)
    with pytest.raises(ValueError, match="both cost.dollars and h"):
        cost_and_quality(measures, results.done, "cost.dollars")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_explorer_shows_what_is_chosen(folder):
    explorer = SweepExplorer(read_sweep(folder))
    assert (explorer.measure.value, explorer.along.value, explorer.by.value) == ("h", "steps", "concept")
    assert "0.80 at 35" in explorer.words.value and len(pixels(explorer.picture.value))
    assert pixels(explorer.before.value)[0, 0].tolist() == [255, 0, 0]
    assert pixels(explorer.after.value)[0, 0].tolist() == [0, 0, 255]
    first = explorer.picture.value
    explorer.measure.value, explorer.along.value = "ua", "concept"
    assert explorer.picture.value != first and "1.00 at cat" in explorer.words.value
    explorer.run.value = "dog-5"
    assert explorer.before.value == explorer.after.value == b""
    assert explorer.about.value == "concept dog, steps 5: failed. 03: no luck (no images kept)"


def test_the_explorer_needs_a_measured_run(folder):
    shutil.rmtree(folder / "cat-5")
    (folder / "results.csv").unlink()
    with pytest.raises(ValueError, match="no finished run in sweep was measured"):
        SweepExplorer(read_sweep(folder))


def test_tidying_takes_links_away_and_what_they_lead_to_stays(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "images").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / ".kept.part.png").touch()
    (run / "images" / ".half.part.png").touch()
    for name, target in (("folder", elsewhere), ("file", elsewhere / ".kept.part.png"), ("gone", tmp_path / "gone")):
        (run / name).symlink_to(target)
    (run / ".lock").touch()
    RunFolder(run).tidy()
    assert not (run / "images" / ".half.part.png").exists() and (run / "folder").is_symlink()
    RunFolder(run).tidy(everything=True)
    assert [path.name for path in run.iterdir()] == [".lock"] and (elsewhere / ".kept.part.png").exists()


@pytest.mark.parametrize(("bad", "said"), [
    ({"after": {"ua": float("nan")}}, "leave it out"), ({"after": {"ua": np.float32("inf")}}, "leave it out"),
    ({"aftr": {}}, "no section 'aftr'"), ({"after": {"ua": {1, 2}}}, "cannot hold"),
])
def test_what_metrics_cannot_hold_is_refused_and_nothing_written(tmp_path, bad, said):
    record(tmp_path, {"after": {"ua": np.float64(0.5)}})
    before = (tmp_path / "metrics.json").read_text()
    with pytest.raises(MetricsError, match=said):
        record(tmp_path, bad)
    assert (tmp_path / "metrics.json").read_text() == before and json.loads(before)["after"] == {"ua": 0.5}


def test_runs_of_an_earlier_specification_in_the_folder_are_no_runs_of_this_one(folder):
    said = read_json(folder / "sweep.json")
    write_json(folder / "sweep.json", said | {"runs": 2, "folders": ["cat-5", "dog-35"]})
    assert sorted(read_sweep(folder).runs.index) == ["cat-5", "dog-35"]
