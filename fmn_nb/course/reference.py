"""The reference's sources: a page for each folder of the package, an entry for each name that its face offers."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import fmn_nb
from fmn_nb.files import write_text

#: from what a reader meets first to what it builds on
ORDER = ("models", "concepts", "attention", "forgetting", "patches", "evaluation", "attacks", "inversion", "runs",
         "plots", "widgets", "emoji", "course", "files", "stats")


def write_reference(folder: Path) -> None:
    """Write the reference's pages, index.rst and one for each folder, into `folder`."""
    known = [name for name in ORDER if name in fmn_nb._FOLDERS]
    names = [*known, *(name for name in fmn_nb._FOLDERS if name not in known)]
    for name in names:
        write_text(folder / f"{name}.rst", _page(f"fmn_nb.{name}"))
    at_once = "\n".join(f"* ``fmn.{name}``: :py:obj:`{_home(name)}`" for name in sorted(fmn_nb.__all__)
                        if not name.startswith("_"))
    contents = "\n".join(f"   {name}" for name in names)
    write_text(folder / "index.rst", f"""{_title("Reference")}
.. code-block:: python

   import fmn_nb as fmn

What ``fmn`` itself offers:

{at_once}

.. toctree::
   :maxdepth: 1

{contents}
""")


def _home(name: str) -> str:
    """The folder's name for what the package itself offers: `load` stands on the page of `fmn_nb.models`."""
    value = getattr(fmn_nb, name)
    homes = [folder for folder in fmn_nb._FOLDERS
             if getattr(importlib.import_module(f"fmn_nb.{folder}"), name, None) is value]
    return f"fmn_nb.{homes[0]}.{name}" if homes else name


def _page(module: str) -> str:
    face = importlib.import_module(module)
    names = list(getattr(face, "__all__", ())) or [
        name for name, value in vars(face).items() if not name.startswith("_") and inspect.isroutine(value)
        and value.__module__ == module]
    parts = [_title(module), f".. automodule:: {module}", f".. currentmodule:: {module}"]
    for name in sorted(names, key=str.lower):
        value = getattr(face, name)
        if inspect.isclass(value):
            parts.append(f".. autoclass:: {name}\n   :members:")
        elif callable(value):
            parts.append(f".. autofunction:: {name}")
        elif not inspect.ismodule(value):
            parts.append(f".. autodata:: {name}\n   :no-value:")
    return "\n\n".join(parts) + "\n"


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n"
