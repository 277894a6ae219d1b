"""Editions: students get no answer and pass no check; teachers get what passes all and what nbgrader takes."""

from __future__ import annotations

import re

import nbformat
import pytest
from course import WRONG

from fmn_nb.course import editions
from fmn_nb.course.editions import MARK, autograder, solution, student, write_editions
from fmn_nb.course.exercises import CHECK, TASK, exercises_of, tags_of
from fmn_nb.course.lessons import CourseError, lessons_of

NUMBERS = [lesson.number for lesson in lessons_of()]
each = pytest.mark.parametrize("number", NUMBERS)


def lesson_of(number: str):
    [lesson] = lessons_of([number])
    return lesson


def graded(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]


@each
def test_each_exercise_is_tagged_and_whole(number):
    notebook = lesson_of(number).read()
    found = exercises_of(notebook)
    assert [one.number for one in found] == list(range(1, len(found) + 1)) and found
    folded = [place for place, cell in enumerate(notebook.cells) if "<summary>Solution" in cell.source]
    assert folded == [one.task for one in found], f"tag them '{TASK}', and the checks after them '{CHECK}'"


@each
def test_the_student_edition_has_no_solutions_and_no_outputs(number):
    lesson = lesson_of(number)
    edition, text = student(lesson), nbformat.writes(student(lesson))
    assert "<summary>Solution" not in text and "<summary>Hint" in text
    code = [cell for cell in edition.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for one in exercises_of(lesson.read()):
        assert not [cell for cell in edition.cells if one.solution in cell.source]


@each
def test_the_student_edition_fails_every_graded_check_and_only_for_want_of_an_answer(number):
    edition = student(lesson_of(number))
    checks = graded(edition)
    assert len(checks) == len(exercises_of(lesson_of(number).read()))
    for check in checks:
        stub = edition.cells[edition.cells.index(check) - 1]
        names: dict = {}
        exec(stub.source, names)  # the line as students get it
        with pytest.raises(AssertionError, match="has no answer yet"):
            exec(check.source, names)


@each
def test_solutions_stand_where_answers_go_and_two_wrong_ones_are_known_for_each(number):
    """`tests/notebooks/test_other_runs.py` executes them: solutions pass, wrong answers don't."""
    lesson = lesson_of(number)
    edition = solution(lesson)
    for one, check in zip(exercises_of(lesson.read()), graded(edition), strict=True):
        assert edition.cells[edition.cells.index(check) - 1].source == one.solution
        assert re.search(rf"(?m)^\s*(?:def )?{one.name}\b", one.solution), "a solution assigns what is asked for"
        assert len(set(WRONG[one.name])) >= 2, f"{one.name}: two plausible wrong answers, please"


@each
def test_the_autograder_edition_marks_its_solutions_and_names_its_cells(number):
    edition = autograder(lesson_of(number))
    nbformat.validate(edition)
    ours = [cell.metadata["nbgrader"] for cell in edition.cells if "nbgrader" in cell.metadata]
    assert len({one["grade_id"] for one in ours}) == len(ours) and len({cell.id for cell in edition.cells}) == len(
        edition.cells)
    for one in ours:
        assert one["schema_version"] == 3 and one["grade"] != one["solution"] and one["locked"] == one["grade"]
        assert ("points" in one) == one["grade"]
    assert nbformat.writes(edition).count("### BEGIN SOLUTION") == len(ours) / 2


def test_an_edition_goes_into_a_folder_of_its_own_and_is_written_again(tmp_path):
    write_editions(tmp_path / "out", ["student", "autograder"], ["08"])
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {"student/08_other_ways_to_forget.ipynb", "student/batches.md", "autograder/nbgrader_config.py",
            "autograder/source/08_other_ways_to_forget/08_other_ways_to_forget.ipynb", MARK} <= names
    assert "](../" not in (tmp_path / "out" / "student" / "batches.md").read_text(encoding="utf-8")
    source = nbformat.read(tmp_path / "out/autograder/source/08_other_ways_to_forget/08_other_ways_to_forget.ipynb", 4)
    assert "](../00_start_here/00_start_here.ipynb" in source.cells[0].source
    write_editions(tmp_path / "out", ["student"], ["08"])


@pytest.mark.parametrize("which, numbers, said", [
    (["teacher"], None, "no edition is called 'teacher'; there are student"), (None, ["77"], "the number 77")])
def test_a_wrong_request_is_refused_before_anything_is_written(which, numbers, said, tmp_path):
    with pytest.raises(CourseError, match=said):
        write_editions(tmp_path / "out", which, numbers)
    assert not (tmp_path / "out").exists()


def test_an_edition_that_was_cut_short_can_be_made_again(tmp_path, monkeypatch):
    def cut_short(*_):
        raise CourseError("slides need reveal.js")

    with monkeypatch.context() as lacking:
        lacking.setitem(editions.EDITIONS, "slides", cut_short)
        with pytest.raises(CourseError, match="reveal.js"):
            write_editions(tmp_path / "out", ["student", "slides"], ["00"])
    assert (write_editions(tmp_path / "out", ["student"], ["00"]) / MARK).is_file()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CourseError, match="not empty"):
        write_editions(tmp_path, ["student"], ["00"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_task_without_its_check_is_told():
    notebook = lesson_of("00").read()
    check = next(cell for cell in notebook.cells if CHECK in tags_of(cell))
    check.metadata["tags"] = []
    with pytest.raises(CourseError, match="needs its check right after it"):
        exercises_of(notebook)
    check.metadata["tags"] = [CHECK]
    check.source = check.source.replace("is not None", "is not False")
    with pytest.raises(CourseError, match="lacks a check"):
        exercises_of(notebook)


@pytest.mark.slow
def test_nbgrader_takes_the_autograder_edition(tmp_path, monkeypatch):
    """It makes the students' version of notebook 07, which scores nothing, and the solved one scores every point."""
    pytest.importorskip("nbgrader", reason="pip install nbgrader")
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    write_editions(tmp_path / "out", ["autograder", "solution"], ["07"])
    course, name = tmp_path / "out" / "autograder", "07_a_sweep"
    monkeypatch.chdir(course)
    names: dict = {"get_config": Config}
    exec((course / "nbgrader_config.py").read_text(encoding="utf-8") + "\nsettings = c", names)
    settings: Config = names["settings"]
    settings.CourseDirectory.root = str(course)
    settings.CourseDirectory.db_url = f"sqlite:///{course / 'gradebook.db'}"
    settings.ExecutePreprocessor.kernel_name = "python3"
    api = NbGraderAPI(config=settings)
    made = api.generate_assignment(name)
    assert made["success"], made
    release = course / "release" / name / f"{name}.ipynb"
    assert "BEGIN SOLUTION" not in release.read_text() and "# your answer here" in release.read_text()
    for who, source in (("nobody", release), ("everybody", tmp_path / "out" / "solution" / f"{name}.ipynb")):
        place = course / "submitted" / who / name
        place.mkdir(parents=True)
        (place / f"{name}.ipynb").write_bytes(source.read_bytes())
        graded_now = api.autograde(name, who)
        assert graded_now["success"], graded_now
    with Gradebook(settings.CourseDirectory.db_url) as book:
        scores = {who: book.find_submission(name, who) for who in ("nobody", "everybody")}
        assert scores["nobody"].score == 0 and scores["everybody"].score == scores["everybody"].max_score > 0
