"""The results table of all concepts by one command: `fmn-nb benchmark`.

A job forgets one concept with one preset and one seed (`fmn_nb.runs.measure`). Here: which jobs there are, and what is
made of their results. Killed at any moment and started again, the command goes on where it stood and ends in the same
table.

    WORK/cat-balanced-seed0-HASH.json   one job's result
    OUT/results.csv, results.json       the table, and how it was made
    OUT/forgetting-against-keeping.png  every concept a point
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.concepts.concept import Concept
from fmn_nb.concepts.world import Vocabulary
from fmn_nb.evaluation.protocol import REPEATS
from fmn_nb.files import parse_yaml, read_yaml, replacing, versions, write_json, write_text
from fmn_nb.forgetting.settings import PRESETS, Settings, SettingsError, settings_for
from fmn_nb.runs.stopping import telling
from fmn_nb.stats import bootstrap

if TYPE_CHECKING:
    import pandas as pd

    from fmn_nb.runs.measure import Bench

SETTINGS_FILE = "settings.yaml"
TABLE_FILE, RESULTS_FILE, FIGURE_FILE = "results.csv", "results.json", "forgetting-against-keeping.png"
EVERYTHING = "all"  # asks for every preset and variant of the settings file
_BASE = "preset"  # in a variant's settings: the preset that it changes
_SEEDS = "seeds"  # in a preset's settings: the only seeds that it is made with, of those asked for
SCHEMA = 1
#: of every row, with its 95% interval beside it
SHARES = ("ua", "ira", "cra", "h")
#: averaged over concepts; "h_of_ceiling" is h divided by its ceiling, the share reached of what could be reached
AVERAGED = ("ua", "ira", "cra", "h", "ceiling", "h_of_ceiling", "seconds", "patch_bytes", "peak_memory_bytes",
            "attack_success", "overshadowed_after")
#: what differs between two machines, or two runs on one
COSTS = ("seconds", "peak_memory_bytes")


class BenchmarkError(RuntimeError):
    """Some jobs failed; the others' results are there."""


@dataclass(frozen=True)
class Job:
    """One concept, one preset, one seed.

    Attributes:
        towards: for an ambiguous word the reading that is to show instead (a correction), else None.
        settings: the preset's, with the overrides that were asked for.
    """

    concept: Concept
    towards: str | None
    preset: str
    settings: Settings
    seed: int
    size: str

    @property
    def name(self) -> str:
        """A file's name for it: "birthday-cake-balanced-seed0"."""
        return f"{self.concept.name.replace(' ', '-')}-{self.preset}-seed{self.seed}"

    @property
    def group(self) -> str:
        """The row's kind in the table: object, style, identity or word (an ambiguous word, corrected)."""
        return "word" if self.towards else self.concept.kind


def plan_jobs(vocabulary: Vocabulary, concepts: Sequence[str] = (), presets: Sequence[str] = ("balanced", "paper"),
              seeds: Sequence[int] = (0,), size: str = "quick",
              overrides: Mapping[str, Mapping[str, Any]] | None = None) -> list[Job]:
    """All jobs in the order in which they are done: a seed's concepts, each with every preset.

    Args:
        vocabulary: the names of the model's world.
        concepts: names or groups (objects, styles, identities, words); all four groups where empty.
        presets: names of presets, or of variants that `overrides` define.
        overrides: preset -> settings to replace (`read_overrides`). One that says which "preset" it changes is a
            variant, with a name of its own; one that names "seeds" is made with these alone, of those asked for.

    Raises:
        ValueError: an unknown name, size or seed, or nothing to do; the text lists what there is.
        SettingsError: an unknown preset or setting.
    """
    overrides = overrides or {}
    if size not in REPEATS:
        raise ValueError(f"{size!r} is no size of evaluation; choose quick or full")
    unused = [name for name in overrides if name not in presets]
    if unused:
        raise SettingsError(f"settings for '{unused[0]}', which isn't asked for; presets: {', '.join(presets)}")
    wrong = [seed for seed in seeds if type(seed) is not int or seed < 0]
    if wrong or not seeds or not presets:
        raise ValueError(f"give at least one preset and seeds that are whole numbers from 0, not {list(seeds)}")
    settings = {preset: settings_of(preset, overrides.get(preset, {})) for preset in presets}
    its_seeds = {preset: overrides.get(preset, {}).get(_SEEDS, seeds) for preset in presets}
    known = _concepts(vocabulary, concepts)
    jobs = [Job(concept, towards, preset, settings[preset], seed, size) for seed in dict.fromkeys(seeds)
            for concept, towards in known for preset in settings if seed in its_seeds[preset]]
    if not jobs:
        raise ValueError(f"nothing to do: no preset is made with the seeds {list(seeds)}, by its settings")
    return jobs


