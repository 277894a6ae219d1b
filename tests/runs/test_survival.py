"""The longer suite: sweeps killed at random moments and on a full disk lose nothing and end in the same table."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest
import yaml

from fmn_nb.runs.spec import plan_sweep
from fmn_nb.runs.sweep import run_sweep

pytestmark = pytest.mark.slow

MEASURE = """\
import time
from PIL import Image
import fmn_nb
for part in range(3):
    time.sleep(0.3)
    fmn_nb.save_image(out, f"before_{part}", Image.effect_noise((400, 400), 50), alt="noise")
fmn_nb.record(out, {"after": {"ua": (len(concept) + seed) / 10}})
"""
UNBROKEN = [0.3, 0.4, 0.4, 0.5]


@pytest.fixture
def spec(stub_sweep, tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(stub_sweep(MEASURE, workers=2)))
    return tmp_path / "spec.yaml"


def assert_whole(folder: Path) -> None:
    """Every run is there once and whole, the table is that of an unbroken sweep, nothing temporary is left."""
    table = pandas.read_csv(folder / "results.csv")
    assert list(table["after.ua"]) == UNBROKEN and set(table["status"]) == {"done"}
    assert list(pandas.read_parquet(folder / "results.parquet")["after.ua"]) == UNBROKEN
    for name in table["folder"]:
        assert len(list((folder / name / "images").glob("*.png"))) == 3
        assert (folder / name / "report.html").read_text().rstrip().endswith("</html>")
    assert not list(folder.rglob("*.part*")) and not list(folder.rglob("*.failed.ipynb"))


@pytest.mark.parametrize("number", range(20))
def test_a_sweep_killed_at_a_random_moment_completes(spec, tmp_path, number):
    chance = random.Random(number)
    command = [sys.executable, "-m", "fmn_nb.cli", "sweep", str(spec), "--out", str(tmp_path / "out"), "--retry-failed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(chance.uniform(0.5, 12))
    if process.poll() is None:
        sweep = psutil.Process(process.pid)
        family = [sweep, *sweep.children(recursive=True)]
        chance.choice([sweep, *family]).kill()  # the sweep, a worker or a kernel
    process.wait(timeout=300)
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert_whole(tmp_path / "out")


def test_a_killed_kernel_fails_its_run_alone_and_in_words(stub_sweep, tmp_path):
    flag = tmp_path / "killed"
    kill_once = (
        f"import os, pathlib, signal, time; flag = pathlib.Path({str(flag)!r})\n"
        "if seed and concept == 'cat' and not flag.exists():\n"
        "    flag.touch(); os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
    )
    sweep = plan_sweep(stub_sweep(kill_once, MEASURE, workers=2), tmp_path / "out")
    folder, failed = run_sweep(sweep, page=False)
    assert [row["folder"] for row in failed] == [sweep.plans[1].out.name]
    assert "03_stub.ipynb failed: DeadKernelError: Kernel died" in failed[0]["error"]
    assert run_sweep(sweep, retry_failed=True, page=False)[1] == []
    assert_whole(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_fails_runs_without_half_written_files(spec, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        sweep = plan_sweep(spec, disk / "out")
        try:
            failed = run_sweep(sweep, page=False)[1]
            assert failed and all("space" in row["error"] for row in failed)
        except OSError as error:
            assert "space" in str(error)  # not even the table had room
        assert not list(disk.rglob("*.part*"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert run_sweep(sweep, retry_failed=True, page=False)[1] == []
        assert_whole(disk / "out")
    finally:
        subprocess.run(["umount", disk], check=False)
