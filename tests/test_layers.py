"""The package's shape: imports only go downwards, modules stay small, importing it costs nothing."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import fmn_nb

PACKAGE = Path(fmn_nb.__file__).parent
MOST_LINES = 340  # "about 300"
#: Lowest first; a module imports from its own layer or from lower ones. A new module gets its place here.
LAYERS = (
    ("files", "storage", "paths", "checksums", "image_change", "intervals", "generation", "digests", "prompt_tokens",
     "plots_figure", "plots_evaluation"),
    ("emoji", "emoji.*", "results", "parameters", "probes", "sweep_reading"),
    ("models", "concepts"),
    ("attention", "attention_*", "grounding", "denoising", "references", "references_cache"),
    ("inversion", "inversion_*"),
    ("patches", "patch_*"),
    ("forgetting", "forgetting_*"),
    ("protocol", "worlds", "image_quality", "evaluation", "evaluation_*", "m_score", "attacks",
     "attacks_*", "sequence"),
    ("plots", "plots_*"),
    ("widgets", "widgets_*"),
    ("emoji.card", "emoji.picture", "emoji.quality", "emoji.pretrain"),  # they use what the rest offers
    ("benchmark", "benchmark_*"),
    ("report", "report_*", "plans", "engine", "runs", "check", "sweeps", "sweep_*", "clusters"),
    ("cli",),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_bundled" not in path.parts}


def layer_of(module: str) -> int:
    """The place of a module's own name if it has one, else that of the pattern that fits it."""
    named = [place for place, layer in enumerate(LAYERS) if module in layer]
    fitting = [place for place, layer in enumerate(LAYERS) if any(fnmatch(module, pattern) for pattern in layer)]
    assert fitting, f"'{module}' has no layer: give it a place in LAYERS"
    return max(named or fitting)


def imported_by(path: Path) -> set[str]:
    """The package's own modules that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fmn_nb.") for alias in node.names if alias.name.startswith("fmn_nb.")}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fmn_nb":
            base = node.module.removeprefix("fmn_nb").removeprefix(".")
            inside = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {name if name in MODULES else base for name in inside}
    return found - {""}


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_a_module_imports_only_from_below(module):
    place = layer_of(module)
    above = [name for name in imported_by(MODULES[module]) if layer_of(name) > place]
    assert not above, f"{module} imports from above: {', '.join(above)}"


def test_no_module_imports_itself_through_others():
    graph = {name: imported_by(path) for name, path in MODULES.items()}
    free: set[str] = set()
    while ready := {name for name in graph if name not in free and graph[name] <= free | {name}}:
        free |= ready
    assert free == set(graph), f"a circle among: {', '.join(sorted(set(graph) - free))}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_one_idea_of_about_300_lines(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: split it into neighbours"


def test_importing_the_package_and_the_command_is_light():
    code = (
        "import sys, fmn_nb, fmn_nb.cli\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pandas', 'papermill'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there():
    for name in fmn_nb.__all__:
        assert getattr(fmn_nb, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'forgett'; it offers: .*forget"):
        _ = fmn_nb.forgett
