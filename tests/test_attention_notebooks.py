"""Notebooks 01 and 02 beyond their committed run: on other models, prompts and phrases, and with their solutions."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb.paths import notebooks_dir

NOTEBOOKS = {"01": "01_qkv_cross_attention", "02": "02_concept_attention_maps"}
MODELS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)
#: an answer to each exercise that its check must refuse
WRONG = {"shares": "[0.2, 0.3, 0.5]", "factor": "1.0", "head": "(head + 1) % layer.heads", "blind": "image",
         "causal_map": "taught_map", "photo": "attention.mass(target) + 0.5", "early": "whole + 0.1",
         "crossed": "(True, 0.5, 0.5)", "chosen": "min(seen.layers, key=lambda name: mean_scores(layer=name)['iou'])"}

pytestmark = pytest.mark.slow


def run(number: str, folder: Path, parameters: dict, change: Callable[[nbformat.NotebookNode], None] | None = None,
        ) -> nbformat.NotebookNode:
    """Execute a notebook of the course with other parameters; an error in a cell is raised."""
    notebook = load_notebook_node(str(notebooks_dir() / f"{NOTEBOOKS[number]}.ipynb"))
    notebook = parameterize_notebook(notebook, parameters)
    if change is not None:
        change(notebook)
    return NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


def exercises(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, str]]:
    """Each exercise's cell with its check, and its solution's code."""
    pairs = [(check, found.group(1)) for text, check in pairwise(notebook.cells)
             if text.cell_type == "markdown" and (found := SOLUTION.search(text.source))]
    assert len(pairs) >= 4 and all(check.cell_type == "code" for check, _ in pairs)
    return pairs


def solve(notebook: nbformat.NotebookNode) -> None:
    """Put each solution where the reader is to put it, and after it a wrong answer, which the check must refuse."""
    for check, solution in exercises(notebook):
        first, _, rest = check.source.partition("\n")
        name = re.fullmatch(r"(\w+) = None  # .+", first).group(1)
        refused = (f"{name} = {WRONG[name]}\ntry:\n    exec({rest!r})\nexcept AssertionError:\n    {name} = 'refused'\n"
                   f"assert {name} == 'refused', 'the check takes a wrong answer'")
        check.source = f"{solution}\nassert {name} is not None\n{rest}\n{refused}"


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_every_solution_passes_its_check_and_a_wrong_one_does_not(number, tmp_path):
    run(number, tmp_path, {"draw_steps": 6}, solve)


@pytest.mark.parametrize("number", NOTEBOOKS)
@pytest.mark.parametrize("kind", MODELS)
def test_they_run_on_any_model_prompt_phrase_and_seed(number, kind, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / kind)
    word = {"01": {"phrase": "blue background"}, "02": {"concept": "blue background", "out": str(tmp_path / "run")}}
    run(number, tmp_path, {"model": str(tmp_path / kind), "prompt": "a fish on a blue background", "seed": 3,
                           "draw_steps": 2} | word[number])
    if number == "02":
        assert (tmp_path / "run" / "images" / "attention_steps.gif").is_file()


@pytest.mark.parametrize("concept, kind", [("frog", "object"), ("noto", "style")])
def test_notebook_02_looks_for_other_concepts(concept, kind, tmp_path):
    run("02", tmp_path, {"concept": concept, "kind": kind, "draw_steps": 4})
