"""pyproject.toml, constraints.txt and environment.yml say the same; the wheel holds data and notebooks."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fmn_nb import __version__
from fmn_nb.files import CHECKSUMS, read_json
from fmn_nb.runs import check as check

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]
TESTED = check.tested_versions(ROOT / "constraints.txt")


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement):
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    assert name in TESTED, f"constraints.txt lacks {name}"
    assert requirement.specifier.contains(TESTED[name]), f"{name} {TESTED[name]} is outside {requirement.specifier}"


def test_constraints_are_exact_sorted_and_said_once():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.split("==")[0]) and len(TESTED) == len(lines)


def test_the_environment_takes_everything_but_python_through_the_same_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"][0] == "conda-forge"
    conda = [one for one in environment["dependencies"] if isinstance(one, str)]
    (pip,) = [one["pip"] for one in environment["dependencies"] if isinstance(one, dict)]
    assert [re.split(r"[=<>]", one)[0] for one in conda] == ["python", "pip"]
    python = conda[0].partition("=")[2]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert pip[0] == "-c constraints.txt"
    (install,) = pip[1:]
    extras = re.fullmatch(r"\.\[([\w,]+)\]", install)[1].split(",")
    assert set(extras) <= set(EXTRAS) and "lab" in extras


def test_the_version_is_said_once_everywhere():
    assert PROJECT["version"] == __version__


def test_the_command_and_the_licence_are_declared():
    assert PROJECT["scripts"] == {"fmn-nb": "fmn_nb.cli:main"}
    assert PROJECT["license"] == "MIT" and "The Forget-Me-Not Notebooks authors" in (ROOT / "LICENSE").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from this checkout with the build backend itself (no network)."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build as b; print(b.build_wheel({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / result.stdout.split()[-1]


def test_the_wheel_holds_data_notebooks_and_templates(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("data", "notebooks"):
        own = {path.relative_to(ROOT).as_posix() for path in _committed(ROOT / folder)}
        assert own and {f"fmn_nb/_bundled/{name}" for name in own} <= names
    assert {"fmn_nb/runs/templates/run.html.j2", "fmn_nb/_bundled/constraints.txt"} <= names
    assert {f"fmn_nb/course/demo_page/{name}" for name in ("index.html", "demo.css", "page.js", "model.js")} <= names
    assert not [name for name in names if name.startswith(("tests/", "runs/")) or "/." in name]


def test_the_wheel_works_from_any_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from fmn_nb import files\n"
        "from fmn_nb.runs import plan, report\n"
        "assert files.data_dir().match('fmn_nb/_bundled/data'), files.data_dir()\n"
        "print(*plan.course_notebooks(), sep=',')"
    )
    # -S, -E: neither this checkout nor an installed package may answer in the wheel's place
    site = [one for one in sys.path if one.endswith("site-packages")]
    lines = f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), *site]!r}\n{code}"
    result = subprocess.run([sys.executable, "-S", "-E", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    numbers = [path.name[:2] for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    assert result.stdout.strip() == ",".join(numbers)


def _install(what: Path, target: Path) -> Path:
    """Install a wheel or a folder, not editable, without its dependencies, which are here; return where it stands."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    result = subprocess.run([*pip, "--target", target, what], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@pytest.mark.slow
def test_an_installed_wheel_and_an_installed_folder_hold_the_same(wheel, tmp_path):
    installed = (_install(wheel, tmp_path / "wheel"), _install(ROOT, tmp_path / "folder"))
    one, other = ({path.relative_to(where).as_posix() for path in (where / "fmn_nb").rglob("*") if path.is_file()}
                  for where in installed)
    assert one == other and "fmn_nb/_bundled/notebooks/03_forget_me_not.ipynb" in one


