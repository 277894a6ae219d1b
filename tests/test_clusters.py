"""Sweeps on Dask: a scheduler and two workers started here, one of them killed in the middle of a run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest

from fmn_nb.clusters import in_dask
from fmn_nb.sweep_specs import SweepError, plan_sweep
from fmn_nb.sweeps import attempt, run_sweep

pytest.importorskip("distributed", reason="the extra dask is not installed")

CELL = 'model: str = ""  # model\nconcept: str = "cat"  # what\nseed: int = 0  # seed\nout: str = ""  # folder'


@pytest.fixture
def spec(write_notebook, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")

    def make(*cells: str, **more) -> dict:
        notebook = write_notebook("03_stub.ipynb", CELL, *cells)
        grid = {"concept": ["cat", "frog"], "seed": [0, 1]}
        return {"notebook": str(notebook), "fixed": {"model": str(tmp_path / "model")}, "grid": grid, **more}

    return make


@pytest.fixture
def scheduler(tmp_path):
    """The address of a scheduler with two one-thread workers, all ended with the test."""
    processes = []

    def start(*words: str) -> None:
        log = open(tmp_path / f"{words[0]}-{len(processes)}.log", "w")  # noqa: SIM115  open as long as its process
        processes.append(subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:]],
                                          cwd=tmp_path, stdout=log, stderr=log))

    file = tmp_path / "scheduler.json"
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, "no scheduler"
        time.sleep(0.1)
    for _ in range(2):
        start("worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard")
    import json

    yield json.loads(file.read_text())["address"]
    for process in processes:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()


@pytest.mark.slow
def test_a_killed_worker_of_a_cluster_loses_nothing(spec, scheduler, tmp_path):
    flag = tmp_path / "killed"
    kill_once = (
        f"import os, pathlib, signal, time; flag = pathlib.Path({str(flag)!r})\n"
        "if seed and concept == 'cat' and not flag.exists():\n"
        "    flag.touch(); os.kill(os.getppid(), signal.SIGKILL); time.sleep(20)"
    )
    measure = "import fmn_nb; fmn_nb.record(out, {'after': {'ua': (len(concept) + seed) / 10}})"
    folder, failed = run_sweep(plan_sweep(spec(kill_once, measure), tmp_path / "out"), scheduler=scheduler)
    assert failed == [] and flag.exists() and signal.SIGKILL
    assert list(pandas.read_csv(folder / "results.csv")["after.ua"]) == [0.3, 0.4, 0.4, 0.5]


@pytest.mark.slow
def test_the_specs_own_local_cluster_gives_a_card_to_one_run_at_a_time(spec, tmp_path):
    busy = tmp_path / "busy"
    alone = f"import pathlib, time; busy = pathlib.Path({str(busy)!r}); busy.mkdir(); time.sleep(0.5); busy.rmdir()"
    content = spec(alone, cluster={"kind": "local", "n_workers": 1, "threads_per_worker": 2, "gpu": True})
    assert run_sweep(plan_sweep(content, tmp_path / "out"))[1] == []


def test_a_scheduler_that_is_not_there_is_told(spec, tmp_path, monkeypatch):
    import distributed

    def refuse(*_args, **_options):
        raise OSError("Timed out trying to connect to tcp://127.0.0.1:1")

    monkeypatch.setattr(distributed, "Client", refuse)
    plans = plan_sweep(spec(), tmp_path / "out").plans
    with pytest.raises(SweepError, match="the Dask scheduler cannot be reached: Timed out"):
        list(in_dask(plans, attempt, 1, "tcp://127.0.0.1:1", None))


def test_a_missing_package_is_named(spec, tmp_path):
    plans = plan_sweep(spec(), Path(tmp_path / "out")).plans
    if not _installed("dask_kubernetes"):
        with pytest.raises(SweepError, match="dask-kubernetes is not installed"):
            list(in_dask(plans, attempt, 1, None, {"kind": "kubernetes"}))


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
