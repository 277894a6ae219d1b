"""The course's notebooks: their structure, and that each was executed in order and is really compared by nbval.

Their execution itself is nbval's: `pytest` collects `notebooks/` beside `tests/` (see pyproject.toml).
"""

import ast
import importlib
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from fmn_nb.forgetting.settings import PRESETS
from fmn_nb.runs.parameters import read_parameters

NOTEBOOKS = Path(__file__).resolve().parent.parent.parent / "notebooks"
MOST_BYTES = 300_000
MOST_CELLS = 74
MEDIAN_LINES = 6
MOST_FOLDERS = 6  # of the package, that a reader meets in one notebook
CHECKED = "nbval-check-output"
#: a path of one machine, a time of one run, a progress bar
OF_ONE_MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|Users|mnt)/|[A-Z]:\\\\|\d(?:it/s|s/it)")

ALL = sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
COURSE = [path for path in ALL if path.parent == NOTEBOOKS and re.match(r"\d\d_", path.name)]
EXECUTED = [path for path in ALL if "exercises" not in path.relative_to(NOTEBOOKS).parts]
every_notebook = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
every_course_notebook = pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
every_executed_notebook = pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """Every text that the cell's outputs hold."""
    found = []
    for output in cell.get("outputs", []):
        found.append(output.get("text", ""))
        found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return ["".join(text) for text in found if text]


def test_the_course_is_there_and_numbered_without_gaps_or_doubles():
    numbers = [path.name[:2] for path in COURSE]
    assert len(numbers) > 10 and numbers == [f"{number:02}" for number in range(len(numbers))]


@every_notebook
def test_it_is_valid_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= MOST_BYTES and len(notebook.cells) <= MOST_CELLS
    assert "widgets" not in notebook.metadata, "widget state is committed"


@every_course_notebook
def test_its_cells_are_short(path):
    lines = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert statistics.median(lines) <= MEDIAN_LINES


@every_course_notebook
def test_one_tagged_cell_holds_literals_typed_and_commented(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name), ast.unparse(node)
    declared = read_parameters(path)  # raises where a value is no literal or breaks its own limits
    assert declared and all(parameter.help for parameter in declared.values())
    presets = declared["preset"].choices if "preset" in declared else ()
    assert set(presets) <= set(PRESETS), "the choices in the comment are no longer the presets"


@every_executed_notebook
def test_it_was_executed_in_order_without_error(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@every_executed_notebook
def test_its_outputs_are_of_no_particular_machine(path):
    found = {match for cell in code_cells(path) for text in texts(cell) for match in OF_ONE_MACHINE.findall(text)}
    assert not found
    assert not [cell for cell in code_cells(path) if OF_ONE_MACHINE.search(cell.source)]


@every_executed_notebook
def test_nbval_really_compares_a_cell(path):
    compared = [cell for cell in code_cells(path) if CHECKED in tags(cell) and cell.execution_count and texts(cell)]
    assert compared, f"no executed cell with text output is tagged {CHECKED}"


@every_course_notebook
def test_it_opens_with_what_it_is_about_and_ends_in_a_check(path):
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    opening = " ".join(cell.source.lower() for cell in notebook.cells[:3] if cell.cell_type == "markdown")
    assert all(words in opening for words in ("you will do", "you will learn", "you need", "minutes"))
    assert re.search(r"^\s*assert ", code_cells(path)[-1].source, re.MULTILINE), "the last cell asserts nothing"


@every_course_notebook
def test_it_leaves_paths_to_the_package(path):
    """`../data` and the like break as soon as the working directory is another one."""
    assert not [cell.source for cell in code_cells(path) if re.search(r"""["']\.\.?/|os\.getcwd|chdir""", cell.source)]


EXERCISE = re.compile(r"^\*\*\d\. .*?\((?:easy|medium|hard), (\d+) minutes", re.MULTILINE)


@every_course_notebook
def test_it_counts_its_exercises_and_says_their_minutes(path):
    notebook = nbformat.read(path, as_version=4)
    minutes = [int(found) for cell in notebook.cells if cell.cell_type == "markdown"
               for found in EXERCISE.findall(cell.source)]
    assert f" to read, {sum(minutes)} for the exercises, " in notebook.cells[0].source.replace("\n", " ")
    code = "\n".join(cell.source for cell in code_cells(path))
    assert re.findall(r"^    solved\.add\((\d+)\)$", code, re.M) == [str(n + 1) for n in range(len(minutes))]
    assert f"{{len(solved)}} of {len(minutes)} exercises done" in code


@every_course_notebook
def test_links_lead_through_the_course(path):
    place, names = COURSE.index(path), [one.name for one in COURSE]
    wanted = {names[n] for n in (place - 1, place + 1) if 0 <= n < len(names)} | ({names[0]} if place else set())
    markdown = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    for cell in (markdown[0], markdown[-1]):
        assert wanted <= set(re.findall(r"\]\((\d\d_\w+\.ipynb)", cell))
    assert not re.search(r"arXiv\s\d{4}\.\d{5}(?!\])", "\n".join(markdown)), "a paper without a link"
    if place == 0:
        assert set(names[1:]) <= {found for cell in markdown[1:-1] for found in re.findall(r"\d\d_\w+\.ipynb", cell)}


def imported(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a notebook imports from the package."""
    nodes = [node for cell in code_cells(path) for node in ast.walk(ast.parse(cell.source))]
    return [(node.module, name.name) for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names
            if (node.module or "").split(".")[0] == "fmn_nb"]


@every_course_notebook
def test_it_imports_from_faces_alone_and_from_few(path):
    """What a reader meets has a place in the table of contents: `fmn_nb`, or what one of its folders offers."""
    folders = {module for module, _ in imported(path) if module != "fmn_nb"}
    assert all(re.fullmatch(r"fmn_nb\.\w+", module) for module in folders)
    assert not [module for module in folders if not hasattr(importlib.import_module(module), "__path__")]
    assert not [(module, name) for module, name in imported(path) if name not in dir(importlib.import_module(module))]
    assert len(folders) <= MOST_FOLDERS


def test_the_rules_notice_what_they_forbid():
    for text in ("/root/x", "saved to /tmp/a", "3.2it/s", "2.0s/it", "C:\\\\Users"):
        assert OF_ONE_MACHINE.search(text), text
    for text in ("data/emoji", "runs/cat/patch", "https://x.org/home/page", "16/64"):
        assert not OF_ONE_MACHINE.search(text), text
