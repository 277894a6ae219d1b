"""A run, checked before anything starts: which notebooks, with which parameters, in which folder.

A text that names a folder, file or path is made absolute, so that it means the same in every working directory. Nothing
here needs torch, so a wrong request is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from reprlib import repr as shortened  # no message repeats a value of a thousand letters
from typing import Any

from fmn_nb.concepts.world import vocabulary_of
from fmn_nb.files import model_print, notebooks_dir, read_json, sha256
from fmn_nb.forgetting.settings import PRESETS
from fmn_nb.models.names import UnknownModelError, bundled, check_on_hub, resolve
from fmn_nb.runs.folder import RunFolder, StateError
from fmn_nb.runs.parameters import SETTINGS, Parameter, check_parameters, did_you_mean, read_parameters

MOST_BYTES = 100  # of a setting in a folder's name, which may have 255 in all
OF_ROWS = ("folder", "status", "seconds", "error")  # what a run's row says besides settings, parameters and figures
COURSE_RUN = ("01", "02", "03", "04")
_SDXL_PART = "conditioner.embedders.1."  # of a single file's weights: the second text encoder
_SDXL_CONFIGURATIONS = ("stabilityai/stable-diffusion-xl-base-1.0",)  # what diffusers takes for single files
_SD_CONFIGURATIONS = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1")
SHARED_CACHE = ".cache"  # inside a run's or a sweep's folder: what its notebooks draw once with the unchanged model


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
    if twice := sorted({*parameters} & {*texts}):
        raise RequestError(f"'{twice[0]}' is given twice; give it once")
    if taken := [name for name in (*parameters, *texts) if name in OF_ROWS]:
        raise RequestError(f"a run's row has a column '{taken[0]}' of its own: give the parameter another name")

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


def promises_of(path: Path) -> dict[str, tuple[str, ...]]:
    """What a notebook's metadata says it needs, gives and records in metrics.json."""
    return _promises(path, path.stat().st_mtime_ns)


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
    return {section: path for path in course for section in promises_of(path)["metrics"]}


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
    name = re.sub(r"\W+", "_", text).strip("_.") or "unnamed"
    return name.encode()[:MOST_BYTES].decode(errors="ignore")
