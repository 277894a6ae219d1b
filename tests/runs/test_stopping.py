"""A command that is ended by a signal says in one line what is finished, keeps it, and leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import yaml

CELL = 'concept: str = "cat"  # what\nout: str = ""  # folder'
SLOW = "import pathlib, time; print('so', 'far'); (pathlib.Path(out) / 'begun').touch(); time.sleep(100)"
STUBBORN = f"""
try: {SLOW}
except BaseException: time.sleep(100)
"""
PATIENCE = 6.0  # seconds: 2 are promised on a machine that is not busy with other tests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")


def heed_interrupts() -> None:
    """As in a shell's foreground, wherever the tests run: under nohup, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A function that starts the command, waits until `ready` is true, signals its group, and returns what it said."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))

    def stop(*words, ready, number=signal.SIGINT, group=True) -> str:
        command = [sys.executable, "-m", "fmn_nb.cli", *map(str, words)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True, preexec_fn=heed_interrupts)
        deadline = time.monotonic() + 300
        while not ready() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        struck = time.monotonic()
        (os.killpg if group else os.kill)(process.pid, number)
        said, errors = process.communicate(timeout=60)
        seconds = time.monotonic() - struck
        last = errors.strip().splitlines()[-1]
        print(f"{seconds:.2f} s", errors, said)
        assert process.returncode == 130 and last.startswith("stopped: ") and seconds < PATIENCE
        assert "Traceback" not in errors and errors.count("stopped: ") == 1
        assert not psutil.wait_procs(family, timeout=2)[1]
        # torch keeps a cache of its own, onnxruntime a file, where it is installed
        assert not [one for one in temporary.iterdir() if "torch" not in one.name and one.name != ".ses"]
        assert not list(tmp_path.rglob("*.part*"))
        return last

    return stop


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_run_keeps_what_is_finished_and_says_how_to_go_on(stopped, write_notebook, tmp_path, name):
    one, two = write_notebook("01_quick.ipynb", CELL), write_notebook("02_slow.ipynb", CELL, SLOW)
    words = ("run", "--notebooks", f"{one},{two}", "--out", "out")
    out = tmp_path / "out"
    said = stopped(*words, ready=(out / "begun").exists, number=getattr(signal, name))
    assert said == "stopped: 1 of 2 notebooks finished; the same command continues"
    state = json.loads((out / "run.json").read_text())
    assert state["status"] == "stopped"
    assert [note["status"] for note in state["notebooks"].values()] == ["done", "stopped"]
    kept = nbformat.read(out / "02_slow.failed.ipynb", as_version=4)
    assert "so far" in str(kept.cells[-1].outputs) and not (out / "02_slow.ipynb").exists()


def test_a_kernel_that_will_not_end_is_ended(stopped, write_notebook, tmp_path):
    slow = write_notebook("02_slow.ipynb", CELL, STUBBORN)
    said = stopped("run", "--notebooks", slow, "--out", "out", ready=(tmp_path / "out" / "begun").exists, group=False)
    assert said == "stopped: 0 of 1 notebooks finished; the same command continues"
    assert (tmp_path / "out" / "02_slow.failed.ipynb").exists()


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_sweep_stops_with_its_workers_and_goes_on(stopped, stub_sweep, tmp_path, name):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(stub_sweep(SLOW.replace("100", "100 * seed"), workers=2)))

    def ready() -> bool:
        states = [json.loads(path.read_text())["status"] for path in (tmp_path / "out").glob("*/run.json")]
        begun = len(list((tmp_path / "out").glob("*/begun")))
        return states.count("done") == 2 and begun == 4

    said = stopped("sweep", "spec.yaml", "--out", "out", ready=ready, number=getattr(signal, name))
    assert said == "stopped: 2 of 4 runs finished; the same command continues"
    states = [json.loads(path.read_text())["status"] for path in (tmp_path / "out").glob("*/run.json")]
    assert sorted(states) == ["done", "done", "stopped", "stopped"]
    assert len(list((tmp_path / "out").glob("*/03_stub.failed.ipynb"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_training_stops_and_says_how_far_it_is(stopped, tmp_path, name):
    said = stopped("pretrain", "--smoke", "--out", "models", number=getattr(signal, name),
                   ready=lambda: list((tmp_path / "models").rglob("vae*")))
    assert re.fullmatch(r"stopped: [1-7] of 8 stages finished; the same command continues", said)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_benchmark_keeps_the_jobs_that_are_finished(stopped, tmp_path, workers):
    (tmp_path / "settings.yaml").write_text("paper: {steps: 1, reference_count: 1, reference_steps: 1}\n")
    words = ("benchmark", "--presets", "paper", "--concepts", "identities", "--out", "out", "--work", "jobs",
             "--settings", "settings.yaml", "--workers", workers)
    said = stopped(*words, ready=lambda: list((tmp_path / "jobs").glob("*-seed0-*.json")))
    assert re.fullmatch(r"stopped: [1-3] of 4 jobs finished; the same command continues", said)
    assert len(list((tmp_path / "jobs").glob("*-seed0-*.json"))) == int(said[len("stopped: ")])
