"""A notebook's parameters: what its cell tagged `parameters` declares, and whether a value fits.

A parameter is one line of that cell: a literal, typed and commented. The comment may end with the allowed range or
choices, which readers, papermill's help and this module all understand:

    steps: int = 35                 # fine-tuning steps [1..100000]
    learning_rate: float = 2e-6     # AdamW's learning rate [0..1]
    kind: str = "object"            # what the concept is {object|style|identity}
    references: str = ""            # folder of reference images

Papermill itself only warns about unknown names and turns tuples into strings, so nothing reaches it unchecked. Nothing
here needs torch, so a wrong value is answered at once.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from reprlib import repr as shortened  # no message repeats a value of a thousand letters
from typing import Any

from fmn_nb.concepts.concept import KINDS
from fmn_nb.files import read_json
from fmn_nb.forgetting.settings import PRESETS

TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}
_RANGE = re.compile(r"\[\s*([^\[\]]+?)\s*\.\.\s*([^\[\]]*?)\s*\]\s*$")
_CHOICES = re.compile(r"\{([^{}]+)\}\s*$")
_OPTIONAL = re.compile(r"Optional\[(.+)\]$")
#: limits of the parameters that notebooks share, for cells that don't state them
SHARED_LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "steps": (0, 1_000_000),
    "learning_rate": (0, 1),
}
SHARED_CHOICES: dict[str, tuple[str, ...]] = {"kind": KINDS, "preset": tuple(PRESETS)}


class ParameterError(ValueError):
    """A parameter that a notebook does not have, or a value it cannot take."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter; `limits` are inclusive, and `choices` are empty if any value is allowed."""

    name: str
    type: str
    default: Any
    help: str = ""
    optional: bool = False
    limits: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()

    @property
    def is_path(self) -> bool:
        """Whether the comment says that the text names something in the file system."""
        return self.type == "str" and re.search(r"\b(folder|file|path)\b", self.help) is not None

    def describe(self) -> str:
        """One line for error messages: name, type, default, help."""
        return f"{self.name}: {self.type} = {self.default!r}" + (f"  # {self.help}" if self.help else "")

    def check(self, value: Any) -> Any:
        """Return `value` if this parameter can take it, else raise ParameterError.

        Only the exact JSON types pass: no tuple, numpy scalar, path or set, no bool for an int. A whole number
        passes for a float and becomes one.
        """
        if value is None and self.optional:
            return None
        if type(value) not in TYPES[self.type]:
            quotes = "; in a YAML file, put it in quotes" if self.type == "str" and value is not None else ""
            raise ParameterError(
                f"{self.name} must be {self._wanted()}, not the {_kind_of(value)} {shortened(value)}{quotes}")
        if not _is_plain(value):
            raise ParameterError(f"{self.name} must hold plain JSON values (finite numbers, text, lists): "
                                 f"{shortened(value)}")
        if self.choices and value not in self.choices:
            raise ParameterError(f"{self.name} cannot be {shortened(value)}; it is one of: {', '.join(self.choices)}")
        if self.limits and not self.limits[0] <= value <= self.limits[1]:
            low, high = (str(one) if isinstance(one, int) else f"{one:g}" for one in self.limits)
            raise ParameterError(f"{self.name} must lie from {low} to {high}, not {shortened(value)}")
        return float(value) if self.type == "float" else value

    def parse(self, text: str) -> Any:
        """The value that `text` (from a command line) means for this parameter's type, checked."""
        if self.optional and text.strip().lower() == "none":
            return None
        if self.type == "str":
            return self.check(text)
        if self.type == "bool":
            text = text.strip().capitalize()
        try:
            return self.check(ast.literal_eval(text.strip()))
        except (ValueError, SyntaxError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError(f"{self.name} must be {self._wanted()}, not {shortened(text)}") from None

    def _wanted(self) -> str:
        article = "an" if self.type == "int" else "a"
        return f"{article} {self.type}" + (" or None" if self.optional else "")


#: what identifies every run; notebooks get those that they declare
SETTINGS: dict[str, Parameter] = {
    "model": Parameter("model", "str", "emoji"),
    "concept": Parameter("concept", "str", "cat"),
    "kind": Parameter("kind", "str", None, optional=True, choices=KINDS),
    "preset": Parameter("preset", "str", "balanced"),
    "seed": Parameter("seed", "int", 0, limits=(0, 2**63 - 1)),
}


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """Name -> parameter, in the order of the notebook's cell tagged `parameters`.

    Raises ParameterError if the file isn't an executable notebook, or if a line there isn't a typed literal, since its
    values could not be checked.
    """
    import nbformat
    from papermill import inspect_notebook

    try:
        nbformat.validate(nbformat.read(notebook, as_version=4))
        inspected = inspect_notebook(literal(notebook))
    except Exception as error:  # noqa: BLE001  nbformat, jsonschema and papermill each have several for a broken file
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ParameterError(f"{notebook} is not an executable notebook ({cause[:200]}); open it in "
                             "JupyterLab, choose the Python kernel and save it") from error
    overlooked = [name for name in _assigned(notebook) if name not in inspected]
    if overlooked:  # papermill skips what it cannot parse
        raise ParameterError(
            f"{notebook.name}: papermill cannot read the parameter '{overlooked[0]}'; write it on one line, as in "
            "'steps: int = 35  # fine-tuning steps', with no second '=' in the comment"
        )
    return {name: _declared(notebook.name, raw) for name, raw in inspected.items()}


def literal(path: Path) -> str:
    """The path as papermill takes it, which would fill in parameters for what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _assigned(notebook: Path) -> list[str]:
    """The names that the cell tagged `parameters` assigns, as Python itself reads it."""
    cells = [cell for cell in read_json(notebook)["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    if not cells:
        return []
    try:
        tree = ast.parse("".join(cells[0]["source"]))
    except SyntaxError as error:
        raise ParameterError(f"{notebook.name}: the parameters cell is not valid Python: {error}") from None
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _declared(notebook: str, raw: Mapping[str, str]) -> Parameter:
    name, annotation, text = raw["name"], raw["inferred_type_name"], raw["help"]
    optional = _OPTIONAL.match(annotation)
    base = re.sub(r"\[.*", "", optional[1] if optional else annotation).strip()
    if base not in TYPES:
        raise ParameterError(
            f"{notebook}: parameter '{name}' has the type {annotation}; write one of {', '.join(TYPES)}, "
            'or "Optional[...]" of one'
        )
    try:
        default = ast.literal_eval(raw["default"])
    except (ValueError, SyntaxError):
        raise ParameterError(f"{notebook}: the default of '{name}' is not a literal: {raw['default']}") from None
    limits, choices = _limits(notebook, name, text), _CHOICES.search(text)
    parameter = Parameter(
        name, base, default, text, optional is not None, limits or SHARED_LIMITS.get(name),
        tuple(choice.strip() for choice in choices[1].split("|")) if choices else SHARED_CHOICES.get(name, ()),
    )
    try:
        parameter.check(default)
    except ParameterError as error:
        raise ParameterError(f"{notebook}: the default of a parameter breaks its own rule: {error}") from None
    return parameter


def _limits(notebook: str, name: str, text: str) -> tuple[float, float] | None:
    found = _RANGE.search(text)
    if not found:
        return None
    try:
        low, high = (int(one) if re.fullmatch(r"-?\d+", one) else float(one) for one in (found[1], found[2] or "inf"))
        return low, high
    except ValueError:
        raise ParameterError(f"{notebook}: '{name}' has a range that isn't a pair of numbers: {found[0]}") from None


def check_parameters(declared: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check every value against its declaration; the first fault is a ParameterError that lists what there is."""
    unknown = [name for name in values if name not in declared]
    if unknown:
        known = "\n  ".join(parameter.describe() for parameter in declared.values()) or "(none)"
        hint = did_you_mean(unknown[0], [*SETTINGS, *declared])
        raise ParameterError(f"no chosen notebook has a parameter '{unknown[0]}'{hint}; there are:\n  {known}")
    return {name: declared[name].check(value) for name, value in values.items()}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint in brackets, after a space, at the name that `word` resembles; empty if it resembles none."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _kind_of(value: Any) -> str:
    module = type(value).__module__
    return type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"


def _is_plain(value: Any) -> bool:
    if type(value) is float:
        return isfinite(value)
    if type(value) is list:
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (str, int, bool)