def _concepts(vocabulary: Vocabulary, wanted: Sequence[str]) -> list[tuple[Concept, str | None]]:
    """The concepts that are meant, groups spelled out and each once, ambiguous words with their other reading."""
    groups = {"objects": vocabulary.objects, "styles": vocabulary.styles, "identities": vocabulary.names,
              "words": tuple(vocabulary.readings)}
    kinds = vocabulary.concepts()
    names = list(dict.fromkeys(name for item in wanted or groups for name in groups.get(item, (item,))))
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise ValueError(f"the {vocabulary.world} world has no '{unknown[0]}'; groups: {', '.join(groups)}; names: "
                         + ", ".join(name for group in groups.values() for name in group))
    return [(Concept(name, kind=kinds[name]), vocabulary.readings.get(name, (None, None))[1]) for name in names]


def settings_of(name: str, changes: Mapping[str, Any]) -> Settings:
    """The settings of a preset or variant, from what `read_overrides` says of it."""
    seeds = changes.get(_SEEDS, ())
    if not isinstance(seeds, (list, tuple)):
        raise SettingsError(f"the seeds of '{name}' are a list, [0, 1], not {seeds!r}")
    return settings_for(changes.get(_BASE, name),
                        {key: value for key, value in changes.items() if key not in (_BASE, _SEEDS)})


def read_overrides(file: Path | None, single: Sequence[str] = (),
                   presets: Sequence[str] = tuple(PRESETS)) -> dict[str, dict[str, Any]]:
    """Settings to replace, preset -> name -> value, from a YAML or JSON file and from texts "preset.name=value".

    The file may hold more presets than are asked for (["all"] asks for everything in it); the texts, which replace what
    the file says, may not. Settings under another name are a variant of the preset that they name:

        paper:
          learning_rate: 1e-4
        paper-words:
          preset: paper
          positions: [words]
          seeds: [0]        # whatever seeds are asked for, it is made with this one alone

    Raises:
        SettingsError: the file or a text isn't of this shape, names an unknown preset, or gives a variant a name that
            is no word (results are filed under it).
    """
    content = _read(file) if file is not None else {}
    for name, settings in content.items():
        preset = settings.get(_BASE, name)
        if str(preset) not in PRESETS:
            raise SettingsError(f"no preset '{preset}'; there are {', '.join(PRESETS)}")
        if not re.fullmatch(r"[\w.-]+", str(name)) or name == EVERYTHING or (name in PRESETS and preset != name):
            raise SettingsError(f"'{name}' is no name for a variant of '{preset}': letters, digits, '.', '-' and '_', "
                                f"but not {EVERYTHING} or another preset's")
    if list(presets) != [EVERYTHING]:
        content = {preset: settings for preset, settings in content.items() if preset in presets}
    for text in single:
        left, equals, value = text.partition("=")
        preset, dot, name = left.rpartition(".")
        if not (equals and dot and preset and name):
            raise SettingsError(f"a setting is given as preset.name=value, not '{text}'")
        content.setdefault(preset, {})[name] = parse_yaml(value, f"'{text}'")
    return {preset: {name: _number(value) for name, value in settings.items()} for preset, settings in content.items()}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = read_yaml(file) or {}
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise SettingsError(f"{file} must hold presets, each with its settings (paper: {{learning_rate: 1.0e-4}})")
    return {str(preset): dict(settings) for preset, settings in content.items()}


