"""Sweeps: a checked specification, a pool that survives kills, and a table equal to an unbroken sweep's."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest
from filelock import FileLock
from kernels import is_kernel

from fmn_nb.files import write_json
from fmn_nb.models.names import UnknownModelError
from fmn_nb.runs.executors import threads_each
from fmn_nb.runs.folder import RunFolder, write_table
from fmn_nb.runs.parameters import ParameterError
from fmn_nb.runs.plan import RequestError
from fmn_nb.runs.progress import SweepProgress
from fmn_nb.runs.spec import plan_sweep
from fmn_nb.runs.storage import SweepError
from fmn_nb.runs.sweep import attempt, run_sweep

MEASURE = """\
from fmn_nb import record
score = round((len(concept) + seed) / 10, 3)
record(out, {"after": {"ua": score, "ira": 0.9, "cra": 0.8, "h": 0.7, "ci95": {"ua": [0.0, score]}}})
"""
NOT_OF_THE_TABLE = ["seconds"]


@pytest.fixture
def spec(stub_sweep):
    """A function that makes a specification with a cell of the test's own."""
    return lambda cell="pass", **more: stub_sweep(cell, MEASURE, **{"workers": 2, **more})


def table_of(folder: Path) -> pandas.DataFrame:
    return pandas.read_csv(folder / "results.csv").drop(columns=NOT_OF_THE_TABLE)


def test_a_grid_becomes_every_combination_in_named_folders(spec, tmp_path):
    sweep = plan_sweep(spec(), tmp_path / "out")
    assert [(plan.settings["concept"], plan.settings["seed"]) for plan in sweep.plans] == [
        ("cat", 0), ("cat", 1), ("frog", 0), ("frog", 1),
    ]
    assert sweep.plans[0].out.name == f"model-cat-balanced-seed0-{sweep.plans[0].key}"
    assert len({plan.out for plan in sweep.plans}) == 4 and sweep.varied == ("concept", "seed")
    assert not (tmp_path / "out").exists()


