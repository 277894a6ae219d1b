"""A run, checked before anything starts: which notebooks, with which parameters, in which folder.

A notebook's parameter is one line of its cell tagged `parameters`: a literal, typed and commented. The comment may end
with the allowed range or choices, which readers, papermill's help and this module all understand:

    steps: int = 35                 # fine-tuning steps [1..100000]
    learning_rate: float = 2e-6     # AdamW's learning rate [0..1]
    kind: str = "object"            # what the concept is {object|style|identity}
    references: str = ""            # folder of reference images

A text whose comment names a folder, file or path is made absolute, so that it means the same in every working
directory. Papermill itself only warns about unknown names and turns tuples into strings, so nothing reaches it
unchecked. Nothing here needs torch, so a wrong request is answered at once.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from pathlib import Path
from reprlib import repr as shortened  # no message repeats a value of a thousand letters
from typing import Any

from fmn_nb.concepts.concept import KINDS
from fmn_nb.concepts.world import vocabulary_of
from fmn_nb.files import model_print, notebooks_dir, read_json, sha256
from fmn_nb.forgetting.settings import PRESETS
from fmn_nb.models.names import UnknownModelError, bundled, check_on_hub, resolve
from fmn_nb.runs.folder import RunFolder, StateError

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


COURSE_RUN = ("01", "02", "03", "04")
_SDXL_PART = "conditioner.embedders.1."  # of a single file's weights: the second text encoder
_SDXL_CONFIGURATIONS = ("stabilityai/stable-diffusion-xl-base-1.0",)  # what diffusers takes for single files
_SD_CONFIGURATIONS = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1")
SHARED_CACHE = ".cache"  # inside a run's or a sweep's folder: what its notebooks draw once with the unchanged model
#: what identifies every run; notebooks get those that they declare
SETTINGS: dict[str, Parameter] = {
    "model": Parameter("model", "str", "emoji"),
    "concept": Parameter("concept", "str", "cat"),
    "kind": Parameter("kind", "str", None, optional=True, choices=KINDS),
    "preset": Parameter("preset", "str", "balanced"),
    "seed": Parameter("seed", "int", 0, limits=(0, 2**63 - 1)),
}


class RequestError(ValueError):
    """A run cannot start as asked; the message says why and what there is instead."""


@dataclass(frozen=True)
class Notebook:
    """One notebook to execute, with its checked parameter values."""

    path: Path
    values: dict[str, Any]
    needs: tuple[str, ...] = ()  # files or folders inside `out` that must be there before it starts
    gives: tuple[str, ...] = ()  # files or folders inside `out` that it leaves
    metrics: tuple[str, ...] = ()  # sections of metrics.json that it records

    @property
    def digest(self) -> str:
        """The file's checksum, by which a finished run knows it."""
        return _digest(self.path, self.path.stat().st_mtime_ns)


