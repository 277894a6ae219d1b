"""Dask's workers: their own processes, an existing scheduler's, Slurm's through a stand-in; some killed in a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas
import psutil
import pytest
from distributed import Client

from fmn_nb.runs import executors
from fmn_nb.runs.executors import executed, threads_each
from fmn_nb.runs.spec import plan_sweep
from fmn_nb.runs.storage import SweepError
from fmn_nb.runs.sweep import attempt, run_sweep


@pytest.fixture
def spec(stub_sweep):
    return stub_sweep


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
    address = json.loads(file.read_text())["address"]
    with Client(address) as client:  # a run that starts before the second worker is there would have all cores
        client.wait_for_workers(2, timeout=60)
    yield address
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
    folder, failed = run_sweep(plan_sweep(spec(kill_once, measure), tmp_path / "out"), scheduler=scheduler, page=False)
    assert failed == [] and flag.exists() and signal.SIGKILL
    assert list(pandas.read_csv(folder / "results.csv")["after.ua"]) == [0.3, 0.4, 0.4, 0.5]


@pytest.mark.slow
def test_what_the_runs_shared_on_their_workers_machines_is_removed(spec, scheduler, tmp_path):
    shared, plans = tmp_path / ".cache", plan_sweep(spec(), tmp_path / "out").plans
    shared.mkdir()
    (shared / "latents").touch()
    assert [error for _, error in executed(plans, lambda plan: None, 2, scheduler, None, shared)] == [None] * 4
    assert not shared.exists()


@pytest.mark.slow
def test_cards_that_no_worker_has_are_told(spec, scheduler, tmp_path):
    plans = plan_sweep(spec(), tmp_path / "out").plans
    with pytest.raises(SweepError, match=r'none of the workers .* --resources "GPU=1"'):
        list(executed(plans, attempt, 1, scheduler, {"kind": "local", "gpu": True}))


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["a cluster of its own", "an existing scheduler"])
def test_two_workers_of_one_machine_divide_its_cores_among_their_kernels(spec, tmp_path, request, monkeypatch, own):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    measure = "import os, fmn_nb; fmn_nb.record(out, {'after': {'images': int(os.environ['OMP_NUM_THREADS'])}})"
    content = spec(measure, workers=2, **({"cluster": {"kind": "local"}} if own else {}))
    scheduler = None if own else request.getfixturevalue("scheduler")
    folder, failed = run_sweep(plan_sweep(content, tmp_path / "out"), scheduler=scheduler, page=False)
    assert failed == [] and set(pandas.read_csv(folder / "results.csv")["after.images"]) == {threads_each(2)}


@pytest.mark.slow
def test_one_worker_of_a_local_cluster_has_all_cores(spec, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    measure = "import os, fmn_nb; fmn_nb.record(out, {'after': {'images': int(os.environ['OMP_NUM_THREADS'])}})"
    content = spec(measure, grid={"seed": [0]}, cluster={"kind": "local"})
    folder, failed = run_sweep(plan_sweep(content, tmp_path / "out"), page=False)
    assert failed == [] and list(pandas.read_csv(folder / "results.csv")["after.images"]) == [threads_each(1)]
    assert "OMP_NUM_THREADS" not in os.environ, "this process keeps its environment"


@pytest.mark.slow
def test_a_run_that_kills_its_workers_is_given_up_and_the_others_are_kept(spec, tmp_path):
    kill = "import os, signal, time\nif seed: os.kill(os.getppid(), signal.SIGKILL); time.sleep(20)"
    measure = "import fmn_nb; fmn_nb.record(out, {'after': {'ua': 0.5}})"
    content = spec(kill, measure, grid={"seed": [1, 0]}, cluster={"kind": "local", "n_workers": 1})
    folder, failed = run_sweep(plan_sweep(content, tmp_path / "out"), page=False)
    assert [row["error"] for row in failed] == [executors.KILLED]
    assert list(pandas.read_csv(folder / "results.csv")["status"]) == ["failed", "done"]


@pytest.mark.slow
def test_slurm_jobs_through_a_stand_in_sbatch(spec, tmp_path, monkeypatch):
    tools, jobs = tmp_path / "bin", tmp_path / "jobs"
    tools.mkdir(), jobs.mkdir()
    # Like Slurm: the script runs elsewhere, in its own session, with the cores it asked for; scancel ends it.
    _script(tools / "sbatch", f"""
