"""What tests of sweeps share: a specification of small runs whose notebook is written on the spot."""

from collections.abc import Callable
from pathlib import Path

import pytest

CELL = """\
model: str = ""  # model
concept: str = "cat"  # what to forget
seed: int = 0  # seed
steps: int = 2  # steps [1..9]
out: str = ""  # folder
"""


@pytest.fixture
def stub_sweep(write_notebook, tmp_path: Path) -> Callable[..., dict]:
    """A function that makes a specification of two concepts and two seeds, whose notebook holds the given cells.

    The model is a folder that passes as a foreign one, which takes any concept; the notebooks never load it.
    """
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")

    def make(*cells: str, **more) -> dict:
        notebook = write_notebook("03_stub.ipynb", CELL, *cells)
        grid = {"concept": ["cat", "frog"], "seed": [0, 1]}
        return {"notebook": str(notebook), "fixed": {"model": str(tmp_path / "model")}, "grid": grid, **more}

    return make
