"""Running the course's notebooks with other parameters, and with their exercises solved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from fmn_nb.files import notebooks_dir

SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)
CHECK = re.compile(r"(\w+) = None  # .+ here.*\n((?:.|\n)+)")


def run_notebook(number: str, folder: Path, parameters: dict,
                 change: Callable[[nbformat.NotebookNode], None] | None = None) -> nbformat.NotebookNode:
    """Execute a notebook of the course with other parameters; an error in a cell is raised."""
    [path] = notebooks_dir().glob(f"{number}_*.ipynb")
    notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
    if change is not None:
        change(notebook)
    return NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


def exercises(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, str]]:
    """Each exercise's cell with its check, and its solution's code."""
    solutions = [code for cell in notebook.cells if cell.cell_type == "markdown"
                 for code in SOLUTION.findall(cell.source)]
    checks = [cell for cell in notebook.cells if cell.cell_type == "code" and CHECK.fullmatch(cell.source)]
    assert len(solutions) == len(checks) >= 4
    return list(zip(checks, solutions, strict=True))


def solve(notebook: nbformat.NotebookNode, wrong: Mapping[str, Sequence[str]]) -> None:
    """Put each solution where the reader is to put it, and after it wrong answers, each of which the check must refuse.

    `wrong`: the name that the reader assigns -> expressions.
    """
    for check, solution in exercises(notebook):
        name, rest = CHECK.fullmatch(check.source).groups()
        lines = [solution, f"assert {name} is not None", rest, "from dataclasses import replace", f"_right = {name}"]
        for number, answer in enumerate(wrong[name]):
            lines += [f"{name} = _right", f"{name} = {answer}",
                      f"try:\n    exec({rest!r})\nexcept AssertionError:\n    {name} = 'refused'",
                      f"assert {name} == 'refused', 'the check takes wrong answer {number}'"]
        check.source = "\n".join(lines)
