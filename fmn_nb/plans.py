"""What a run is asked to do, checked in full before anything heavy starts.

`plan_run` answers a wrong notebook, model, concept or parameter by one clear error that lists what there is,
without importing torch. What it returns can be executed as it is.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fmn_nb.files import read_json
from fmn_nb.forgetting_settings import PRESETS
from fmn_nb.parameters import Parameter, check_parameters, read_parameters
from fmn_nb.paths import bundled_models, notebooks_dir

COURSE_RUN = ("01", "02", "03", "04")
RUN_FILE = "run.json"
SHARED_CACHE = ".cache"  # inside a sweep's folder: what its runs draw with the unchanged model, drawn once
HUB_PATIENCE = 10  # seconds for the hub's answer, which no run begins without
_KINDS = ("object", "style", "identity")
#: what every run is known by; notebooks get those that they declare
SETTINGS: dict[str, Parameter] = {
    "model": Parameter("model", "str", "emoji"),
    "concept": Parameter("concept", "str", "cat"),
    "kind": Parameter("kind", "str", None, optional=True, choices=_KINDS),
    "preset": Parameter("preset", "str", "balanced"),
    "seed": Parameter("seed", "int", 0, limits=(0, 2**63 - 1)),
}


class RequestError(ValueError):
    """A run that cannot start as asked; the text says why and what there is instead."""


@dataclass(frozen=True)
class Notebook:
    """One notebook to execute, with its checked parameter values."""

    path: Path
    values: dict[str, Any]
    needs: tuple[str, ...] = ()  # files or folders inside `out` that must be there before it starts
    gives: tuple[str, ...] = ()  # files or folders inside `out` that it leaves
    metrics: tuple[str, ...] = ()  # sections of metrics.json that it records


@dataclass(frozen=True)
class Plan:
    """A checked run: its settings, further parameters, absolute folder and notebooks in order."""

    settings: dict[str, Any]
    parameters: dict[str, Any]
    out: Path
    notebooks: tuple[Notebook, ...] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        """A readable name: concept, preset and seed, and the model where it is not the bundled one."""
        parts = [] if self.settings["model"] == "emoji" else [Path(self.settings["model"]).name]
        parts += [self.settings["concept"], self.settings["preset"], f"seed{self.settings['seed']}"]
        return "-".join(_slug(part) for part in parts)

    @property
    def key(self) -> str:
        """Ten hex digits that stand for the settings and parameters, whatever the folder and the notebooks."""
        content = json.dumps([self.settings, self.parameters], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:10]


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

    notebooks: numbers ("03"), names ("03_forget") or paths of .ipynb files, in the order of execution.
    out: the run's folder; default `runs/` and a readable name, with a hash where `parameters` has something.
    within: instead of `out`, the folder of a sweep, which gives each of its runs the folder NAME-HASH, and all of them
        one `cache` folder where a notebook has that parameter; it changes no result, and so is no part of a run's key.
    parameters: values for notebook parameters; `texts`: the same as typed on a command line, parsed by type.
    settings: model, concept, kind (None: found out), preset, seed.

    Raises RequestError or ParameterError (both ValueError), naming the fault and what there is.
    """
    paths = find_notebooks(notebooks)
    settings = check_settings(settings)
    parameters, texts = dict(parameters or {}), dict(texts or {})
    reserved = [name for name in (*parameters, *texts) if name in SETTINGS or name == "out"]
    if reserved:
        raise RequestError(f"'{reserved[0]}' is a setting of the run, not a notebook's parameter: use --{reserved[0]}")

    declared = [read_parameters_once(path, path.stat().st_mtime_ns) for path in paths]
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
    shared = {} if within is None else {"cache": str(plan_out.parent / SHARED_CACHE)}
    values = shared | settings | parameters | {"out": str(plan_out)}
    checked = []
    for path, one in zip(paths, declared, strict=True):
        mine = {name: value for name, value in values.items() if name in one}
        checked.append(Notebook(path, check_parameters(one, mine), **_promises(path)))
    plan = Plan(settings, parameters, plan_out, tuple(checked))
    if within is None:  # a sweep's folders are named by what they hold
        _check_folder(plan)
    _check_needs(plan)
    return plan


