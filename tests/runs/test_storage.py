"""Results at a URL: uploaded whole, resumed from there, and the same table as in a folder."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pandas
import pytest
import yaml

from fmn_nb.files import write_json, write_text
from fmn_nb.runs import storage as storage
from fmn_nb.runs.spec import plan_sweep
from fmn_nb.runs.storage import Remote, SweepError
from fmn_nb.runs.sweep import attempt, run_sweep

MEASURE = """\
import fmn_nb
from PIL import Image
fmn_nb.save_image(out, "before_one", Image.new("RGB", (4, 4)), alt="black")
fmn_nb.record(out, {"after": {"ua": (len(concept) + seed) / 10, "ira": 0.5, "cra": 0.5, "h": 0.5}})
"""


@pytest.fixture
def spec(stub_sweep):
    return lambda cell="pass", **more: stub_sweep(cell, MEASURE, **{"grid": {"concept": ["cat", "frog"]}, **more})


@pytest.fixture
def memory():
    """An empty in-memory file system, for what happens in this process alone."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def finished(run: Path, status: str = "done", **more) -> Path:
    """Write what a run that ended leaves, without its kernel."""
    write_json(run / "metrics.json", {"schema": 1})
    write_text(run / "images" / "one.txt", "picture")
    write_json(run / "run.json", {"status": status, **more})
    return run


def test_a_run_at_a_url_is_made_stored_and_found_again(spec, tmp_path):
    content = spec(grid={"seed": [1]})
    place, failed = run_sweep(plan_sweep(content, f"file://{tmp_path}/bucket/mine/"))
    assert place == f"file://{tmp_path}/bucket/mine" and failed == []
    run = next((tmp_path / "bucket" / "mine").glob("model-cat-*"))
    assert (run / "images" / "before_one.png").is_file() and (run / "03_stub.ipynb").is_file()
    changed = (run / "run.json").stat().st_mtime_ns
    run_sweep(plan_sweep(content, place), page=False)
    assert (run / "run.json").stat().st_mtime_ns == changed, "a finished run is never repeated"
    assert list(pandas.read_csv(run.parent / "results.csv")["after.ua"]) == [0.4]
    assert f'href="{run.name}/report.html"' in (run.parent / "report.html").read_text(), "notebook 07, stored as well"


@pytest.mark.slow
def test_a_sweep_at_a_url_equals_one_in_a_folder_and_is_resumed_from_there(spec, tmp_path):
    flag = tmp_path / "mended"
    content = spec(f"import pathlib\nif concept == 'frog': assert pathlib.Path({str(flag)!r}).exists(), 'not yet'")
    bucket = tmp_path / "bucket"
    url = f"file://{bucket}/mine"
    place, failed = run_sweep(plan_sweep(content, url), page=False)
    assert place == url and len(failed) == 1 and f"{url}/model-frog" in failed[0]["error"]
    assert Path(failed[0]["error"].rsplit("file://", 1)[1]).is_file(), "the failed notebook lies where the error says"

    done = next((bucket / "mine").glob("model-cat-*"))
    assert (done / "images" / "before_one.png").is_file() and (done / "03_stub.ipynb").is_file()
    changed = (done / "run.json").stat().st_mtime_ns
    flag.touch()
    assert len(run_sweep(plan_sweep(content, url), page=False)[1]) == 1, "a failed run is not repeated unasked"
    assert run_sweep(plan_sweep(content, url), retry_failed=True, page=False)[1] == []
    assert (done / "run.json").stat().st_mtime_ns == changed, "a finished run is never repeated"
    assert not list((bucket / "mine").rglob("*.failed.ipynb")), "a repeated run leaves nothing of the earlier attempt"

    assert run_sweep(plan_sweep(content, tmp_path / "local"), page=False)[1] == []
    tables = [pandas.read_csv(folder / "results.csv").drop(columns="seconds")
              for folder in (bucket / "mine", tmp_path / "local")]
    pandas.testing.assert_frame_equal(*tables)
    assert len(pandas.read_parquet(bucket / "mine" / "results.parquet")) == 2
    assert json.loads((bucket / "mine" / "sweep.json").read_text())["runs"] == 2
    assert not list(bucket.rglob("*.part*"))