def test_a_list_and_a_file_do_as_well(spec, tmp_path):
    import yaml

    content = {**spec(), "list": [{"concept": "cat", "steps": 3}, {"concept": "frog"}]}
    del content["grid"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    sweep = plan_sweep(tmp_path / "mine.yaml")
    assert sweep.folder.name == "mine" and sweep.varied == ("concept", "steps")
    assert [plan.parameters for plan in sweep.plans] == [{"steps": 3}, {}]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grids": {}}, r"no key 'grids' \(did you mean 'grid'\?\); the keys are: notebooks"),
        ({"notebook": ["03"]}, "did you mean 'notebooks'"),
        ({"grid": {"concpt": ["cat"]}}, "did you mean 'concept'"),
        ({"list": [{}]}, "either grid"),
        ({"grid": None}, "grid must hold"),
        ({"grid": {"seed": 3}}, "grid.seed must be a list, not 3"),
        ({"grid": {"seed": []}}, "grid.seed must hold at least 1"),
        ({"list": []}, "list must hold at least 1"),
        ({"list": [3]}, "list.0 must hold names and values, not 3"),
        ({"fixed": ["cat"]}, "fixed must hold names and values"),
        ({"grid": {"seed": [1, 1]}}, "1 of the 2 runs repeat"),
        ({"grid": {"model": ["x/y"]}}, "'model' is fixed and varied"),
        ({"grid": {"seed": list(range(1000)), "steps": list(range(1000))}}, "1,000,000 runs"),
        ({"grid": {"seed": ["zero"]}}, "seed must be an int"),
        ({"grid": {"stepz": [1]}}, "no chosen notebook has a parameter 'stepz'"),
        ({"grid": {"steps": [1, 10]}}, "steps must lie from 1 to 9"),
        ({"grid": {3: [1]}}, "grid.3.*must be a text, not 3"),
        ({"workers": 0}, "workers must be"),
        ({"cluster": {"kind": "abacus"}},
         "cluster.kind must be 'local', 'slurm' or 'scheduler', not 'abacus'"),
        ({"cluster": {"kind": "scheduler"}}, "needs its address"),
        ({"workers": True}, "workers must be a whole number"),
        ({"notebooks": ["03"]}, "either notebook or notebooks"),
        ({"fixed": {"model": "nowhere"}}, "there is no model 'nowhere'"),
    ],
)
def test_a_wrong_specification_is_refused_before_anything_is_written(spec, tmp_path, change, says):
    with pytest.raises((SweepError, RequestError, ParameterError, UnknownModelError), match=says):
        plan_sweep({**spec(), **change}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "- just\n- a list", "a: !!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_specification_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SweepError, match="bad.yaml"):
        plan_sweep(tmp_path / "bad.yaml")


def test_a_failed_run_is_listed_kept_and_retried_on_request(spec, tmp_path):
    flag = tmp_path / "mended"
    cell = f"import pathlib\nif seed: assert pathlib.Path({str(flag)!r}).exists(), 'not yet'"
    shown = io.StringIO()
    sweep = plan_sweep(spec(cell, grid={"seed": [0, 1]}), tmp_path / "out")
    folder, failed = run_sweep(sweep, progress=SweepProgress(shown), page=False)
    assert [row["status"] for row in failed] == ["failed"] and "AssertionError: not yet" in failed[0]["error"]
    table = pandas.read_parquet(folder / "results.parquet")
    assert list(table["status"]) == ["done", "failed"] and table["after.ua"][0] == 0.3
    assert "2 of 2 runs" in shown.getvalue() and "AssertionError: not yet" in shown.getvalue()

    before = _changed(sweep.plans[0].out)
    flag.touch()
    assert len(run_sweep(sweep, page=False)[1]) == 1, "a failed run is not repeated unasked"
    assert run_sweep(sweep, retry_failed=True, page=False)[1] == []
    assert _changed(sweep.plans[0].out) == before, "a finished run is never repeated"
    assert list(table_of(folder)["after.ua"]) == [0.3, 0.4]


def test_what_the_runs_share_is_kept_until_all_are_finished(spec, tmp_path):
    shared = """
from pathlib import Path
file = Path(cache) / "drawn.txt"
assert file.is_file() or concept == "cat", "nobody drew"
file.parent.mkdir(exist_ok=True)
file.write_text("drawn")
assert concept != "frog" or (Path(out).parent / "mended").exists()
"""
    content = spec(shared, workers=1, grid={"concept": ["cat", "frog"]})
    notebook = Path(content["notebook"])
    notebook.write_text(notebook.read_text().replace('out: str', 'cache: str = \\"\\"  # folder\\nout: str'))
    out = tmp_path / "out"
    _, failed = run_sweep(plan_sweep(content, out), page=False)
    assert [row["concept"] for row in failed] == ["frog"] and (out / ".cache" / "drawn.txt").is_file()
    (out / "mended").touch()
    assert run_sweep(plan_sweep(content, out), retry_failed=True, page=False)[1] == []
    assert json.loads((out / "sweep.json").read_text())["specification"]["grid"] == content["grid"]
    assert not (out / ".cache").exists() and len(table_of(out)) == 2 and "cache" not in table_of(out)


def test_a_killed_worker_loses_nothing(spec, tmp_path):
    flag = str(tmp_path / "killed")
    kill_once = (
        "import os, pathlib, signal, time\n"
        f"flag = pathlib.Path({flag!r})\n"
        "if seed and not flag.exists():\n"
        "    flag.touch(); os.kill(os.getppid(), signal.SIGKILL); time.sleep(9)"
    )
    content = spec(kill_once, grid={"seed": [0, 1]})
    folder, failed = run_sweep(plan_sweep(content, tmp_path / "out"), workers=1, page=False)
    assert failed == [] and Path(flag).exists() and list(table_of(folder)["after.ua"]) == [0.3, 0.4]
    assert not list(folder.rglob("*.part*"))


def test_a_killed_sweep_goes_on_where_it_stood(spec, tmp_path):
    import yaml

    wait = "import time; time.sleep(1.5 * seed)"
    content = spec(wait)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "fmn_nb.cli", "sweep", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=errors)
    sweep = plan_sweep(content, tmp_path / "out")
    try:
        _until(lambda: any(_status(plan) == "done" for plan in sweep.plans))
        _until(lambda: any(is_kernel(one) for one in psutil.Process(process.pid).children(recursive=True)))
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _until(lambda: not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE], 10)
    assert not re.search("leaked|IPKernelApp|Traceback|[Ww]arning", (tmp_path / "errors").read_text())
    done = {plan.out: _changed(plan.out) for plan in sweep.plans if _status(plan) == "done"}
    assert 1 <= len(done) < 4 and not (tmp_path / "out" / "results.csv").exists()
    shown = io.StringIO()
    assert run_sweep(sweep, progress=SweepProgress(shown), page=False)[1] == []
    assert f"4 runs, {len(done)} of them done already" in shown.getvalue() and "(4 of 4 runs)" in shown.getvalue()
    assert done == {out: _changed(out) for out in done}, "a finished run is never repeated"
    assert list(table_of(tmp_path / "out")["after.ua"]) == [0.3, 0.4, 0.4, 0.5]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("run.json", "{"), ("run.json", "[]"), ("run.json", '{"status": "done"}'),
        ("metrics.json", "{}"), ("metrics.json", None),
    ],
)
def test_a_damaged_run_is_not_taken_for_whole(spec, tmp_path, file, damage):
    plan = _finished(plan_sweep(spec(), tmp_path / "out").plans[0])
    assert RunFolder(plan.out).earlier_row(plan, retry_failed=False)["after.ua"] == 0.3
    if damage is None:
        (plan.out / file).unlink()
    else:
        (plan.out / file).write_text(damage)
    assert RunFolder(plan.out).earlier_row(plan, retry_failed=False) is None


def test_a_run_of_a_notebook_that_has_changed_is_not_taken_for_done(spec, tmp_path):
    content = spec()
    plan = _finished(plan_sweep(content, tmp_path / "out").plans[0])
    notebook = Path(content["notebook"])
    notebook.write_text(notebook.read_text() + "\n")
    assert RunFolder(plan.out).earlier_row(plan, retry_failed=False) is None


