"""What all tests share: the emoji model and its world, notebooks written on the spot, nbval's patience."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from written_notebooks import write_notebook_at

from fmn_nb.runs.executors import patient_threads, thread_variables, threads_each

OUTPUT_TIMEOUT = 120  # seconds between two messages of a cell; nbval's 5 are too few for a cold import

# Nothing here may reach for the network: a hub id in a test is a mistake that must show at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Threads that wait should sleep: what they spin away counts as a test's own processor time.
os.environ.update(patient_threads(os.environ))

# With `-n 2`, each of the two workers takes its share of the cores: with threads for all cores in both, they'd wait for
# one another, and everything would take several times as long.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.update(thread_variables(threads_each(int(os.environ["PYTEST_XDIST_WORKER_COUNT"])), os.environ))


#: several fine-tunes and attacks each: `pytest -m slow notebooks`
SLOW_NOTEBOOKS = ("04_", "05_", "06_", "08_", "09_", "10_")


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = OUTPUT_TIMEOUT
        if item.path.suffix == ".ipynb" and item.path.name.startswith(SLOW_NOTEBOOKS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def emoji():
    """The bundled emoji pipeline on the CPU, the same for all tests: whoever changes it changes it back."""
    import fmn_nb as fmn

    return fmn.load("emoji", device="cpu")


@pytest.fixture(scope="session")
def world(emoji):
    """The emoji world, with its judges, CLIP and scenes."""
    from fmn_nb.concepts.world import world_of

    return world_of(emoji)


@pytest.fixture(scope="session")
def judge(world):
    """The bundled judge."""
    return world.judge


@pytest.fixture(scope="session")
def oracle_folder(tmp_path_factory):
    """The folder of an oracle in the smoke size, as far as it differs from the emoji model; the whole is beside it."""
    from fmn_nb.emoji.training.oracle import keep_difference
    from fmn_nb.emoji.training.recipe import pretrain
    from fmn_nb.emoji.training.request import Request

    out = tmp_path_factory.mktemp("oracle") / "models"
    pretrain(Request(out, smoke=True, without=("cat", "fluent"), stages=["diffusion"]), lambda line: None)
    keep_difference(out / "emoji-diffusion", out / "emoji-oracle")
    return out / "emoji-oracle"


@pytest.fixture(scope="session")
def oracle(oracle_folder):
    """A smoke oracle as a pipeline on the CPU; it never learned "cat" and "fluent", nor anything else."""
    import fmn_nb as fmn

    pipe = fmn.load(str(oracle_folder), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def record():
    """What a tiny pipeline's attention did in three steps; its images, [1, 16, 24, 3] in [0, 1], as `pixels`."""
    from tiny import generate, tiny_sd

    from fmn_nb.attention.recorder import record_attention

    pipe = tiny_sd()
    with record_attention(pipe) as attention:
        attention.pixels = generate(pipe, "a photo of a cat and a frog", steps=3)
    return attention


@pytest.fixture(scope="session")
def picture(record):
    """The image that `record` was made with."""
    from PIL import Image

    return Image.fromarray((record.pixels[0] * 255).astype("uint8"))


@pytest.fixture
def write_notebook(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small notebook: parameters cell, further cells, and its promises."""

    def write(name: str, parameters: str, *cells: str, **promises: list[str]) -> Path:
        return write_notebook_at(tmp_path / "course" / name, parameters, *cells, **promises)

    return write