def test_the_mark_of_a_run_goes_first_and_comes_last(memory, tmp_path, monkeypatch):
    remote, names = Remote("memory://bucket/x"), []
    remote.keep_run(finished(tmp_path / "a"))
    put, removed = memory.put_file, memory.rm_file
    monkeypatch.setattr(type(memory), "put_file",
                        lambda self, here, there, **more: (names.append(there), put(here, there, **more)))
    monkeypatch.setattr(type(memory), "rm_file", lambda self, there: (names.append("-" + there), removed(there)))
    remote.keep_run(finished(tmp_path / "a"))
    assert names[0].endswith("/a/run.json") and names[0].startswith("-") and names[-1] == "/bucket/x/a/run.json"
    assert not (tmp_path / "a").exists() and memory.exists("/bucket/x/a/images/one.txt")


def test_an_upload_that_breaks_off_is_no_finished_run(memory, tmp_path, monkeypatch):
    remote, put = Remote("memory://bucket/x"), memory.put_file

    def broken(self, here, there, **more):
        if there.endswith("metrics.json"):
            raise ConnectionError("the line went dead")
        put(here, there, **more)

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "put_file", broken)
        with pytest.raises(SweepError, match="memory://bucket/x cannot be .*ConnectionError: the line went dead"):
            remote.keep_run(finished(tmp_path / "a"))
    assert not memory.exists("/bucket/x/a/run.json") and (tmp_path / "a" / "run.json").exists()
    remote.fetch([tmp_path / "a"])
    assert not (tmp_path / "a").exists()


def test_storage_that_fails_while_reading_is_not_taken_for_empty(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(type(memory), "cat_file", _raiser(PermissionError("no key")))
    with pytest.raises(SweepError, match="PermissionError: no key"):
        Remote("memory://bucket/x").fetch([tmp_path / "a"])


def test_a_run_that_cannot_be_uploaded_is_a_failed_one(spec, tmp_path, monkeypatch):
    plan = plan_sweep(spec(), "memory://x").plans[0]
    monkeypatch.setattr("fmn_nb.runs.sweep.execute", lambda plan, **_: finished(plan.out))
    monkeypatch.setattr(Remote, "_opened", _raiser(SweepError("memory://x cannot be written")))
    assert attempt(plan, Remote("memory://x")) == "memory://x cannot be written"


def test_a_missing_driver_is_named(spec, monkeypatch):
    import fsspec.core

    monkeypatch.setattr(fsspec.core, "url_to_fs", _raiser(ImportError("Install s3fs to access S3")))
    with pytest.raises(SweepError, match="s3:// needs a package that is not installed: pip install s3fs"):
        plan_sweep(spec(), "s3://bucket/x")


@pytest.mark.parametrize(("url", "says"), [
    ("nowhere://x/y", "nowhere://x/y cannot be used: .*nowhere"), ("file://", "names no folder"),
])
def test_a_wrong_url_is_refused_before_anything_is_written(spec, url, says):
    with pytest.raises(SweepError, match=says):
        plan_sweep(spec(), url)


@pytest.mark.slow
def test_a_sweep_at_a_url_killed_midway_goes_on_at_once(spec, tmp_path):
    content = spec("import time; time.sleep(4 * seed)", grid={"concept": ["cat", "frog"], "seed": [0, 1]})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    bucket = tmp_path / "bucket"
    command = [sys.executable, "-m", "fmn_nb.cli", "sweep", str(tmp_path / "mine.yaml"), "--out", f"file://{bucket}"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not list(bucket.glob("*/run.json")):
            assert time.monotonic() < end, "no run was stored"
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stored = {path: path.stat().st_mtime_ns for path in bucket.glob("*/run.json")}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"results: file://{bucket}/results.csv" in result.stdout
    assert f"4 runs, {len(stored)} of them done already" in result.stderr
    assert stored == {path: path.stat().st_mtime_ns for path in stored}
    assert list(pandas.read_csv(bucket / "results.csv")["after.ua"]) == [0.3, 0.4, 0.4, 0.5]


def _raiser(error: Exception):
    def raising(*_args, **_options):
        raise error

    return raising
