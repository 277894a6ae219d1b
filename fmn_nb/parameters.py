"""A notebook's parameters: read from its tagged cell, and values checked against them before anything starts.

A parameter is one line of the cell tagged `parameters`: a literal, typed and commented. The comment may end in
the allowed range or choices, which readers, papermill's help and this module all understand:

    steps: int = 35                 # fine-tuning steps [1..100000]
    learning_rate: float = 2e-6     # AdamW's learning rate [0..1]
    kind: str = "object"            # what the concept is {object|style|identity}
    references: str = ""            # folder of reference images

A text whose comment names a folder, file or path is made absolute, so that it means the same in every working
directory. Papermill itself only warns about unknown names and turns tuples into strings, so nothing reaches it
unchecked.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from fmn_nb.files import read_json

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
#: limits of the parameters that notebooks share, for cells that don't state their own
SHARED_LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "steps": (0, 1_000_000),
    "learning_rate": (0, 1),
}
SHARED_CHOICES: dict[str, tuple[str, ...]] = {"kind": ("object", "style", "identity")}


class ParameterError(ValueError):
    """A parameter that a notebook does not have, or a value it cannot take."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter; `limits` are inclusive, `choices` empty where any value goes."""

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
            raise ParameterError(f"{self.name} must be {self._wanted()}, not the {_kind_of(value)} {value!r}")
        if not _is_plain(value):
            raise ParameterError(f"{self.name} must hold plain JSON values (finite numbers, text, lists): {value!r}")
        if self.choices and value not in self.choices:
            raise ParameterError(f"{self.name} cannot be {value!r}; it is one of: {', '.join(self.choices)}")
        if self.limits and not self.limits[0] <= value <= self.limits[1]:
            raise ParameterError(f"{self.name} must lie from {self.limits[0]:g} to {self.limits[1]:g}, not {value!r}")
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
            raise ParameterError(f"{self.name} must be {self._wanted()}, not {text!r}") from None

    def _wanted(self) -> str:
        article = "an" if self.type == "int" else "a"
        return f"{article} {self.type}" + (" or None" if self.optional else "")


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """Name -> parameter, in the order of the notebook's cell tagged `parameters`.

    Raises ParameterError when a line there is no typed literal, since its values could not be checked.
    """
    from papermill import inspect_notebook

    inspected = inspect_notebook(notebook)
    overlooked = [name for name in _assigned(notebook) if name not in inspected]
    if overlooked:  # papermill passes over what it cannot parse
        raise ParameterError(
            f"{notebook.name}: papermill cannot read the parameter '{overlooked[0]}'; write it on one line, as in "
            "'steps: int = 35  # fine-tuning steps', with no second '=' in the comment"
        )
    return {name: _declared(notebook.name, raw) for name, raw in inspected.items()}


def _assigned(notebook: Path) -> list[str]:
    """The names that the cell tagged `parameters` assigns, as Python itself reads it."""
    cells = [cell for cell in read_json(notebook)["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    if not cells:
        return []
    try:
        tree = ast.parse("".join(cells[0]["source"]))
    except SyntaxError as error:
        raise ParameterError(f"{notebook.name}: the parameters cell is no Python: {error}") from None
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
        raise ParameterError(f"{notebook}: the default of '{name}' is no literal: {raw['default']}") from None
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
        return float(found[1]), float(found[2] or "inf")
    except ValueError:
        raise ParameterError(f"{notebook}: '{name}' has a range that is no pair of numbers: {found[0]}") from None


def check_parameters(declared: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check every value against its declaration; the first fault is a ParameterError that lists what there is."""
    unknown = [name for name in values if name not in declared]
    if unknown:
        known = "\n  ".join(parameter.describe() for parameter in declared.values()) or "(none)"
        raise ParameterError(f"no chosen notebook has a parameter '{unknown[0]}'; there are:\n  {known}")
    return {name: declared[name].check(value) for name, value in values.items()}


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
