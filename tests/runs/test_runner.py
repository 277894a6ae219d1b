"""Runs through the real papermill and real kernels, on small notebooks written here."""

import json
import os
import pickle
import re
import time
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from filelock import FileLock
from PIL import Image

import fmn_nb as fmn
from fmn_nb.runs.folder import RunFolder, record
from fmn_nb.runs.notebook import RunError
from fmn_nb.runs.plan import Plan, RequestError, plan_run
from fmn_nb.runs.progress import Position
from fmn_nb.runs.report import ReportError, write_report
from fmn_nb.runs.runner import execute, is_finished
from fmn_nb.runs.stopping import Stopped

CELL = 'concept: str = "cat"  # what\nseed: int = 0  # seed\nsteps: int = 2  # steps [1..9]\nout: str = ""  # folder'
FORGET = """\
from fmn_nb import record, save_image
from PIL import Image
record(out, {"forgetting": {"steps": steps, "seconds": 0.5, "loss_first": 2.0, "loss_last": 1.0,
                            "stopped_because": "all steps done"}})
save_image(out, "before_" + concept, Image.new("RGB", (64, 64), "orange"), alt="an orange square")
save_image(out, "after_" + concept, Image.new("RGB", (64, 64), "gray"), alt="a gray square <&>")
"""
MEASURE = """\
import os
from pathlib import Path
from fmn_nb import record
from ipykernel import get_connection_info
assert os.name != "posix" or get_connection_info(unpack=True)["transport"] == "ipc"
assert Path.cwd() == Path(out)
side = {"ua": 0.04, "ira": 0.98, "cra": 0.9, "h": 0.11, "ceiling": 0.96, "images": 24, "ci95": {"ua": [0.0, 0.2]}}
record(out, {"before": side, "after": {**side, "ua": 1.0, "h": 0.96}, "skipped": {"m_score": "not asked for"}})
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One complete run of two notebooks, from another working directory: (its folder, its progress)."""
    from written_notebooks import write_notebook_at

    folder = tmp_path_factory.mktemp("finished")
    one = write_notebook_at(folder / "03_forget.ipynb", CELL, FORGET, metrics=["forgetting"], gives=["images"])
    two = write_notebook_at(folder / "04_measure.ipynb", CELL, MEASURE, metrics=["before", "after"])
    said: list[str] = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        plan = plan_run(notebooks=[str(one), str(two)], concept="frog", out="out", parameters={"steps": 3})
        return execute(plan, lambda where: said.append(str(where))), [line for line in said if "  " not in line]
    finally:
        os.chdir(before)