def _number(value: Any) -> Any:
    """A text that is a number (in quotes) is meant as one. Lists become tuples, as settings hold."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def run_benchmark(bench: Bench, jobs: Sequence[Job], out: Path, *, made: Mapping[str, Any], limit: int | None = None,
                  log: Callable[[str], None] = print) -> Path:
    """Do what is not done yet, at most `limit` jobs, and write the table of all that is done; returns its file.

    Args:
        out: the folder of the table, the figure and how they were made.
        made: goes into results.json, such as the command and how settings were tuned.
        log: told a line for each job.

    Raises:
        BenchmarkError: some jobs failed (after the others were done and the table written); they are tried again
            when started again. Also when nothing at all is done.
        Stopped: a KeyboardInterrupt came; what is done is kept.
    """
    open_jobs = [job for job in jobs if bench.stored(job) is None]
    todo, failures = open_jobs[:limit], []
    log(f"{len(jobs)} jobs, {len(jobs) - len(open_jobs)} done before, {len(todo)} to do now")
    with telling(partial(_finished, bench, jobs)):
        for number, job in enumerate(todo, 1):
            try:
                log(f"[{number}/{len(todo)}] {_described(job, bench.do(job))}")
            except (RuntimeError, ValueError) as error:
                failures.append(f"{job.name}: {error}")
                log(f"[{number}/{len(todo)}] {job.name}: FAILED: {error}")
        found = {job: result for job in jobs if (result := bench.stored(job)) is not None}
        if not found:
            raise BenchmarkError("no job is done, so there is no table\n  " + "\n  ".join(failures))
        missing = [job.name for job in jobs if job not in found]
        told = {"missing": missing} if missing else {}
        told |= {"failed": failures} if failures else {}
        table = _write_results(out, found, {**made, "model": bench.model, **bench.shared}, told)
    if failures:
        raise BenchmarkError(f"{len(failures)} of {len(todo)} jobs failed; start again to try them once more:\n  "
                             + "\n  ".join(failures))
    return table


def _finished(bench: Bench, jobs: Sequence[Job]) -> str:
    done = sum(bench.stored(job) is not None for job in jobs)
    return f"{done} of {len(jobs)} jobs finished; the same command goes on"


def _described(job: Job, result: Mapping[str, Any]) -> str:
    """One line on a finished job."""
    after, cost = result["after"], result["forgetting"]
    text = (f"{job.name}: UA {after['ua']:.2f}  IRA {after['ira']:.2f}  CRA {after['cra']:.2f}  H {after['h']:.2f} "
            f"of {after['ceiling']:.2f}  {cost['seconds']:.0f} s")
    if overshadowed := result.get("overshadowed"):
        text += f"  '{job.towards}' {overshadowed['before']['value']:.2f} to {overshadowed['after']['value']:.2f}"
    return text + (f"  attack {result['attack']['success']:.2f}" if "attack" in result else "")


def _write_results(out: Path, found: Mapping[Job, Mapping[str, Any]], made: Mapping[str, Any],
                   told: Mapping[str, Any]) -> Path:
    """The table of the jobs that are done as CSV, how it was made as JSON, and the figure."""
    from fmn_nb.plots.tradeoff import forgetting_against_keeping

    table = table_of(found)
    write_text(out / TABLE_FILE, table.to_csv(index=False, lineterminator="\n"))
    budgets = [result["attack"]["budget"] for result in found.values() if "attack" in result]
    attack = {"attack": {"name": "concept inversion", "budget": budgets[0]}} if budgets else {}
    write_json(out / RESULTS_FILE, {
        "schema": SCHEMA, **made, "size": next(iter(found)).size, "seeds": sorted({job.seed for job in found}),
        "settings": {job.preset: job.settings.to_dict() for job in found}, "versions": versions(),
        "summary": summary(table), **attack, **told,
    })
    figure = forgetting_against_keeping(table)
    with replacing(out / FIGURE_FILE) as temporary:
        figure.savefig(temporary, format="png", metadata={"Description": figure.words})
    return out / TABLE_FILE


def table_of(found: Mapping[Job, Mapping[str, Any]]) -> pd.DataFrame:
    """A row per job: concept, kind, preset, seed, figures with 95% intervals, costs. Empty cells: not measured."""
    import pandas as pd

    return pd.DataFrame([_row(job, result) for job, result in found.items()])


def _row(job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
    before, after, cost = result["before"], result["after"], result["forgetting"]
    row: dict[str, Any] = {"concept": job.concept.name, "kind": job.group, "preset": job.preset, "seed": job.seed,
                           "images": after["images"]}
    for name in SHARES:
        row |= {name: after[name], f"{name}_low": after["ci95"][name][0], f"{name}_high": after["ci95"][name][1]}
    row |= {"ceiling": after["ceiling"], "h_of_ceiling": after["h"] / after["ceiling"] if after["ceiling"] else None}
    row |= {f"base_{name}": before[name] for name in ("ua", "ira", "cra")}
    row |= {name: cost.get(name) for name in ("steps", "seconds", "peak_memory_bytes", "patch_bytes",
                                              "trainable_parameters")}
    if overshadowed := result.get("overshadowed"):
        row["overshadowed_before"] = overshadowed["before"]["value"]
        share = overshadowed["after"]
        row |= {"overshadowed_after": share["value"], "overshadowed_after_low": share["low"],
                "overshadowed_after_high": share["high"], "overshadowed_images": share["images"]}
    if attack := result.get("attack"):
        row |= {"attack_success": attack["success"], "attack_success_low": attack["low"],
                "attack_success_high": attack["high"], "attack_images": attack["count"]}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}


def summary(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each preset, over all concepts and by kind: how many, each figure's mean over concepts, and which reached the
    smallest share of its ceiling.

    The 95% intervals are bootstrapped over concepts (a concept's seeds are averaged first): they say how much the mean
    depends on which concepts are forgotten, and are left out for a single concept.
    """
    rows = []
    for preset, of_preset in table.groupby("preset", sort=False):
        for kind, group in [("all", of_preset), *of_preset.groupby("kind", sort=False)]:
            columns = [name for name in AVERAGED if name in group]
            means = group.groupby("concept", sort=False)[columns].mean()
            row: dict[str, Any] = {"preset": preset, "kind": kind, "concepts": len(means)}
            for name in columns:
                values = means[name].dropna().to_numpy(float)
                row |= _mean(name, values) if len(values) else {}
            reached = means["h_of_ceiling"].dropna()
            if len(reached):
                row["lowest"] = {"concept": reached.idxmin(), "h_of_ceiling": round(float(reached.min()), 6)}
            rows.append(row)
    return rows


def _mean(name: str, values: Any) -> dict[str, Any]:
    mean = {name: round(float(values.mean()), 6)}
    if len(values) == 1 or name in COSTS:
        return mean
    return mean | {f"{name}_ci95": [round(bound, 6) for bound in bootstrap([values], lambda value: value)]}