def _folder(plan: Plan, out: str | Path | None, within: str | Path | None) -> Path:
    if within is not None:
        return Path(within) / f"{plan.name}-{plan.key}"
    if out is not None:
        return Path(out)
    return Path("runs") / (f"{plan.name}-{plan.key}" if plan.parameters else plan.name)


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()


@lru_cache(maxsize=256)
def read_parameters_once(path: Path, changed: int) -> dict[str, Parameter]:
    """`read_parameters`, read again only when the file's change time differs: sweeps ask a thousand times."""
    return read_parameters(path)


def find_notebooks(names: str | Iterable[str]) -> list[Path]:
    """Absolute paths of notebooks given by number, name or path ("01,03" or a list), in the order given."""
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else [str(name) for name in names]
    if not any(wanted):
        raise RequestError(f"no notebook named; the course has: {_listed(course_notebooks())}")
    paths = [_find_notebook(name) for name in wanted]
    doubled = {path.name for path in paths if sum(path.name == other.name for other in paths) > 1}
    if doubled:
        raise RequestError(f"notebook {min(doubled)} is named twice; name each once")
    return paths


def _find_notebook(name: str) -> Path:
    if name.endswith(".ipynb") and Path(name).expanduser().is_file():
        return Path(name).expanduser().resolve()
    course = course_notebooks()
    for number, path in course.items():
        if name in (number, number.lstrip("0"), path.stem, path.name):
            return path
    raise RequestError(f"there is no notebook '{name}'; the course has: {_listed(course)}; or give an .ipynb's path")


