"""Docstrings of this package, plain text with `code` and Google's sections, as reStructuredText for Sphinx.

Plain text that reStructuredText would read as marks is taken literally; a list of "name: what it is" becomes a list,
and an indented block becomes code.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

SECTIONS = {"Args", "Attributes", "Raises", "Returns", "Yields"}  # napoleon, which comes with Sphinx, reads these
_QUOTED = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
_ITEM = re.compile(r"^[\w ,.*\"'`()|/-]{1,60}: \S")


def as_rst(docstring: str) -> str:
    """The docstring for Sphinx."""
    blocks, parts = re.split(r"\n[ \t]*\n", inspect.cleandoc(docstring)), []
    section = False
    for block in blocks:
        first = block.partition("\n")[0]
        section = first.rstrip(":") in SECTIONS and first.endswith(":") or section and first.startswith(" ")
        parts.append(_literal(block) if section else _block(block))
    return "\n\n".join(parts)


def of_data(value: Any) -> str:
    """What to say about a constant: what it holds, if those are names."""
    names = list(value) if isinstance(value, dict | list | tuple | set | frozenset) else []
    if not names or not all(isinstance(name, str) for name in names):
        return ""
    return "Holds " + ", ".join(f"``{name}``" for name in names) + "."


def _block(block: str) -> str:
    """One block between blank lines, outside of Google's sections."""
    if block.startswith(" "):
        return "::\n\n" + textwrap.indent(textwrap.dedent(block), "   ")
    lines = block.split("\n")
    if not any(line.startswith(" ") for line in lines):
        return _literal(block)
    entries: list[list[str]] = []  # each line at the margin, with the deeper ones that follow it
    for line in lines:
        if line.startswith(" "):
            entries[-1].append(line)
        else:
            entries.append([line])
    return "\n\n".join(_entry(first, textwrap.dedent("\n".join(deeper))) for first, *deeper in entries)


def _entry(first: str, deeper: str) -> str:
    if deeper and first.endswith(":"):
        return f"{_literal(first)}\n\n{_block(deeper)}"
    text = _literal(" ".join([first, *deeper.split("\n")]).strip())
    return f"* {text}" if _ITEM.match(first) else text


def _literal(text: str) -> str:
    """Text in which reStructuredText finds no marks but code."""
    parts = _QUOTED.split(text)
    parts[::2] = [re.sub(r"([*|\\])|(?<=\w)_(?!\w)", lambda found: "\\" + found[0], part) for part in parts[::2]]
    parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(parts)