@pytest.mark.slow
def test_an_installed_wheel_checks_and_runs_the_course_from_an_empty_folder(wheel, tmp_path):
    site, empty = _install(wheel, tmp_path / "site"), tmp_path / "empty"
    empty.mkdir()
    # Before what an editable install adds, in this command's process and in its kernels'.
    environment = os.environ | {"PYTHONPATH": str(site)}

    def command(*words: str) -> str:
        result = subprocess.run([sys.executable, *words], cwd=empty, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{words}\n{result.stdout}{result.stderr}"
        return result.stdout

    where = str(site / "fmn_nb")
    assert command("-c", "import fmn_nb; print(fmn_nb.__file__)").startswith(where)
    assert f"it imports {where}" in command("-m", "fmn_nb.cli", "check")
    command("-m", "fmn_nb.cli", "run", "--notebooks", "00", "--out", "first")
    command("-m", "fmn_nb.cli", "run", "--notebooks", "03", "-p", "steps=2", "--out", "second")
    for name in ("first/00_start_here.ipynb", "first/report.html", "second/03_forget_me_not.ipynb",
                 "second/report.html", "second/metrics.json", "second/patch/fmn.json",
                 "second/images/after_forgetting.png"):
        assert (empty / name).stat().st_size > 0
    assert read_json(empty / "second" / "metrics.json")["forgetting"]["steps"] == 2


def _committed(folder: Path) -> list[Path]:
    """The folder's files, without caches and hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file())
    hidden = (".", "runs", "__pycache__")
    return [path for path in files if not any(part.startswith(hidden) for part in path.relative_to(ROOT).parts)]


def test_the_committed_data_are_those_of_the_checksums(monkeypatch):
    monkeypatch.setattr(check, "data_dir", lambda: ROOT / "data")
    listed = set(read_json(ROOT / "data" / CHECKSUMS))
    there = {path.relative_to(ROOT / "data").as_posix() for path in _committed(ROOT / "data") if path.suffix != ".md"}
    there = {name for name in there if not name.startswith("results/")}  # which `fmn-nb benchmark` writes anew
    assert there - {CHECKSUMS} == listed, "write them anew: fmn_nb.files.write_checksums(data_dir())"
    assert check.data().state == "ok"


def test_the_code_keeps_the_style():
    ruff = [sys.executable, "-m", "ruff", "check", "--quiet", "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name, extra, program", [("test", ".[test]", "pytest"), ("run", ".[lab]", "fmn-nb run")])
def test_the_readme_holds_its_two_commands(name, extra, program):
    between = rf"<!-- {name} command -->\n```bash\n(.*?)```\n<!-- end -->"
    (block,) = re.findall(between, (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "-c constraints.txt" in block and extra in block and program in block
    tried = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"command=$(documented {name})" in tried, "what is told is tried"


def test_the_errors_that_are_explained_are_the_packages_own():
    table = (ROOT / "notebooks" / "errors.md").read_text(encoding="utf-8").split("| the error says |")[1]
    quoted = [message for line in table.splitlines() if line.startswith("| `")
              for message in re.findall("`([^`]+)`", line.split(" | ")[0])]
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "fmn_nb").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message that goes on in the next line
    assert len(quoted) > 5
    for message in quoted:
        if "torchvision" not in message:
            parts = [re.escape(part) for part in re.split(r"'cat'|'?\.\.\.'?", message) if part.strip()]
            assert re.search(".{1,80}".join(parts), source), f"no error of this package says: {message}"


def test_the_package_needs_no_posix():
    only_posix = re.compile(r"^(?:import|from) (?:resource|fcntl|pwd|grp)\b|os\.fork|[\"']/tmp\b|[\"']fork[\"']", re.M)
    assert only_posix.search("x = 1\nimport resource\n") and only_posix.search('open("/tmp/x")')
    modules = (ROOT / "fmn_nb").rglob("*.py")
    found = {path: only_posix.findall(path.read_text(encoding="utf-8")) for path in modules}
    assert len(found) > 50 and not {path: uses for path, uses in found.items() if uses}


def test_the_readme_says_what_the_tables_say():
    made = read_json(ROOT / "data" / "results" / "attacks" / "results.json")["oracle"]["summary"]
    rows = {(one["preset"], one["attack"]): one["success"] for one in made}
    learned = {preset: rows[preset, "concept inversion"] for preset in ("uce", "balanced", "robust")}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert ("in four of five images after `uce`, in a third after `balanced`, and in 3 of 120 images after `robust`"
            in text)
    assert round(5 * learned["uce"]) == 4 and round(3 * learned["balanced"]) == 1
    assert round(120 * learned["robust"], 3) == 3
    back = [success for (_, attack), success in rows.items() if attack == "relearning"]
    assert "in about half of the images or more, whichever of ten presets" in text
    assert len(back) == 10 and min(back) > 0.45


def test_the_readmes_example_uses_what_there_is():
    import ast
    import inspect

    import fmn_nb as fmn

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "fmn"]
    assert calls
    for call in calls:
        parameters = inspect.signature(getattr(fmn, call.func.attr)).parameters
        taken = {one.arg for one in call.keywords} - set(parameters)
        assert not taken or any(one.kind is one.VAR_KEYWORD for one in parameters.values()), call.func.attr
