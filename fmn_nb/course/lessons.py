"""The course's notebooks as committed: which there are, and what everything made from them needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmn_nb.files import write_json
from fmn_nb.runs.plan import course_notebooks

if TYPE_CHECKING:
    from nbformat import NotebookNode

#: a Markdown link or image and where it leads: [words](target) and ![alt](target)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"^(?:[a-z]+:|#|//)")  # a link that leads to no file beside the page


class CourseError(ValueError):
    """A notebook breaks the course's rules, or a request can't be met; the message says what to do."""


@dataclass(frozen=True)
class Lesson:
    """One numbered notebook of the course."""

    number: str
    path: Path

    @property
    def name(self) -> str:
        """The file's name without its ending, "03_forget_me_not"."""
        return self.path.stem

    def read(self) -> NotebookNode:
        """A fresh copy of the notebook, which the caller may change."""
        import nbformat

        return nbformat.read(self.path, as_version=4)


def lessons_of(numbers: list[str] | None = None) -> list[Lesson]:
    """The course's notebooks in order, or those with these two-digit numbers.

    Raises:
        CourseError: a number that no notebook has.
    """
    course = course_notebooks()
    unknown = [number for number in numbers or () if number not in course]
    if unknown:
        raise CourseError(f"no notebook has the number {unknown[0]}; there are {', '.join(course)}")
    return [Lesson(number, path) for number, path in course.items() if numbers is None or number in numbers]


def title_of(notebook: NotebookNode) -> str:
    """The text of a notebook's first heading."""
    first = notebook.cells[0].source.partition("\n")[0]
    if not first.startswith("# "):
        raise CourseError("a notebook must open with a '# ' heading in a Markdown cell")
    return first[2:].strip()


def empty_folder(out: Path, again: str) -> Path:
    """`out`, unless it holds something that no earlier call of the same command (`again`, its mark) left there.

    Raises:
        CourseError: it does; nothing was changed.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()) and not (out / again).is_file():
        raise CourseError(f"{out} is not empty and was not made by this command; give --out a new or empty folder")
    return out


def begun_folder(out: Path, mark: str) -> Path:
    """The same with the mark in it, so that the command may go on there if it is cut short."""
    if not (empty_folder(out, mark) / mark).is_file():
        write_json(out / mark, {})
    return out
