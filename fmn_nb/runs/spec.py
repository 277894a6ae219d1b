"""A sweep's specification: a YAML file, checked in full, becomes the list of its runs.

    notebooks: ["03", "04"]          # or notebook: "03"; what one run executes, in order
    fixed: {preset: balanced}        # parameters all runs share
    grid: {concept: [cat, frog], seed: [0, 1]}      # every combination; or  list: [{...}, {...}]
    workers: 2                       # optional, runs at a time; cluster: {...} for workers elsewhere
"""

from __future__ import annotations

import itertools
import math
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fmn_nb.files import read_yaml
from fmn_nb.runs.metrics import first_fault
from fmn_nb.runs.parameters import SETTINGS, did_you_mean
from fmn_nb.runs.plan import COURSE_RUN, Plan, plan_run
from fmn_nb.runs.storage import Local, Remote, SweepError, storage_at

MOST_RUNS = 100_000
Values = Annotated[list[Any], Field(min_length=1)]


class Cluster(BaseModel):
    """Where the workers are; anything else goes to the cluster's class (`fmn_nb.runs.executors`).

    `gpu`: a run takes its worker's one "GPU" resource, so that two runs never share a card.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    kind: Literal["local", "slurm", "scheduler"]
    address: str | None = None
    gpu: bool = False

    @model_validator(mode="after")
    def _needs_address(self) -> Self:
        if self.kind == "scheduler" and not self.address:
            raise ValueError("cluster of kind scheduler needs its address, as in tcp://host:8786")
        return self


class Specification(BaseModel):
    """What a sweep's file may hold."""

    model_config = ConfigDict(strict=True, extra="forbid")

    notebooks: Values | None = None
    notebook: Any = None
    fixed: dict[str, Any] = {}
    grid: Annotated[dict[str, Values], Field(min_length=1)] = None
    listed: Annotated[list[dict[str, Any]], Field(alias="list", min_length=1)] = None
    workers: Annotated[int, Field(ge=1)] = 1
    cluster: Cluster | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if isinstance(self.notebook, list):
            raise ValueError("notebook is the name of a single one; for a list, did you mean 'notebooks'?")
        if self.notebooks and self.notebook is not None:
            raise ValueError("give either notebook or notebooks, not both")
        if (self.grid is None) == (self.listed is None):
            raise ValueError("give either grid (every combination) or list (the runs one by one)")
        count = math.prod(map(len, (self.grid or {}).values()))
        if count > MOST_RUNS:
            raise ValueError(f"the grid makes {count:,} runs; at most {MOST_RUNS:,} are allowed")
        both = sorted({name for one in self.listed or [self.grid] for name in one if name in self.fixed})
        if both:
            raise ValueError(f"'{both[0]}' is fixed and varied; give it once")
        return self

    def names(self) -> tuple[str, ...]:
        """The notebooks that one run executes."""
        chosen = (self.notebooks or COURSE_RUN) if self.notebook is None else [self.notebook]
        return tuple(str(one) for one in chosen)

    def combinations(self) -> list[dict[str, Any]]:
        """The parameters of each run, shared ones included."""
        runs = self.listed or [dict(zip(self.grid, values, strict=True))
                               for values in itertools.product(*self.grid.values())]
        return [{**self.fixed, **one} for one in runs]


@dataclass(frozen=True)
class Sweep:
    """A validated sweep: its absolute folder, its runs in order, and what differs between them.

    With results at a URL, `folder` is where the runs work on a worker's machine; each sweep has its own.
    """

    folder: Path
    plans: tuple[Plan, ...]
    varied: tuple[str, ...]
    notebooks: tuple[str, ...]
    workers: int
    cluster: dict[str, Any] | None
    storage: Local = Local()
    content: Mapping[str, Any] = field(default_factory=dict)  # the specification as it was given

    @property
    def place(self) -> Path | str:
        """Where a person finds the results: the folder, or the URL."""
        return self.storage.url if isinstance(self.storage, Remote) else self.folder


def plan_sweep(spec: Path | str | Mapping[str, Any], out: Path | str | None = None) -> Sweep:
    """Read and check a specification (a YAML file, or its content) and every run in it; write nothing.

    The results go to `out`, a folder (by default `runs/` and the file's name) or an fsspec URL (s3://bucket/x).
    SweepError (or a run's own error, a ValueError as well) names the first fault.
    """
    content = dict(spec) if isinstance(spec, Mapping) else _read(Path(spec))
    name = "sweep" if isinstance(spec, Mapping) else Path(spec).stem
    out = Path("runs") / name if out is None else out
    storage = storage_at(out)
    folder = _scratch(storage.url) if isinstance(storage, Remote) else Path(out).expanduser().resolve()
    said = _checked(content)
    combinations = said.combinations()
    plans = tuple(_plan(combination, said.names(), folder) for combination in combinations)
    doubled = len(plans) - len({plan.key for plan in plans})
    if doubled:
        raise SweepError(f"{doubled} of the {len(plans)} runs repeat the parameters of another; name each only once")
    return Sweep(folder, plans, _varied(combinations), said.names(), said.workers, content.get("cluster"), storage,
                 content)


def _scratch(url: str) -> Path:
    """A folder that no other sweep works in, named after the one at the URL."""
    return Path(tempfile.gettempdir()).resolve() / f"fmn-sweep-{secrets.token_hex(4)}" / url.rsplit("/", 1)[-1]


def _varied(combinations: list[dict[str, Any]]) -> tuple[str, ...]:
    """The names whose values differ between runs, settings first."""
    names = {name for one in combinations for name in one}
    varied = {name for name in names if any(one.get(name) != combinations[0].get(name) for one in combinations)}
    return tuple(name for name in [*SETTINGS, *sorted(varied - set(SETTINGS))] if name in varied)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise SweepError(str(error)) from None
    if not isinstance(content, dict):
        raise SweepError(f"{path} must hold keys and values; the keys are: {', '.join(_keys())}")
    return content


def _checked(content: Mapping[Any, Any]) -> Specification:
    unknown = [key for key in content if key not in _keys()]
    if unknown:
        raise SweepError(f"a sweep has no key '{unknown[0]}'{did_you_mean(unknown[0], _keys())}; the keys are: "
                         + ", ".join(_keys()))
    try:
        return Specification.model_validate(content)
    except ValidationError as error:
        raise SweepError(first_fault(error, "the specification")) from None


def _keys() -> list[str]:
    return [field.alias or name for name, field in Specification.model_fields.items()]


def _plan(combination: Mapping[str, Any], notebooks: tuple[str, ...], folder: Path) -> Plan:
    settings = {name: value for name, value in combination.items() if name in SETTINGS}
    parameters = {name: value for name, value in combination.items() if name not in SETTINGS}
    return plan_run(notebooks=notebooks, within=folder, parameters=parameters, **settings)