def test_a_run_leaves_everything_whole(finished):
    out, said = finished
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "03_forget.ipynb", "04_measure.ipynb", "images", "metrics.json", "report.html", "run.json",
    }
    executed = nbformat.read(out / "03_forget.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert re.fullmatch(r"\[1/2\] 03_forget [\d.]+ s\n\[2/2\] 04_measure [\d.]+ s", "\n".join(said))


def test_the_notebooks_got_their_parameters_and_metrics_follow_the_schema(finished):
    out, _ = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["schema"] == 1 and metrics["model"] == "emoji"
    assert metrics["concept"] == {"name": "frog", "kind": "object"}
    assert metrics["forgetting"]["steps"] == 3 and metrics["after"]["ua"] == 1.0
    assert (out / "images" / "before_frog.png").exists()
    state = json.loads((out / "run.json").read_text())
    assert state["status"] == "done" and state["parameters"] == {"steps": 3}
    assert state["notebooks"]["03_forget.ipynb"]["status"] == "done"
    assert len(state["notebooks"]["03_forget.ipynb"]["sha256"]) == 64


@pytest.fixture
def metrics_of(write_notebook, tmp_path):
    """A function that runs a small notebook in one and the same folder and returns its metrics.json."""

    def run(name, *cells, **promises):
        path = write_notebook(name, CELL, *cells, **promises)
        return json.loads((execute(plan_run(notebooks=[str(path)], out=tmp_path / "out")) / "metrics.json").read_text())

    return run


def test_what_a_run_does_not_measure_is_absent_with_its_reason(metrics_of):
    first = metrics_of("03_forget.ipynb", FORGET, metrics=["forgetting"])
    assert set(first["skipped"]) == {"before", "after", "attention", "m_score"}
    assert first["skipped"]["before"] == "04_evaluate measures it, which was not part of this run"
    assert first["skipped"]["m_score"].startswith("05_can_it_be_brought_back measures it")
    second = metrics_of("04_measure.ipynb", MEASURE, metrics=["before", "after"])
    assert "forgetting" in second and set(second["skipped"]) == {"attention", "m_score"}
    assert second["skipped"]["m_score"] == "not asked for", "the notebook's own reason counts"


def test_a_reason_of_an_earlier_run_excuses_no_later_one(metrics_of):
    assert "before" in metrics_of("03_forget.ipynb", FORGET)["skipped"]
    with pytest.raises(RunError, match="left no before in metrics.json"):
        metrics_of("04_measure.ipynb", "pass", metrics=["before"])


def test_a_reason_goes_when_its_section_comes(tmp_path):
    record(tmp_path, {"skipped": {"after": "no judge", "m_score": "no time", "attention": "no text"}})
    assert record(tmp_path, {"after": {"ua": 1.0}, "skipped": {"attention": None}})["skipped"] == {"m_score": "no time"}
    assert "skipped" not in record(tmp_path, {"m_score": {}})


def test_the_report_needs_nothing_but_itself(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'alt="an orange square"' in page and 'alt="a gray square &lt;&amp;&gt;"' in page
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page) and "<script" not in page
    assert 'href="03_forget.ipynb"' in page and "0.960" in page and "not asked for" in page


def test_plain_papermill_does_as_well(write_notebook, tmp_path, monkeypatch):
    from papermill.cli import papermill

    monkeypatch.chdir(tmp_path)
    notebook = write_notebook("03_stub.ipynb", CELL, "assert concept == 'frog' and seed == 0")
    told = CliRunner().invoke(papermill, ["--help-notebook", str(notebook)]).output
    assert "steps: int (default 2)" in told and "steps [1..9]" in told
    done = CliRunner().invoke(papermill, ["course/03_stub.ipynb", "done.ipynb", "-p", "concept", "frog"])
    assert done.exit_code == 0 and (tmp_path / "done.ipynb").exists()


def test_a_failing_cell_is_named_and_nothing_half_made_stays(write_notebook, tmp_path):
    path = write_notebook("03_bad.ipynb", CELL, "kept = 1", "raise RuntimeError('no such luck')")
    with pytest.raises(RunError) as caught:
        execute(plan_run(notebooks=[str(path)], out=tmp_path / "out"))
    error = caught.value
    assert error.cell == 4 and error.error == "RuntimeError: no such luck"  # after parameters and injected ones
    assert Path(error.executed).name == "03_bad.failed.ipynb" and Path(error.executed).is_file()
    assert not list((tmp_path / "out").glob("*.part*")) and not (tmp_path / "out" / "03_bad.ipynb").exists()
    state = json.loads((tmp_path / "out" / "run.json").read_text())
    assert state["status"] == "failed" and "no such luck" in state["error"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "no such luck" in write_report(tmp_path / "out").read_text()


def test_a_dead_kernel_is_told_and_the_run_can_be_taken_up_again(write_notebook, tmp_path):
    flag = tmp_path / "flag"
    die_once = (
        f"import os, pathlib, signal; flag = pathlib.Path({str(flag)!r})\n"
        "if not flag.exists(): flag.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = write_notebook("03_dies.ipynb", CELL, die_once)
    with pytest.raises(RunError, match="03_dies.ipynb failed: DeadKernelError"):
        execute(plan_run(notebooks=[str(path)], out=tmp_path / "out"))
    leftover = tmp_path / "out" / "images" / ".before.0.part.png"  # as a killed run leaves one
    leftover.parent.mkdir()
    leftover.touch()
    out = execute(plan_run(notebooks=[str(path)], out=tmp_path / "out"))
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    assert not leftover.exists() and not (out / "03_dies.failed.ipynb").exists()


def test_a_progress_that_fails_ends_the_notebook(write_notebook, tmp_path):
    def broken(_where):
        raise BrokenPipeError("nobody listens")

    plan = plan_run(notebooks=[str(write_notebook("long.ipynb", CELL, "import time; time.sleep(100)"))],
                    out=tmp_path / "out")
    started = time.monotonic()
    with pytest.raises((RunError, BrokenPipeError), match="nobody listens"):
        execute(plan, broken)
    assert time.monotonic() - started < 30


def test_a_run_in_a_folder_with_braces(write_notebook, tmp_path):
    (tmp_path / "{a}").mkdir()
    notebook = write_notebook("{b}.ipynb", CELL, "print(out)")
    plan = plan_run(notebooks=[str(notebook)], out=tmp_path / "{a}" / "out")
    assert (execute(plan) / "{b}.ipynb").is_file()


@pytest.mark.parametrize(
    ("cell", "promises", "says"),
    [
        ("pass", {"gives": ["patch"]}, "left no 'patch'"),
        ("pass", {"metrics": ["forgetting"]}, "left no forgetting in metrics.json"),
        ("import pathlib; (pathlib.Path(out) / 'metrics.json').write_text('{')", {}, "not valid JSON"),
        ("import fmn_nb; fmn_nb.record(out, {'after': {'ua': 1.5}})", {}, "after.ua must be at most 1, not 1.5"),
    ],
)
def test_a_broken_promise_fails_the_run(write_notebook, tmp_path, cell, promises, says):
    path = write_notebook("03_liar.ipynb", CELL, cell, **promises)
    with pytest.raises(RunError, match=says):
        execute(plan_run(notebooks=[str(path)], out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_two_runs_never_meet_in_one_folder(finished, write_notebook, tmp_path):
    path = write_notebook("03_forget.ipynb", CELL)
    with pytest.raises(RequestError, match="holds a run with concept 'frog', this one has 'cat'"):
        plan_run(notebooks=[str(path)], out=finished[0], parameters={"steps": 3})
    with pytest.raises(RequestError, match="holds a run with steps 3, this one has 'not given'"):
        plan_run(notebooks=[str(path)], out=finished[0], concept="frog")
    plan = plan_run(notebooks=[str(path)], out=tmp_path / "busy")
    (tmp_path / "busy").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"), pytest.raises(RequestError, match="another run is working in"):
        execute(plan)


def test_a_run_goes_on_where_it_failed_and_a_finished_one_stays(write_notebook, tmp_path):
    mended, out = tmp_path / "mended", tmp_path / "out"
    one = write_notebook("03_forget.ipynb", CELL, FORGET, metrics=["forgetting"], gives=["images"])
    two = write_notebook("04_measure.ipynb", CELL, f"import pathlib; assert pathlib.Path({str(mended)!r}).exists()")
    plan = plan_run(notebooks=[str(one), str(two)], out=out)

    def files() -> dict:
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    with pytest.raises(RunError):
        execute(plan)
    first = (out / one.name).read_bytes()
    mended.touch()
    assert not is_finished(plan) and json.loads((execute(plan) / "run.json").read_text())["status"] == "done"
    assert (out / one.name).read_bytes() == first, "a finished notebook is not repeated"
    whole = files()
    assert is_finished(plan) and execute(plan) == out and files() == whole

    def stop(where):
        if where.position.cell:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="0 of 2 notebooks finished; the same command continues"):
        execute(plan, stop, again=True)
    assert is_finished(plan) and {name: files()[name] for name in whole} == whole, "the finished run is as it was"
    write_notebook("04_measure.ipynb", CELL, "pass")
    assert not is_finished(plan_run(notebooks=[str(one), str(two)], out=out)), "a notebook was changed"
    (out / "images" / "after_cat.png").unlink()
    (out / "images" / "before_cat.png").unlink()
    (out / "images").rmdir()
    assert not is_finished(plan_run(notebooks=[str(one)], out=out)), "what it made is gone"


def test_a_folder_that_is_no_run_has_no_report(tmp_path):
    with pytest.raises(ReportError, match="holds no run.json and no sweep.json"):
        write_report(tmp_path)


def test_an_image_carries_its_description(tmp_path):
    from fmn_nb.runs.folder import save_image
    from fmn_nb.runs.report import _shown

    path = save_image(tmp_path, "attention_cat", Image.new("L", (8, 8)), alt="the map is highest on the cat’s ears")
    assert _shown(path)["alt"] == "the map is highest on the cat’s ears"
    with pytest.raises(ValueError, match="needs a description"):
        save_image(tmp_path, "attention_cat", Image.new("L", (8, 8)), alt=" ")
    with pytest.raises(ValueError, match="name an image"):
        save_image(tmp_path, "../attention", Image.new("L", (8, 8)), alt="a map")


def test_a_dead_kernel_leaves_what_was_executed_before(write_notebook, tmp_path):
    path = write_notebook("03_dies.ipynb", CELL, "print('still', 'alive')", "import os; os._exit(1)")
    with pytest.raises(RunError, match="DeadKernelError") as caught:
        execute(plan_run(notebooks=[str(path)], out=tmp_path / "out"))
    assert "still alive" in Path(caught.value.executed).read_text()


def test_what_is_registered_for_the_end_of_a_kernel_is_done(write_notebook, tmp_path):
    """Also though its last garbage collection is left out."""
    end = "import atexit, pathlib; atexit.register(pathlib.Path(out, 'ended').touch)"
    path = write_notebook("03_ends.ipynb", CELL, end, "import gc; assert not gc.get_freeze_count()")
    assert (execute(plan_run(notebooks=[str(path)], out=tmp_path / "out")) / "ended").exists()


def test_a_running_notebook_is_saved_now_and_then(monkeypatch):
    """Not twice a cell, yet at its end, and with what nbclient made of it."""
    import datetime

    from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines

    from fmn_nb.runs.notebook import SAVE_EVERY, engine

    saved, clock = [], [datetime.datetime.now(datetime.UTC)]
    monkeypatch.setattr("papermill.engines.write_ipynb", lambda nb, path: saved.append(nb["cells"]))
    manager = NotebookExecutionManager(nbformat.NotebookNode(cells=[]), "out.ipynb", progress_bar=False)
    monkeypatch.setattr(manager, "now", lambda: clock[0])
    manager.last_save_time = clock[0]

    def cells(nb_man, *_, **__):
        for number in range(1, 5):
            clock[0] += datetime.timedelta(seconds=0.6 * SAVE_EVERY)
            nb_man.save(nb={"cells": number})

    monkeypatch.setattr(NBClientEngine, "execute_managed_notebook", cells)
    papermill_engines.get_engine(engine()).execute_managed_notebook(manager, "python3", position=Position())
    assert saved == [2, 4] and manager.nb == {"cells": 4}
    manager.save()
    assert saved == [2, 4, 4], "papermill's own save is back"


def test_whatever_ends_a_run_is_in_its_state(write_notebook, tmp_path, monkeypatch):
    plan = plan_run(notebooks=[str(write_notebook("03_forget.ipynb", CELL, FORGET, metrics=["forgetting"]))],
                    out=tmp_path / "out")

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("fmn_nb.runs.runner.write_report", full)
    with pytest.raises(OSError, match="no space"):
        execute(plan)
    said = json.loads((tmp_path / "out" / "run.json").read_text())
    assert said["status"] == "failed" and said["error"] == "no space left on device"
    monkeypatch.undo()
    execute(plan)
    assert is_finished(plan)


def test_comparisons_are_off_unless_asked_for(write_notebook, tmp_path):
    path = str(write_notebook("03_compared.ipynb", CELL + "\ncompare: bool = True  # with others, too"))
    plain = plan_run(notebooks=[path], out=tmp_path / "a")
    asked = plan_run(notebooks=[path], out=tmp_path / "b", texts={"compare": "true"})
    assert plain.notebooks[0].values["compare"] is False and asked.notebooks[0].values["compare"] is True


def test_a_run_from_python_is_the_commands(write_notebook, tmp_path):
    notebook = str(write_notebook("03_short.ipynb", CELL, "print(steps)"))
    for steps, said in ((3, {"steps": 3}), (None, {})):
        out = fmn.run(concept="frog", notebooks=[notebook], out=tmp_path / str(steps), steps=steps)
        state = json.loads((out / "run.json").read_text())
        assert state["status"] == "done" and state["parameters"] == said
        assert state["settings"]["concept"] == "frog"


def test_a_notebook_edited_while_it_runs_is_executed_again(write_notebook, tmp_path):
    one = write_notebook("03_forget.ipynb", CELL, FORGET, metrics=["forgetting"])
    plan = plan_run(notebooks=[str(one)], out=tmp_path / "out")

    def edit(where):
        if where.position.cell:
            one.write_text(one.read_text().replace("\n", "\n ", 1))

    execute(plan, edit)
    assert not is_finished(plan_run(notebooks=[str(one)], out=tmp_path / "out")), "the new one never ran"


def test_a_model_trained_again_makes_another_run(write_notebook, tmp_path, monkeypatch):
    one = write_notebook("03_forget.ipynb", CELL, FORGET, metrics=["forgetting"])
    plan = plan_run(notebooks=[str(one)], out=tmp_path / "out")
    execute(plan)
    assert is_finished(plan)
    monkeypatch.setattr(Plan, "model_print", "another")
    assert not is_finished(plan)


GIVEN = "import pathlib; (pathlib.Path(out) / 'patch').mkdir(exist_ok=True); (pathlib.Path(out) / 'patch' / 'x')"


def test_what_ran_after_a_notebook_that_is_made_anew_is_stale_with_its_figures(write_notebook, tmp_path, monkeypatch):
    out, two = tmp_path / "out", write_notebook("04_measure.ipynb", CELL, FORGET, metrics=["forgetting"])

    def first(number: int) -> Path:
        return write_notebook("03_forget.ipynb", CELL, f"{GIVEN}.write_text('{number}')", gives=["patch"])

    both = [str(first(1)), str(two)]
    execute(plan_run(notebooks=both, out=out))
    assert "forgetting" in RunFolder(out).metrics and is_finished(plan_run(notebooks=both, out=out))
    first(2)
    execute(plan_run(notebooks=both[:1], out=out))
    assert (out / "patch" / "x").read_text() == "2" and "forgetting" not in RunFolder(out).metrics, "of before"
    assert not is_finished(plan_run(notebooks=both, out=out))
    execute(plan_run(notebooks=both, out=out))
    execute(plan_run(notebooks=both[1:], out=out), again=True)
    assert is_finished(plan_run(notebooks=both, out=out)), "what ran before the one that is made anew stays"
    monkeypatch.setattr(Plan, "model_print", "another")
    execute(plan_run(notebooks=both[:1], out=out))
    assert list(RunFolder(out).state["notebooks"]) == ["03_forget.ipynb"], "the other one is of the model of before"


def test_a_stop_after_a_notebook_has_made_something_is_no_finished_run(write_notebook, tmp_path):
    out = tmp_path / "out"
    one = write_notebook("03_forget.ipynb", CELL, f"{GIVEN}.write_text('1')", gives=["patch"])
    execute(plan_run(notebooks=[str(one)], out=out))
    write_notebook("03_forget.ipynb", CELL, f"{GIVEN}.write_text('2')", "import time; time.sleep(30)", gives=["patch"])

    def stop(_where):
        if (out / "patch" / "x").read_text() == "2":
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        execute(plan_run(notebooks=[str(one)], out=out), stop)
    assert RunFolder(out).status == "stopped"


def test_a_run_that_was_moved_is_still_finished(write_notebook, tmp_path):
    one = write_notebook("03_forget.ipynb", CELL, FORGET, metrics=["forgetting"])
    execute(plan_run(notebooks=[str(one)], out=tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert is_finished(plan_run(notebooks=[str(one)], out=tmp_path / "elsewhere"))
