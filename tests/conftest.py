"""What all tests share: notebooks written on the spot, and nbval's patience with slow output."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests_support import write_notebook_at

OUTPUT_TIMEOUT = 120  # seconds between two messages of a cell; nbval's 5 are too few for a cold import

# Nothing here may reach for the network: a hub id in a test is a mistake that must show at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


SLOW_NOTEBOOKS = ("05_", "06_")  # several fine-tunes and attacks each: `pytest -m slow notebooks`


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = OUTPUT_TIMEOUT
        if item.path.suffix == ".ipynb" and item.path.name.startswith(SLOW_NOTEBOOKS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def write_notebook(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small notebook: parameters cell, further cells, and its promises."""

    def write(name: str, parameters: str, *cells: str, **promises: list[str]) -> Path:
        return write_notebook_at(tmp_path / "course" / name, parameters, *cells, **promises)

    return write
