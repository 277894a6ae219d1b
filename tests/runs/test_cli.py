"""The command: quick to help, one clear line for a wrong request, the right exit codes."""

import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from fmn_nb.cli import main
from fmn_nb.files import write_checksums
from fmn_nb.runs import plan as plans
from fmn_nb.runs.check import MARKS, Check, all_checks, kernel

CELL = 'concept: str = "cat"  # what\nseed: int = 0  # seed [0..9]\nout: str = ""  # folder'
MEASURE = "import fmn_nb; fmn_nb.record(out, {'before': {'ua': 0.04}, 'after': {'ua': 1.0}})"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A function that runs the command in this process, in an empty folder, with the emoji model's name known."""
    monkeypatch.setattr(plans, "notebooks_dir", lambda: tmp_path / "course")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main, list(map(str, words)))


def test_help_answers_in_under_a_third_of_a_second():
    def seconds() -> float:
        """Of processor time, which other work on the machine does not change."""
        before = os.times()
        subprocess.run([sys.executable, "-m", "fmn_nb.cli", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert 0 < min(seconds() for _ in range(5)) < 0.3


def test_help_names_every_command(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = command("--help")
    names = ("run", "forget", "evaluate", "sweep", "report", "check", "pretrain", "benchmark")
    assert "..." not in result.output.partition("Commands:")[2], "no summary is cut"
    assert all(f"  {name} " in result.output for name in names)
    for name in names:
        assert command(name, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "emojj"], "no model 'emojj'; bundled: emoji"),
        (["--concept", "kat"], "did you mean 'cat'?"),
        (["--notebooks", "01,77"], "there is no notebook '01'; the course has: 03_stub"),
        (["--preset", "balance"], "no preset 'balance'"),
        (["-p", "seed"], "-p takes name=value"),
        (["-p", "=3"], "-p takes name=value, not '=3'"),
        (["-p", "colour=red", "-p", "colour=blue"], "-p gives 'colour' twice"),
        (["-p", "colour=red"], "no chosen notebook has a parameter 'colour'"),
        (["--steps", "3"], "no chosen notebook has a parameter 'steps'"),
        (["--seed", "77"], "seed must lie from 0 to 9,"),
        (["--seed", "-1"], "seed must lie from 0 to 9223372036854775807, not -1"),
        (["frog", "--concept", "cat"], "the concept is given twice"),
        (["-p", "kolour=red"], "no chosen notebook has a parameter 'kolour'; there are"),
        (["-p", "sed=1"], "has a parameter 'sed' (did you mean 'seed'?)"),
        (["--config", "."], "no chosen notebook has a parameter 'config'"),
    ],
)
def test_a_wrong_request_exits_with_one_clear_error(command, write_notebook, tmp_path, words, says):
    notebook = write_notebook("03_stub.ipynb", CELL)
    result = command("run", *([] if "--notebooks" in words else ["--notebooks", notebook]), *words)
    assert result.exit_code == 2 and result.output.startswith("Error: ") and says in result.output
    assert "Traceback" not in result.output and not (tmp_path / "runs").exists()


def test_a_run_ends_with_a_table_and_the_reports_path(command, write_notebook, tmp_path):
    result = command("run", "--notebooks", write_notebook("03_stub.ipynb", CELL, MEASURE), "--concept", "frog")
    assert result.exit_code == 0, result.output
    out = tmp_path / "runs" / "frog-balanced-seed0"
    assert result.stdout.splitlines() == [
        f"{'frog':12}{'before':>10}{'after':>10}",
        f"{'UA':12}{'0.040':>10}{'1.000':>10}",
        f"report: {out / 'report.html'}",
    ]
    assert command("report", out).exit_code == 0
    again = command("run", "frog", "--notebooks", tmp_path / "course" / "03_stub.ipynb")
    assert again.exit_code == 0 and again.stderr == "finished already; --again repeats it\n"
    assert again.stdout == result.stdout


def test_a_run_without_a_terminal_says_in_plain_lines_where_it_is(command, write_notebook):
    good, bad = write_notebook("03_stub.ipynb", CELL), write_notebook("04_stub.ipynb", CELL, "1 / 0")
    result = command("run", "--notebooks", f"{good},{bad}")
    lines = result.stderr.split("\n")
    assert lines[0] == "[1/2] 03_stub ..." and re.fullmatch(r"\[1/2\] 03_stub [\d.]+ s", lines[1])
    assert lines[2:4] == ["[2/2] 04_stub ...", "[2/2] 04_stub failed"] and lines[4].startswith("Error: 04_stub")
    assert "\r" not in result.stderr and "\x1b" not in result.stderr and "03_stub" not in result.stdout


