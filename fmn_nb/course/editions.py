"""Editions of the notebooks: for students, with solutions, for nbgrader, and as slides.

    OUT/student/     no solutions, no outputs; each exercise has a cell for the answer and a locked cell that grades it
    OUT/solution/    the same with the solutions filled in, and the outputs up to the exercises
    OUT/autograder/  source/ASSIGNMENT/ and nbgrader_config.py, as `nbgrader generate_assignment` takes them
    OUT/slides/      one page per notebook
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.course.exercises import Exercise, exercises_of, without_solutions
from fmn_nb.course.lessons import ELSEWHERE, LINK, CourseError, Lesson, begun_folder, lessons_of
from fmn_nb.files import write_json, write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

MARK = "editions.json"  # names what was written, and says that this command wrote it
ANSWER_HERE = "# your answer here"  # what nbgrader leaves of a solution
_CONFIG = f'''"""nbgrader's settings for this course: nbgrader generate_assignment NAME, nbgrader autograde NAME."""

c = get_config()  # noqa: F821  nbgrader defines it
c.CourseDirectory.course_id = "forget-me-not"
c.ClearSolutions.code_stub = {{"python": "{ANSWER_HERE}"}}
c.ExecutePreprocessor.timeout = 1800  # a fine-tune in one cell
'''


def write_editions(out: Path, which: Sequence[str] | None = None, numbers: list[str] | None = None,
                   log: Callable[[str], object] = lambda line: None) -> Path:
    """Write editions of the course's notebooks into `out` and return it.

    Args:
        which: names in `EDITIONS`; None for all.
        numbers: numbers of the notebooks, "03"; None for all.

    Raises:
        CourseError: an unknown edition or number, a folder that holds something else, or an incomplete exercise.
    """
    which = list(EDITIONS) if which is None else list(which)
    unknown = [name for name in which if name not in EDITIONS]
    if unknown or not which:
        raise CourseError(f"no edition is called '{''.join(unknown[:1])}'; there are {', '.join(EDITIONS)}")
    chosen = lessons_of(numbers)
    for lesson in chosen:
        _checked(lesson)  # before anything is written
    out = begun_folder(out, MARK)
    for name in which:
        EDITIONS[name](out / name, chosen)
        log(f"{name}: {len(chosen)} notebooks in {out / name}")
    write_json(out / MARK, {"editions": which, "notebooks": [lesson.name for lesson in chosen]})
    return out


def _checked(lesson: Lesson) -> None:
    try:
        exercises_of(lesson.read())
    except CourseError as error:
        raise CourseError(f"{lesson.path.name}: {error}") from None


def student(lesson: Lesson) -> NotebookNode:
    """The notebook without solutions and outputs; a cell of its own grades each exercise."""
    notebook = _divided(lesson, lambda exercise: exercise.stub, solved=False)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def solution(lesson: Lesson) -> NotebookNode:
    """The notebook with its solutions filled in, without outputs from the first exercise on, since nothing ran."""
    notebook = _divided(lesson, lambda exercise: exercise.solution, solved=True)
    first = next((place for place, cell in enumerate(notebook.cells) if "nbgrader" in cell.metadata), None)
    for cell in notebook.cells[first:] if first is not None else ():
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def autograder(lesson: Lesson) -> NotebookNode:
    """The teacher's version for nbgrader, which removes the marked solutions itself."""

    def marked(exercise: Exercise) -> str:
        return f"{exercise.stub}\n### BEGIN SOLUTION\n{exercise.solution}\n### END SOLUTION"

    notebook = _divided(lesson, marked, solved=False)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _divided(lesson: Lesson, answer: Callable[[Exercise], str], solved: bool) -> NotebookNode:
    """The notebook with each check divided into the answer's cell, which holds `answer(exercise)`, and the grading one.

    Both carry nbgrader's metadata, so that it can collect and grade either edition.
    """
    from nbformat.v4 import new_code_cell

    notebook = lesson.read()
    for exercise in reversed(exercises_of(notebook)):  # from the end: places before it stay right
        task, check = notebook.cells[exercise.task], notebook.cells[exercise.check]
        if not solved:
            task.source = without_solutions(task.source)
        name = f"{lesson.number}-exercise-{exercise.number}"
        own = new_code_cell(answer(exercise), id=f"{name}-answer", metadata=_graded_by(f"{name}-answer"))
        graded = _graded_by(f"{name}-check", exercise.points) | {"tags": list(check.metadata.tags)}
        grading = new_code_cell(exercise.graded, id=f"{name}-check", metadata=graded)
        notebook.cells[exercise.check:exercise.check + 1] = [own, grading]
    return notebook


def _graded_by(name: str, points: int | None = None) -> dict[str, Any]:
    """nbgrader's metadata (schema 3) of a cell for an answer, or with `points` of a locked cell that tests it."""
    known = {"schema_version": 3, "grade_id": name, "cell_type": "code", "task": False, "solution": points is None,
             "grade": points is not None, "locked": points is not None}
    return {"nbgrader": known | ({} if points is None else {"points": points})}


def _write_flat(out: Path, chosen: list[Lesson], make: Callable[[Lesson], NotebookNode]) -> None:
    """Write each notebook into `out` itself, with the pages of text that it links to."""
    for lesson in chosen:
        _write(make(lesson), out / lesson.path.name)
        for linked in _pages_beside(lesson):
            write_text(out / linked.name, _here_alone(linked.read_text(encoding="utf-8"), linked.parent))


def _write_student(out: Path, chosen: list[Lesson]) -> None:
    _write_flat(out, chosen, student)


def _write_solution(out: Path, chosen: list[Lesson]) -> None:
    _write_flat(out, chosen, solution)


def _write_autograder(out: Path, chosen: list[Lesson]) -> None:
    """Write an assignment for each notebook, in nbgrader's layout of folders."""
    for lesson in chosen:
        notebook, folder = autograder(lesson), out / "source" / lesson.name
        for cell in notebook.cells:
            if cell.cell_type == "markdown":  # the other notebooks stand in folders of their own
                cell.source = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](../\1/\1.ipynb", cell.source)
        _write(notebook, folder / lesson.path.name)
        for linked in _pages_beside(lesson):
            write_text(folder / linked.name, _here_alone(linked.read_text(encoding="utf-8"), linked.parent))
    write_text(out / "nbgrader_config.py", _CONFIG)


def _write_slides(out: Path, chosen: list[Lesson]) -> None:
    from fmn_nb.course.slides import write_slides

    write_slides(out, chosen)


def _pages_beside(lesson: Lesson) -> list[Path]:
    """The Markdown files in the notebooks' folder that a notebook links to."""
    targets = {target.partition("#")[0] for cell in lesson.read().cells if cell.cell_type == "markdown"
               for _, _, target in LINK.findall(cell.source) if not ELSEWHERE.match(target)}
    return sorted(lesson.path.parent / target for target in targets if target.endswith(".md"))


def _here_alone(text: str, folder: Path) -> str:
    """A page's text without links and pictures that would lead out of its folder; their words stay."""
    def kept(found: re.Match[str]) -> str:
        outside = not ELSEWHERE.match(found[3]) and found[3].startswith("../")
        return found[2] if outside else found[0]

    return LINK.sub(kept, text)


def _write(notebook: NotebookNode, path: Path) -> None:
    import nbformat

    nbformat.validate(notebook)
    write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


#: name -> what writes it
EDITIONS: dict[str, Callable[[Path, list[Lesson]], None]] = {
    "student": _write_student, "solution": _write_solution, "autograder": _write_autograder, "slides": _write_slides,
}
