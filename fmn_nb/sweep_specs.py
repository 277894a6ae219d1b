"""A sweep's specification: a YAML file, validated in full, becomes the list of its runs.

    notebooks: ["03", "04"]          # or notebook: "03"; what one run executes, in order
    fixed: {preset: balanced}        # parameters all runs share
    grid: {concept: [cat, frog], seed: [0, 1]}      # every combination; or  list: [{...}, {...}]
    workers: 2                       # optional; cluster: {...} for Dask
"""

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fmn_nb.plans import COURSE_RUN, SETTINGS, Plan, plan_run
from fmn_nb.storage import Local, Remote, Storage, SweepError, check_url, is_url

KEYS = ("notebooks", "notebook", "fixed", "grid", "list", "workers", "cluster")
CLUSTER_KINDS = ("scheduler", "local", "slurm", "kubernetes")
MOST_RUNS = 100_000


@dataclass(frozen=True)
class Sweep:
    """A validated sweep: its absolute folder, its runs in order, and what differs between them.

    With results at a URL, `folder` is where the runs would work on a worker's machine; see `moved`.
    """

    folder: Path
    plans: tuple[Plan, ...]
    varied: tuple[str, ...]
    notebooks: tuple[str, ...]
    workers: int
    cluster: dict[str, Any] | None
    storage: Storage = Local()
    content: Mapping[str, Any] = field(default_factory=dict)  # the specification as it was given

    @property
    def place(self) -> Path | str:
        """Where a person finds the results: the folder, or the URL."""
        return self.storage.url if isinstance(self.storage, Remote) else self.folder

    def moved(self, folder: Path) -> "Sweep":
        """The same sweep with its runs inside another local folder."""
        return replace(self, folder=folder, plans=tuple(_moved(plan, self.folder, folder) for plan in self.plans))


def _moved(plan: Plan, old: Path, new: Path) -> Plan:
    def value(one: Any) -> Any:
        inside = isinstance(one, str) and Path(one).is_relative_to(old)
        return str(new / Path(one).relative_to(old)) if inside else one

    notebooks = tuple(
        replace(notebook, values={name: value(one) for name, one in notebook.values.items()})
        for notebook in plan.notebooks
    )
    return replace(plan, out=new / plan.out.relative_to(old), notebooks=notebooks)


def plan_sweep(spec: Path | str | Mapping[str, Any], out: Path | str | None = None) -> Sweep:
    """Read and check a specification (a YAML file, or its content) and every run in it. Nothing is written.

    The results go to `out`, a folder (by default `runs/` and the file's name) or an fsspec URL (s3://bucket/x).
    SweepError (or a run's own RequestError or ParameterError) names the first fault.
    """
    content = dict(spec) if isinstance(spec, Mapping) else _read(Path(spec))
    name = "sweep" if isinstance(spec, Mapping) else Path(spec).stem
    storage, folder = _place(out if out is not None else Path("runs") / name)
    _check_keys(content)
    notebooks = [content["notebook"]] if "notebook" in content else content.get("notebooks", COURSE_RUN)
    notebooks = tuple(str(one) for one in notebooks)
    combinations = _combinations(content)
    plans = tuple(_plan(combination, notebooks, folder) for combination in combinations)
    doubled = len(plans) - len({plan.key for plan in plans})
    if doubled:
        raise SweepError(f"{doubled} of the {len(plans)} runs repeat another one's parameters; name each but once")
    workers, cluster = content.get("workers", 1), content.get("cluster")
    return Sweep(folder, plans, _varied(combinations), notebooks, workers, cluster, storage, content)


def _place(out: Path | str) -> tuple[Storage, Path]:
    """The storage that `out` names, and the folder in which the runs are planned."""
    if not is_url(out):
        return Local(), Path(out).expanduser().resolve()
    url = check_url(str(out))
    return Remote(url), Path(tempfile.gettempdir()).resolve() / "fmn-sweep" / url.rsplit("/", 1)[-1]


def _varied(combinations: list[dict[str, Any]]) -> tuple[str, ...]:
    """The names whose values differ between runs, settings first."""
    names = {name for one in combinations for name in one}
    varied = {name for name in names if any(one.get(name) != combinations[0].get(name) for one in combinations)}
    return tuple(name for name in [*SETTINGS, *sorted(varied - set(SETTINGS))] if name in varied)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is no readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SweepError(f"{path} must hold keys and values; the keys are: {', '.join(KEYS)}")
    return content


def _check_keys(content: Mapping[str, Any]) -> None:
    unknown = [str(key) for key in content if key not in KEYS]
    if unknown:
        raise SweepError(f"a sweep has no key '{unknown[0]}'; the keys are: {', '.join(KEYS)}")
    if "notebooks" in content and "notebook" in content:
        raise SweepError("give either notebook or notebooks, not both")
    if ("grid" in content) == ("list" in content):
        raise SweepError("give either grid (every combination) or list (the runs one by one)")
    if not isinstance(content.get("notebooks", []), list):
        raise SweepError('notebooks must be a list, as in ["03", "04"]')
    if not isinstance(content.get("fixed", {}), dict):
        raise SweepError("fixed must hold names and values, as in {preset: balanced}")
    _check_cluster(content.get("cluster"))
    workers = content.get("workers", 1)
    if type(workers) is not int or workers < 1:
        raise SweepError(f"workers must be a whole number from 1, not {workers!r}")


def _check_cluster(cluster: Any) -> None:
    if cluster is None:
        return
    if not isinstance(cluster, dict) or cluster.get("kind") not in CLUSTER_KINDS:
        raise SweepError(f"cluster must hold a kind, one of: {', '.join(CLUSTER_KINDS)}, as in {{kind: slurm}}")
    if cluster["kind"] == "scheduler" and not isinstance(cluster.get("address"), str):
        raise SweepError("cluster of kind scheduler needs its address, as in tcp://host:8786")
    if cluster["kind"] == "kubernetes" and not isinstance(cluster.get("image"), str):
        raise SweepError("cluster of kind kubernetes needs an image, one in which this version of fmn-nb is installed")


def _combinations(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of each run, shared ones included."""
    runs = _grid(content["grid"]) if "grid" in content else content["list"]
    if not isinstance(runs, list) or not runs or not all(isinstance(one, dict) for one in runs):
        raise SweepError("list must hold one {name: value, ...} for each run, at least one")
    fixed = content.get("fixed", {})
    both = sorted({str(name) for one in runs for name in one if name in fixed})
    if both:
        raise SweepError(f"'{both[0]}' is fixed and varied; give it once")
    return [{**fixed, **one} for one in runs]


def _grid(grid: Any) -> list[dict[str, Any]]:
    if not isinstance(grid, dict) or not grid:
        raise SweepError("grid must hold names and lists, as in {concept: [cat, frog], seed: [0, 1]}")
    count = 1
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise SweepError(f"grid: '{name}' must be a list with at least one value, not {values!r}")
        count *= len(values)
    if count > MOST_RUNS:
        raise SweepError(f"the grid makes {count:,} runs; at most {MOST_RUNS:,} are taken")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _plan(combination: Mapping[Any, Any], notebooks: tuple[str, ...], folder: Path) -> Plan:
    wrong = [name for name in combination if not isinstance(name, str)]
    if wrong:
        raise SweepError(f"{wrong[0]!r} is no parameter's name: names are text")
    settings = {name: value for name, value in combination.items() if name in SETTINGS}
    parameters = {name: value for name, value in combination.items() if name not in SETTINGS}
    return plan_run(notebooks=notebooks, within=folder, parameters=parameters, **settings)