n=$$; cp "$1" {jobs}/$n.sh
SLURM_CPUS_PER_TASK=3 setsid bash {jobs}/$n.sh > {tmp_path}/job-$n.log 2>&1 < /dev/null &
echo $! > {tmp_path}/job-$n.pid
echo "Submitted batch job $n"
""")
    _script(tools / "scancel", f'kill -- -$(cat {tmp_path}/job-$1.pid); echo $1 >> {tmp_path}/cancelled')
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    measure = ("import os, fmn_nb; assert os.environ['OMP_NUM_THREADS'] == '3'\n"
               "fmn_nb.record(out, {'after': {'ua': (len(concept) + seed) / 10}})")
    block = {"kind": "slurm", "cores": 3, "memory": "2GB", "queue": "short", "interface": "lo"}
    content = spec(measure, grid={"concept": ["cat", "frog"]}, cluster=block)
    folder, failed = run_sweep(plan_sweep(content, tmp_path / "out"), workers=2, page=False)
    assert failed == [] and list(pandas.read_csv(folder / "results.csv")["after.ua"]) == [0.3, 0.4]
    scripts = sorted(jobs.iterdir())
    assert len(scripts) == 2 and "#SBATCH -p short" in scripts[0].read_text()
    assert "#SBATCH --cpus-per-task=3" in scripts[0].read_text()
    cancelled = sorted((tmp_path / "cancelled").read_text().split())
    assert cancelled == sorted(script.stem for script in scripts), "jobs end with the sweep"


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text.strip()}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_the_specs_own_local_cluster_gives_a_card_to_one_run_at_a_time(spec, tmp_path):
    busy = tmp_path / "busy"
    alone = f"import pathlib, time; busy = pathlib.Path({str(busy)!r}); busy.mkdir(); time.sleep(0.5); busy.rmdir()"
    content = spec(alone, cluster={"kind": "local", "n_workers": 1, "threads_per_worker": 2, "gpu": True})
    assert run_sweep(plan_sweep(content, tmp_path / "out"), page=False)[1] == []


def test_a_scheduler_that_is_not_there_is_told(spec, tmp_path, monkeypatch):
    import distributed

    def refuse(*_args, **_options):
        raise OSError("Timed out trying to connect to tcp://127.0.0.1:1")

    monkeypatch.setattr(distributed, "Client", refuse)
    plans = plan_sweep(spec(), tmp_path / "out").plans
    with pytest.raises(SweepError, match="the Dask scheduler cannot be reached: Timed out"):
        list(executed(plans, attempt, 1, "tcp://127.0.0.1:1", None))


@pytest.mark.parametrize(("booked", "cores", "share"), [("6", 8, "3"), ("", 8, "2"), ("", 4, "2")])
def test_a_workers_share_is_of_what_it_was_given_or_of_the_machine(monkeypatch, booked, cores, share):
    """Two threads a worker; on the machine's 8 cores there are two such workers, unless this one has its own cores."""
    import dask.system
    import distributed

    everyone = {"tcp://a:1": {"host": "a", "nthreads": 2}, "tcp://a:2": {"host": "a", "nthreads": 2},
                "tcp://b:1": {"host": "b", "nthreads": 9}}
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(dask.system, "CPU_COUNT", cores)
    monkeypatch.setattr(os, "environ", {"SLURM_CPUS_PER_TASK": booked, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"})
    worker = SimpleNamespace(address="tcp://a:1", state=SimpleNamespace(nthreads=2))
    monkeypatch.setattr(distributed, "get_worker", lambda: worker)
    client = SimpleNamespace(scheduler_info=lambda: {"workers": everyone})
    monkeypatch.setattr(distributed, "get_client", lambda: client)
    variables = executors._own_share()
    assert variables["OMP_NUM_THREADS"] == share and variables["MKL_NUM_THREADS"] == "2"


def test_a_scheduler_without_workers_is_told():
    def wait(_count, timeout):
        raise TimeoutError

    with pytest.raises(SweepError, match="tcp://x:1 has no workers; start some with: dask worker tcp://x:1"):
        executors._check_workers(SimpleNamespace(wait_for_workers=wait), "tcp://x:1", gpu=False)


def test_every_local_worker_has_a_card_of_its_own(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert executors._cards(2) == ["4", "7"]
    with pytest.raises(SweepError, match="3 workers need a card each and this machine has 2"):
        executors._cards(3)


def test_a_missing_package_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    plans = plan_sweep(spec(), Path(tmp_path / "out")).plans
    with pytest.raises(SweepError, match="dask-jobqueue is not installed: pip install"):
        list(executed(plans, attempt, 1, None, {"kind": "slurm"}))


class Lost:
    """A future whose scheduler is gone."""

    status = "lost"


def test_a_lost_scheduler_is_told_with_what_to_do():
    with pytest.raises(SweepError, match="the connection to the Dask scheduler was lost.*the same command continues"):
        executors._has_failed(Lost())


def test_runs_of_two_users_of_one_scheduler_are_never_taken_for_one(spec, tmp_path):
    """Dask executes one of two tasks with the same key, so no two calls may have one in common."""
    plans, keys = plan_sweep(spec(), tmp_path / "out").plans[:1], []

    def submit(work, key):
        keys.extend(key)
        raise KeyboardInterrupt

    class Threads:
        cluster = None

        def nthreads(self):
            return {"worker": 1}

    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                list(executors._through(Threads(), submit, plans, 1, print))
    assert len(set(keys)) == 2