def test_a_failing_cell_exits_non_zero_with_its_error(command, write_notebook, tmp_path):
    result = command("run", "--notebooks", write_notebook("03_stub.ipynb", CELL, "1 / 0"))
    assert result.exit_code == 1 and "03_stub.ipynb failed in cell [3]: ZeroDivisionError" in result.output
    assert str(tmp_path / "runs" / "cat-balanced-seed0" / "03_stub.failed.ipynb") in result.output


def test_a_wrong_sweep_and_a_folder_without_a_run_are_told(command, tmp_path):
    (tmp_path / "bad.yaml").write_text("grids: {}")
    assert "no key 'grids'" in command("sweep", "bad.yaml").output
    assert "holds no run.json" in command("report", tmp_path).output
    assert "no organism is called 'jont'; choose one of emoji" in command("pretrain", "--organism", "jont").output
    assert "the emoji world has no 'kat'; it" in command("pretrain", "--without", "cat, kat", "--without", "dog").output


def test_check_tells_what_to_do(command, monkeypatch):
    from fmn_nb.runs import check as check

    found = [Check("python", "ok", "3.11"), Check("data", "failed", "one file changed", "restore it")]
    monkeypatch.setattr(check, "all_checks", lambda model: found)
    result = command("check")
    assert result.exit_code == 1 and "FAIL  data: one file changed\n     restore it" in result.output


def test_the_real_checks_end_without_an_exception():
    checks = list(all_checks("no/such-model"))
    assert [one.name for one in checks] == [
        "python", "packages", "machine", "kernel", "widgets", "notebooks", "data", "model",
    ]
    assert all(one.advice for one in checks if one.state == "failed") and {one.state for one in checks} <= set(MARKS)
    assert checks[-1].state == "failed" and "not on this machine" in checks[-1].found  # tests are offline


def test_a_model_on_the_hub_is_worth_a_note(monkeypatch):
    from fmn_nb.runs import check as check

    monkeypatch.setattr(check, "check_on_hub", lambda name: None)
    assert check.named_model("owner/name").state == "note" and "downloads" in check.named_model("owner/name").advice


def test_a_changed_or_missing_data_file_is_noticed(tmp_path, monkeypatch):
    from fmn_nb.runs import check as check

    monkeypatch.setattr(check, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(check, "bundled_models", lambda: {})
    assert check.data().state == "failed"
    (tmp_path / "sprites").mkdir()
    (tmp_path / "sprites" / "cat.png").write_bytes(b"whole")
    (tmp_path / "prompts.txt").write_text("a photo of a cat")
    write_checksums(tmp_path)
    assert check.data().state == "ok"
    (tmp_path / "sprites" / "cat.png").write_bytes(b"half")
    (tmp_path / "prompts.txt").unlink()
    assert "2 of 2 files missing or changed: prompts.txt, sprites/cat.png" in check.data().found


@pytest.fixture
def another_kernel(tmp_path, monkeypatch):
    """A kernelspec python3 that starts something else, found before the environment's own."""
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["/elsewhere/python", "-m", "ipykernel"], "display_name": "x"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")


def test_runs_start_this_python_whatever_kernels_are_installed(another_kernel, command, write_notebook):
    notebook = write_notebook("03_stub.ipynb", CELL, f"import sys; assert sys.executable == {sys.executable!r}")
    assert command("run", "--notebooks", notebook).exit_code == 0
    assert kernel().state == "note" and "JupyterLab's kernel python3 starts /elsewhere/python" in kernel().found
    assert "ipykernel install" in kernel().advice


@pytest.mark.parametrize("name", ["run", "forget cat", "benchmark", "pretrain", "sweep spec.yaml"])
@pytest.mark.parametrize("out", ["", " ", "data://x", "://x"])
def test_a_folder_that_is_none_is_no_place_for_results(command, tmp_path, name, out):
    (tmp_path / "spec.yaml").write_text("grid: {concept: [cat]}")
    result = command(*name.split(), "--out", out)
    assert result.exit_code == 2 and "Error: " in result.output and "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["spec.yaml"]
