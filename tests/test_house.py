"""The package's shape: imports only go downwards, doors are short, the core knows no world, importing costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fmn_nb

ROOT = Path(__file__).resolve().parent.parent  # the checkout, wherever the package is installed
PACKAGE = ROOT / "fmn_nb"
TOP = {"__init__.py", "cli.py", "files.py", "stats.py", "inversion.py"}
MOST_PARAMETERS = 7
DOORS = {"forget", "evaluate", "record_attention", "invert"}  # public; what they take has a name each


def said_by(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_go_downwards_and_never_in_a_circle():
    result = subprocess.run(["lint-imports", "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_top_holds_only_what_has_no_room():
    assert {path.name for path in PACKAGE.glob("*.py")} == TOP
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    with open(ROOT / "pyproject.toml", encoding="utf-8") as file:
        contract = file.read().partition("[tool.importlinter]")[2]
    assert all(name in contract for name in folders), "a folder without a floor"


def test_functions_take_few_parameters():
    long = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in DOORS and not _given_from_outside(node):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [one.arg for one in arguments if one.arg not in ("self", "cls")]
                if len(names) > MOST_PARAMETERS:
                    long.append(f"{path.name}: {node.name} takes {len(names)}")
    assert not long, long


def _given_from_outside(function: ast.FunctionDef) -> bool:
    """Whether a library decides the signature: torch's attention function, a command's options."""
    return function.name == "_relay" or any("click" in ast.unparse(one) or "main.command" in ast.unparse(one)
                                            for one in function.decorator_list)


def test_importing_the_package_and_the_command_is_light():
    said_by("import sys, fmn_nb, fmn_nb.cli\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pandas', 'papermill', 'pydantic'}\n"
            "heavy &= {*sys.modules}\n"
            "assert not heavy, heavy")


def test_forgetting_and_evaluating_a_checkpoint_imports_no_world():
    said = said_by("""if True:
        import sys
        sys.path.insert(0, 'tests/support')
        from quick import quick
        from tiny import tiny_sd
        import fmn_nb as fmn
        pipe = tiny_sd()
        patch = quick(pipe, 'cat')
        report = fmn.evaluate(pipe, fmn.Concept('cat'), patch=patch, steps=1)
        assert report.after is not None and report.before.skipped
        print(*(name for name in sys.modules if name.startswith('fmn_nb.emoji')))
    """)
    assert said == ""


def test_every_public_name_is_there():
    for name in fmn_nb.__all__:
        assert getattr(fmn_nb, name) is not None
    with pytest.raises(AttributeError, match="forgett"):
        _ = fmn_nb.forgett


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_every_name_on_a_face_is_there(folder):
    face = getattr(fmn_nb, folder)
    assert face.__doc__ and all(getattr(face, name) is not None for name in face.__all__)
    modules = {path.stem for path in (PACKAGE / folder).glob("*.py")}
    assert not modules & set(face.__all__), "a function would hide the module of its name, or the module the function"


def test_completion_offers_the_public_names_alone():
    assert {"load", "forget", "Patch"} <= set(dir(fmn_nb)) and not {"plots", "logging", "models"} & set(dir(fmn_nb))
    assert fmn_nb.plots.short_name("mid_block.attn2") and set(dir(fmn_nb.plots)) == set(fmn_nb.plots.__all__)
