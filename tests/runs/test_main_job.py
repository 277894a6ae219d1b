"""The command's main job on the bundled model, from end to end: the same request gives the same result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REQUEST = ("--concept", "frog", "--seed", "1", "--notebooks", "03,04")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of the same run, started in two different working directories."""
    return [run_in(tmp_path_factory.mktemp(name)) for name in ("here", "there")]


def run_in(folder: Path) -> Path:
    command = [sys.executable, "-m", "fmn_nb.cli", "run", *REQUEST, "--out", "out"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"report: {folder / 'out' / 'report.html'}"
    return folder / "out"


def without_cost(found: Any) -> Any:
    """Figures without seconds and memory, which differ from run to run."""
    if not isinstance(found, dict):
        return found
    return {key: without_cost(value) for key, value in found.items() if "seconds" not in key and "memory" not in key}


def read(path: Path) -> Any:
    return without_cost(json.loads(path.read_text(encoding="utf-8")))


def test_the_same_run_gives_the_same_figures_wherever_it_starts(twice):
    one, other = (read(folder / "metrics.json") for folder in twice)
    assert one == other
    assert one["concept"] == {"name": "frog", "kind": "object"} and one["after"]["ua"] > one["before"]["ua"]
    assert "m_score" in one["skipped"]


def test_the_same_run_gives_the_same_patch_byte_for_byte(twice):
    one, other = (folder / "patch" for folder in twice)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir()) and "fmn.json" in files
    for name in files:
        if name == "fmn.json":  # it tells seconds and memory too
            assert read(one / name) == read(other / name)
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes()