@dataclass(frozen=True)
class Plan:
    """A checked run: its settings, other parameters, absolute folder and notebooks in order."""

    settings: dict[str, Any]
    parameters: dict[str, Any]
    out: Path
    notebooks: tuple[Notebook, ...] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        """A readable name: concept, preset and seed, and the model if it is not the bundled one."""
        parts = [] if self.settings["model"] == "emoji" else [Path(self.settings["model"]).name]
        parts += [self.settings["concept"], self.settings["preset"], f"seed{self.settings['seed']}"]
        return "-".join(_slug(part) for part in parts)

    @property
    def key(self) -> str:
        """Ten hex digits that stand for the settings and parameters, whatever the folder and the notebooks."""
        content = json.dumps([self.settings, self.parameters], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    @property
    def model_print(self) -> str:
        """A print of the model's files as they are now; a finished run knows by it whether it was of this model."""
        try:
            return model_print(resolve(self.settings["model"]))
        except UnknownModelError:
            return ""

    def is_of_model(self, state: Mapping[str, Any]) -> bool:
        """Whether a `run.json` is of the model as it is now; one of before this was noted is taken to be."""
        return state.get("model_files", self.model_print) == self.model_print


def plan_run(
    *,
    notebooks: str | Iterable[str] = COURSE_RUN,
    out: str | Path | None = None,
    within: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    **settings: Any,
) -> Plan:
    """Check a run's request and return its plan; nothing is written.

    notebooks: numbers ("03", "1-4"), names ("03_forget") or paths of .ipynb files, in the order of execution.
    out: the run's folder; by default `runs/` and a readable name, with a hash if `parameters` has something.
    within: instead of `out`, the folder of a sweep, which gives each of its runs the folder NAME-HASH and one `cache`
        for all of them; a single run has its own. Comparisons with other presets (`compare`) are for a reader, so no
        run makes them unless `parameters` say so. Neither is part of a run's key: what is measured stays the same.
    parameters: values for notebook parameters, among them "config", the folder of a single file's configuration;
        `texts`: the same as typed on a command line, parsed by type.
    settings: model, concept, kind (None: found out), preset, seed.

    Raises RequestError, ParameterError or UnknownModelError (all ValueError), naming the fault and what there is.
    """
    paths = find_notebooks(notebooks)
    parameters, texts = dict(parameters or {}), dict(texts or {})
    settings = check_settings(settings, (texts | parameters).get("config"))
    reserved = [name for name in (*parameters, *texts) if name in SETTINGS or name == "out"]
    if reserved:
        raise RequestError(f"'{reserved[0]}' is a setting of the run, not a notebook's parameter: use --{reserved[0]}")

    declared = [_said_by(path)[0] for path in paths]
    union = {name: parameter for one in reversed(declared) for name, parameter in one.items()}
    free = {name: parameter for name, parameter in union.items() if name not in SETTINGS and name != "out"}
    check_parameters(free, {name: free[name].default if name in free else None for name in texts})  # known names?
    parameters |= {name: free[name].parse(text) for name, text in texts.items()}
    parameters = check_parameters(free, parameters)
    for name, value in parameters.items():
        if value and free[name].is_path:  # relative to here, while a kernel works in the run's folder
            parameters[name] = str(_absolute(Path(value)))

    plan = Plan(settings, parameters, Path(), tuple(Notebook(path, {}) for path in paths))
    plan_out = _absolute(_folder(plan, out, within))
    cache = (plan_out if within is None else plan_out.parent) / SHARED_CACHE
    shared = {"cache": str(cache), "compare": False}
    values = shared | settings | parameters | {"out": str(plan_out)}
    checked = []
    for path, one in zip(paths, declared, strict=True):
        mine = {name: value for name, value in values.items() if name in one}
        checked.append(Notebook(path, check_parameters(one, mine), **_said_by(path)[1]))
    plan = Plan(settings, parameters, plan_out, tuple(checked))
    if within is None:  # a sweep's folders are named by what they hold
        _check_folder(plan)
    _check_needs(plan)
    return plan


def _folder(plan: Plan, out: str | Path | None, within: str | Path | None) -> Path:
    if within is not None:
        return Path(within) / f"{plan.name}-{plan.key}"
    if out is not None:
        if not str(out).strip():
            raise RequestError("the run's folder has an empty name; name one ('.' is this folder)")
        return Path(out)
    return Path("runs") / (f"{plan.name}-{plan.key}" if plan.parameters else plan.name)


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()


def _said_by(path: Path) -> tuple[dict[str, Parameter], dict[str, tuple[str, ...]]]:
    """A notebook's parameters and promises, read again only when the file changed: sweeps ask a thousand times."""
    changed = path.stat().st_mtime_ns
    return _parameters(path, changed), _promises(path, changed)


@lru_cache(maxsize=256)
def _parameters(path: Path, changed: int) -> dict[str, Parameter]:
    return read_parameters(path)


@lru_cache(maxsize=256)
def _digest(path: Path, changed: int) -> str:
    return sha256(path)


@lru_cache(maxsize=256)
def _promises(path: Path, changed: int) -> dict[str, tuple[str, ...]]:
    """What the notebook's metadata (`"fmn": {"needs": [], "gives": [], "metrics": []}`) says about its files."""
    said = read_json(path)["metadata"].get("fmn", {})
    return {name: tuple(said.get(name, ())) for name in ("needs", "gives", "metrics")}


def find_notebooks(names: str | Iterable[str]) -> list[Path]:
    """Absolute paths of notebooks given by number, name or path ("01,03", "1-4" or a list), in the order given."""
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else [str(name) for name in names]
    wanted = [name for name in wanted if name]
    if not wanted:
        raise RequestError(f"no notebook named; the course has: {_listed(course_notebooks())}")
    paths = [_find_notebook(one) for name in wanted for one in _ranged(name)]
    doubled = {path.name for path in paths if sum(path.name == other.name for other in paths) > 1}
    if doubled:
        raise RequestError(f"notebook {min(doubled)} is named twice; name each once")
    return paths


def _ranged(name: str) -> list[str]:
    """The numbers of a range such as "1-4" whose ends exist; otherwise only `name`."""
    course, ends = list(course_notebooks()), [end.zfill(2) for end in name.split("-")]
    if len(ends) != 2 or not all(end in course for end in ends):
        return [name]
    return course[course.index(ends[0]):course.index(ends[1]) + 1] or [name]


def _find_notebook(name: str) -> Path:
    if name.endswith(".ipynb") and Path(name).expanduser().is_file():
        return Path(name).expanduser().resolve()
    course = course_notebooks()
    for number, path in course.items():
        if name in (number, str(int(number)), path.stem, path.name):
            return path
    raise RequestError(f"there is no notebook '{name}'; the course has: {_listed(course)}; or give an .ipynb's path")


def course_notebooks() -> dict[str, Path]:
    """Number ("03") -> path of every numbered notebook of the course, in order."""
    return {path.name[:2]: path for path in sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb"))}


def measuring_notebooks() -> dict[str, Path]:
    """Section of metrics.json -> the course's first notebook that records it."""
    course = reversed(course_notebooks().values())
    return {section: path for path in course for section in _promises(path, path.stat().st_mtime_ns)["metrics"]}


def check_settings(settings: Mapping[str, Any], config: Any = None) -> dict[str, Any]:
    """All settings, defaults filled in, with types, model and concept checked.

    `config`, a folder with what a single file's weights need beside them, replaces what the hub has.
    RequestError, ParameterError or UnknownModelError for the first fault.
    """
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise RequestError(f"a run has no setting '{unknown[0]}'{did_you_mean(unknown[0], SETTINGS)}; it has: "
                           + ", ".join(SETTINGS))
    full = {name: one.check(settings.get(name, one.default)) for name, one in SETTINGS.items()}
    place = resolve(full["model"])
    if isinstance(place, str):
        check_on_hub(place)
    elif full["model"] not in bundled():
        if place.is_file():
            _check_config(config) if config else _check_single_file(place)
        full["model"] = str(_absolute(place))
    if full["preset"] not in PRESETS:
        raise RequestError(f"there is no preset '{full['preset']}'; there are: {', '.join(PRESETS)}")
    full["kind"] = check_concept(full["model"], full["concept"], full["kind"])
    return full


def _check_config(config: Any) -> None:
    if not (Path(str(config)).expanduser() / "model_index.json").is_file():
        raise RequestError(f"config is not a folder with a model_index.json: {shortened(config)}; give one that holds "
                           "a pipeline's configuration and tokenizer (weights aren't needed)")


@lru_cache(maxsize=256)  # sweeps ask a thousand times; a refusal is never kept
def _check_single_file(file: Path) -> None:
    """RequestError unless what diffusers needs beside a single file's weights is on this machine or on the hub."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as weights:
            is_sdxl = any(name.startswith(_SDXL_PART) for name in weights.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{file} can't be read as safetensors ({error}); get the file again") from None
    faults = []
    for source in _SDXL_CONFIGURATIONS if is_sdxl else _SD_CONFIGURATIONS:
        try:
            return check_on_hub(source)
        except UnknownModelError as error:
            faults.append(error)
    raise RequestError(
        f"{file} holds only weights; their configuration and tokenizer ({source}) are neither on this machine nor in "
        "reach: give a folder that holds them with --config (weights aren't needed), or load it once with a "
        "connection") from faults[-1]


def check_concept(model: str, concept: str, kind: str | None) -> str:
    """The concept's kind; RequestError if the model's world has no such concept, or has it as another kind."""
    if not concept.strip() or not concept.isprintable() or len(concept) > 100:
        raise RequestError(f"{shortened(concept)} is not a concept: give one to a hundred printable characters")
    vocabulary = vocabulary_of(Path(resolve(model)))
    if vocabulary is None:
        return kind or "object"
    known = vocabulary.concepts()
    if concept not in known:
        raise RequestError(f"the {model} model does not know '{concept}'{did_you_mean(concept, known)}; it knows: "
                           + ", ".join(known))
    if kind not in (None, known[concept]):
        raise RequestError(f"'{concept}' is of kind {known[concept]} in the {model} model's world; use --kind "
                           f"{known[concept]}")
    return known[concept]


def _check_folder(plan: Plan) -> None:
    """Check that the folder is new, empty, or holds the same run."""
    out = plan.out
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file; give a folder for the run")
    if RunFolder(out).state_file.exists():
        try:
            _check_same_run(plan, RunFolder(out).checked_state())
        except StateError as error:
            raise RequestError(f"{error}; give another --out, or delete that file") from error
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise RequestError(f"{out} is not empty and holds no run; give a new or empty folder")


def _check_needs(plan: Plan) -> None:
    """Check that what a notebook needs is in the folder, or that an earlier notebook makes it."""
    given: set[str] = set()
    for notebook in plan.notebooks:
        missing = [name for name in notebook.needs if name not in given and not (plan.out / name).exists()]
        if missing:
            raise RequestError(
                f"{notebook.path.name} needs '{missing[0]}' in {plan.out}; run the notebook that makes it as well"
            )
        given.update(notebook.gives)


def _check_same_run(plan: Plan, state: Mapping[str, Any]) -> None:
    """Check that figures of two different runs don't meet in one folder."""
    before = {**state["settings"], **state["parameters"]}
    now = {**plan.settings, **plan.parameters}
    for name in (*before, *now):
        if before.get(name) != now.get(name):
            raise RequestError(
                f"{plan.out} holds a run with {name} {shortened(before.get(name, 'not given'))}, this one has "
                f"{shortened(now.get(name, 'not given'))}; give another --out"
            )


def _listed(course: Mapping[str, Path]) -> str:
    return ", ".join(path.stem for path in course.values()) or "none"


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_.") or "unnamed"