def test_a_run_of_a_model_that_was_trained_again_is_not_taken_for_done(spec, tmp_path):
    content = spec()
    weights = Path(content["fixed"]["model"]) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(200_000))
    plan = plan_sweep(content, tmp_path / "out").plans[0]
    assert attempt(plan) is None
    weights.write_bytes(bytes(200_000))
    assert RunFolder(plan.out).earlier_row(plan, retry_failed=False), "the same bytes are the same model"
    weights.write_bytes(bytes(199_999) + b"1")
    assert RunFolder(plan.out).earlier_row(plan, retry_failed=False) is None


def test_a_damaged_run_is_made_anew(spec, tmp_path):
    plan = _finished(plan_sweep(spec(), tmp_path / "out").plans[0])
    (plan.out / "metrics.json").write_text("{")
    (plan.out / "images").mkdir()
    (plan.out / "images" / "stale.png").touch()
    assert attempt(plan) is None
    assert RunFolder(plan.out).earlier_row(plan, retry_failed=False)["after.ua"] == 0.3
    assert not (plan.out / "images").exists()


def test_other_notebooks_go_on_from_what_a_finished_run_left(spec, write_notebook, tmp_path):
    content = spec("import pathlib; (pathlib.Path(out) / 'patch').mkdir()")
    assert attempt(plan_sweep(content, tmp_path / "out").plans[0]) is None
    second = write_notebook("04_more.ipynb", "seed: int = 0  # seed\nout: str = ''  # folder",
                            "import pathlib; assert (pathlib.Path(out) / 'patch').is_dir()")
    plan = plan_sweep({**content, "notebook": str(second)}, tmp_path / "out").plans[0]
    assert attempt(plan) is None and (plan.out / "patch").is_dir() and (plan.out / "03_stub.ipynb").is_file()


def test_a_runs_folder_and_a_file_that_is_no_listing_are_left_alone(spec, tmp_path):
    plan = _finished(plan_sweep(spec(), tmp_path).plans[0])
    with pytest.raises(SweepError, match="is the folder of a single run"):
        run_sweep(plan_sweep(spec(), plan.out))
    write_json(tmp_path / "exp" / "sweep.json", spec())
    with pytest.raises(SweepError, match="is no listing of a sweep's runs, and would be replaced"):
        run_sweep(plan_sweep(tmp_path / "exp" / "sweep.json", tmp_path / "exp"))
    assert json.loads((tmp_path / "exp" / "sweep.json").read_text()) == spec()


def test_two_sweeps_never_share_a_folder(spec, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(SweepError, match="another sweep is working"):
        run_sweep(plan_sweep(spec(), tmp_path / "out"))


def test_the_cores_are_divided_among_workers():
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads_each(1) == usable and threads_each(usable) == 1 and threads_each(1000) == 1


def test_a_column_of_mixed_types_still_makes_a_table(tmp_path):
    write_table(tmp_path, [{"folder": "a", "layers": "mid", "steps": 3}, {"folder": "b", "layers": 2, "steps": None}])
    table = pandas.read_parquet(tmp_path / "results.parquet")
    assert list(table["layers"]) == ["mid", "2"] and table["steps"].dtype == "Int64"


def test_bookkeeping_takes_little_a_run(spec, tmp_path):
    content = spec(grid={"seed": list(range(300))})
    started = time.process_time()  # other work on the machine doesn't count
    sweep = plan_sweep(content, tmp_path / "out")
    planned = time.process_time() - started
    for plan in sweep.plans:
        _finished(plan)
    started = time.process_time()
    assert run_sweep(sweep, page=False)[1] == []
    assert (planned + time.process_time() - started) / 300 < 0.010


def _finished(plan):
    """Write what a finished run leaves, without its kernel."""
    plan.out.mkdir(parents=True)
    notebooks = {notebook.path.name: {"status": "done", "seconds": 1.5, "sha256": notebook.digest}
                 for notebook in plan.notebooks}
    settings = plan.settings
    write_json(plan.out / "run.json", {"status": "done", "key": plan.key, "settings": settings,
                                       "parameters": plan.parameters, "notebooks": notebooks})
    write_json(plan.out / "metrics.json", {
        "schema": 1, "model": settings["model"], "concept": {"name": settings["concept"], "kind": settings["kind"]},
        "preset": settings["preset"], "seed": settings["seed"], "versions": {}, "after": {"ua": 0.3},
    })
    return plan


def _status(plan):
    path = plan.out / "run.json"
    return json.loads(path.read_text())["status"] if path.exists() else None


def _changed(folder: Path) -> int:
    return (folder / "03_stub.ipynb").stat().st_mtime_ns


def _until(reached, seconds: float = 60):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_table_that_is_no_sweeps_is_never_replaced(spec, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("mine")
    with pytest.raises(SweepError, match="results.csv is no sweep's, and would be replaced: give another folder"):
        run_sweep(plan_sweep(spec(), tmp_path / "out"))
    assert (tmp_path / "out" / "results.csv").read_text() == "mine"