def course_notebooks() -> dict[str, Path]:
    """Number ("03") -> path of every numbered notebook of the course, in order."""
    return {path.name[:2]: path for path in sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb"))}


def measuring_notebook(section: str) -> Path | None:
    """The course's first notebook that records this section of metrics.json, if any does."""
    return next((path for path in course_notebooks().values() if section in _promises(path)["metrics"]), None)


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, defaults filled in, with types, model and concept checked."""
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise RequestError(f"a run has no setting '{unknown[0]}'; it has: {', '.join(SETTINGS)}")
    full = {name: one.check(settings.get(name, one.default)) for name, one in SETTINGS.items()}
    check_model(full["model"])
    if full["model"] not in bundled_models():
        if Path(full["model"]).expanduser().exists():
            full["model"] = str(_absolute(Path(full["model"])))
        else:
            check_on_hub(full["model"])
    if full["preset"] not in PRESETS:
        raise RequestError(f"there is no preset '{full['preset']}'; there are: {', '.join(PRESETS)}")
    full["kind"] = check_concept(full["model"], full["concept"], full["kind"])
    return full


def check_model(name: str) -> None:
    """Raise RequestError unless `name` is bundled, an existing folder or .safetensors file, or reads as a hub id."""
    path = Path(name).expanduser()
    is_local = (path / "model_index.json").is_file() or (path.suffix == ".safetensors" and path.is_file())
    looks_remote = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not path.exists()
    if path.is_file() and path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise RequestError(f"{name} is a pickled checkpoint, which can run code and is not read; convert it to "
                           ".safetensors")
    if name not in bundled_models() and not is_local and not looks_remote:
        bundled = ", ".join(bundled_models()) or "none; build it with: fmn-nb pretrain"
        raise RequestError(
            f"there is no model '{name}'; bundled: {bundled}; or give a hub id (owner/name), a folder with a "
            "model_index.json, or a .safetensors file"
        )


@lru_cache(maxsize=256)  # sweeps ask a thousand times; a refusal is never kept
def check_on_hub(name: str) -> None:
    """Raise RequestError unless the hub id `name` is in the local cache or names a pipeline on the hub."""
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    here = f"a bundled name ({', '.join(bundled_models()) or 'none'}), a folder or a .safetensors file"
    try:
        if isinstance(try_to_load_from_cache(name, "model_index.json"), str):
            return
        files = model_info(name, timeout=HUB_PATIENCE).siblings
    except HFValidationError as error:
        raise RequestError(f"'{name}' is no hub id: {error}") from None
    except OfflineModeIsEnabled:
        raise RequestError(f"the model '{name}' is not on this machine and HF_HUB_OFFLINE forbids to fetch it; "
                           f"unset that, or give {here}") from None
    except RepositoryNotFoundError:
        raise RequestError(f"the hub has no model '{name}', or not for you; look the name up on huggingface.co, log in "
                           f"(hf auth login) if it is private, or give {here}") from None
    except Exception as error:  # whichever HTTP library is at work has errors of its own
        raise RequestError(f"the model '{name}' is not on this machine and the hub can't be reached "
                           f"({type(error).__name__}); try again with a connection, or give {here}") from error
    if files is not None and not any(file.rfilename == "model_index.json" for file in files):
        raise RequestError(f"the hub's '{name}' holds no model_index.json, so it is no diffusers pipeline")


def check_concept(model: str, concept: str, kind: str | None) -> str:
    """The concept's kind; RequestError when the model's world is the emoji world and holds no such concept or kind."""
    if not concept.strip() or not concept.isprintable() or len(concept) > 100:
        raise RequestError(f"{concept!r} is no concept: give one to a hundred printable characters")
    if model not in bundled_models() and not _speaks_emoji(Path(model).expanduser()):
        return kind or "object"
    from fmn_nb.emoji.world import concept_names, kind_of

    known = kind_of(concept)
    if known is None:
        close = difflib.get_close_matches(concept, concept_names(), n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise RequestError(f"the {model} model does not know '{concept}'{hint}; it knows: {', '.join(concept_names())}")
    if kind not in (None, known):
        raise RequestError(f"'{concept}' is of kind {known} in the {model} model's world; use --kind {known}")
    return known


def _speaks_emoji(folder: Path) -> bool:
    """Whether a folder's model has the bundled emoji model's vocabulary: a copy of it, or an oracle."""
    ours, theirs = (_vocabulary(one) for one in (bundled_models().get("emoji"), folder))
    return ours is not None and ours == theirs


def _vocabulary(folder: Path | None) -> dict[str, int] | None:
    path = None if folder is None else folder / "tokenizer" / "tokenizer.json"
    if path is None or not path.is_file():
        return None
    # The words alone: other versions of the library lay the file out differently.
    return read_json(path).get("model", {}).get("vocab")


def _promises(path: Path) -> dict[str, tuple[str, ...]]:
    """What the notebook's metadata (`"fmn": {"needs": [], "gives": [], "metrics": []}`) says of its files."""
    return _promises_once(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _promises_once(path: Path, changed: int) -> dict[str, tuple[str, ...]]:
    """Read again only when the file's change time differs, as `read_parameters_once`."""
    said = read_json(path)["metadata"].get("fmn", {})
    return {name: tuple(said.get(name, ())) for name in ("needs", "gives", "metrics")}


def _check_folder(plan: Plan) -> None:
    """The folder is new, empty, or holds the same run."""
    out = plan.out
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file; give a folder for the run")
    if (out / RUN_FILE).exists():
        _check_same_run(plan, read_json(out / RUN_FILE))
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise RequestError(f"{out} is not empty and holds no run; give a new or empty folder")


def _check_needs(plan: Plan) -> None:
    """What a notebook needs is in the folder, or an earlier notebook makes it."""
    given: set[str] = set()
    for notebook in plan.notebooks:
        missing = [name for name in notebook.needs if name not in given and not (plan.out / name).exists()]
        if missing:
            raise RequestError(
                f"{notebook.path.name} needs '{missing[0]}' in {plan.out}; run the notebook that makes it as well"
            )
        given.update(notebook.gives)


def _check_same_run(plan: Plan, state: Mapping[str, Any]) -> None:
    """Figures of two different runs must not meet in one folder."""
    before = {**state.get("settings", {}), **state.get("parameters", {})}
    now = {**plan.settings, **plan.parameters}
    for name in (*before, *now):
        if before.get(name) != now.get(name):
            raise RequestError(
                f"{plan.out} holds a run with {name} {before.get(name, 'not given')!r}, this one has "
                f"{now.get(name, 'not given')!r}; give another --out"
            )


def _listed(course: Mapping[str, Path]) -> str:
    return ", ".join(path.stem for path in course.values()) or "none"


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_.") or "unnamed"
