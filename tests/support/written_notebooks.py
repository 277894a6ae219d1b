"""Notebooks made on the spot, for tests that run real kernels."""

from pathlib import Path

import nbformat


def write_notebook_at(path: Path, parameters: str, *cells: str, **promises: list[str]) -> Path:
    """Write a notebook with a tagged parameters cell, further code cells and its promises; return its path."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    if promises:
        notebook.metadata["fmn"] = promises
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path
