"""The notebooks' exercises: a cell tagged `exercise` holds the task with its folded solution; the next one, tagged
`check`, holds the line for the answer and the code that checks it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmn_nb.course.lessons import CourseError

if TYPE_CHECKING:
    from nbformat import NotebookNode

TASK, CHECK = "exercise", "check"  # the cells' tags
_FOLDED = re.compile(r"\n*<details><summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", re.DOTALL)
_HEADING = re.compile(r"^\*\*(\d+)\. (.+?)\*\* \((easy|medium|hard), (\d+) minutes", re.MULTILINE)
_CHECK = re.compile(r"(?P<stub>(?P<name>\w+) = None  # .+ here.*)\nif (?P=name) is not None:\n(?P<body>(?:.|\n)+)")
POINTS = {"easy": 1, "medium": 2, "hard": 3}


@dataclass(frozen=True)
class Exercise:
    """One exercise, and where its two cells stand in the notebook."""

    number: int
    title: str
    difficulty: str
    task: int  # the Markdown cell's place
    check: int  # the code cell's
    name: str  # what the reader assigns
    stub: str  # the line to replace, "answer = None  # your image here"
    body: str  # what checks the answer
    solution: str

    @property
    def points(self) -> int:
        """1 for an easy exercise, 2 for a medium one, 3 for a hard one."""
        return POINTS[self.difficulty]

    @property
    def graded(self) -> str:
        """The check as a cell of its own, which also fails without an answer."""
        return f'assert {self.name} is not None, "exercise {self.number} has no answer yet"\n{self.body}'


def tags_of(cell: NotebookNode) -> list[str]:
    """A cell's tags."""
    return cell.metadata.get("tags", [])


def exercises_of(notebook: NotebookNode) -> list[Exercise]:
    """The notebook's exercises in order.

    Raises:
        CourseError: a task without its check or the other way round, or one in another form than all others.
    """
    found, cells = [], notebook.cells
    checks = [place for place, cell in enumerate(cells) if CHECK in tags_of(cell)]
    tasks = [place for place, cell in enumerate(cells) if TASK in tags_of(cell)]
    if [place + 1 for place in tasks] != checks:
        raise CourseError(f"cells tagged '{TASK}' stand at {tasks} and cells tagged '{CHECK}' at {checks}: each task "
                          "needs its check right after it")
    for task, check in zip(tasks, checks, strict=True):
        heading, solution = _HEADING.search(cells[task].source), _FOLDED.search(cells[task].source)
        written = _CHECK.fullmatch(cells[check].source)
        if not (heading and solution and written):
            parts = {"a heading '**1. Title** (easy, 5 minutes)'": heading, "a folded solution": solution,
                     "a check 'NAME = None  # your ... here', 'if NAME is not None:'": written}
            missing = next(part for part, there in parts.items() if not there)
            raise CourseError(f"the exercise in cell {task} lacks {missing}")
        found.append(Exercise(
            int(heading[1]), heading[2], heading[3], task, check, written["name"], written["stub"],
            textwrap.dedent(written["body"]), solution[1].rstrip("\n")))
    return found


def without_solutions(text: str) -> str:
    """A task's Markdown without its folded solution; the hint stays."""
    return _FOLDED.sub("", text)
