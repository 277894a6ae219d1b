"""The results table of all concepts by one command: `fmn-nb benchmark`.

A job forgets one concept with one preset and one seed (`fmn_nb.runs.measure`). This file says which jobs there are, and
does them; `fmn_nb.runs.tables` makes the tables of their results. Killed at any moment and started again, the command
continues where it was and ends in the same table. A table that is there already can grow: what it holds of the same
model and settings isn't done again.

    WORK/cat-balanced-seed0-HASH.json   one job's result
    OUT/results.csv, results.json       the table, and how it was made, with means and paired differences
    OUT/excess.csv, distances.csv       what attacks find above an oracle's floor, and how far the model is from the
                                        oracle, where there was one
    OUT/*.png                           forgetting against keeping, one point per concept; what each preset costs
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.concepts.concept import Concept
from fmn_nb.concepts.world import Vocabulary
from fmn_nb.evaluation.protocol import REPEATS
from fmn_nb.files import read_json, read_yaml
from fmn_nb.forgetting.settings import PRESETS, Settings, SettingsError, settings_for
from fmn_nb.models.arguments import checked_seed
from fmn_nb.runs.earlier import TABLE_FILE, Earlier
from fmn_nb.runs.means import TUNED_ON
from fmn_nb.runs.parameters import did_you_mean
from fmn_nb.runs.single import single_setting
from fmn_nb.runs.stopping import telling
from fmn_nb.runs.tables import write_results

if TYPE_CHECKING:
    from fmn_nb.runs.measure import Bench

SETTINGS_FILE = "settings.yaml"
EVERYTHING = "all"  # asks for every preset and variant of the settings file
_BASE, _SEEDS = "preset", "seeds"  # in a variant's settings: the preset that it changes, and its only seeds
ONE_WAY = (("attack", "budget"), ("oracle", "compared_with"))  # parts of a result that all rows of a table made alike


class BenchmarkError(RuntimeError):
    """Some jobs failed; the others' results are there."""


# ---- which jobs there are --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One concept, one preset, one seed.

    Attributes:
        towards: for an ambiguous word, the reading to show instead (a correction); otherwise None.
        settings: the preset's settings with the overrides asked for.
        draws: it draws all references and retain images itself, so that its seconds say what the preset costs (jobs of
            the first seed); others take what an earlier job drew. The patch is the same.
    """

    concept: Concept
    towards: str | None
    preset: str
    settings: Settings
    seed: int
    size: str
    draws: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """A file's name for it: "birthday-cake-balanced-seed0"."""
        return f"{self.concept.name.replace(' ', '-')}-{self.preset}-seed{self.seed}"

    @property
    def group(self) -> str:
        """The row's kind in the table: object, style, identity or word (an ambiguous word, corrected)."""
        return "word" if self.towards else self.concept.kind

    key = name  # what a worker knows it by
    heeds_stop = False  # it has nothing to keep, so a worker is ended in the middle of it

    @property
    def out(self) -> Path:
        """The same as a path."""
        return Path(self.name)


def plan_jobs(vocabulary: Vocabulary, concepts: Sequence[str] = (), presets: Sequence[str] = ("balanced", "paper"),
              seeds: Sequence[int] = (0,), size: str = "quick",
              overrides: Mapping[str, Mapping[str, Any]] | None = None) -> list[Job]:
    """All jobs in the order in which they are done: a seed's concepts, each with every preset.

    Args:
        vocabulary: the names of the model's world.
        concepts: names or groups (objects, styles, identities, words); by default all four groups.
        presets: names of presets, or of variants that `overrides` define.
        overrides: preset -> settings to replace (`read_overrides`). An entry that says which "preset" it changes is a
            variant with a name of its own; an entry with "seeds" uses only these of the seeds asked for.

    Raises:
        ValueError: an unknown name, size or seed, or nothing to do; the text lists what there is.
        SettingsError: an unknown preset or setting.
    """
    overrides, seeds = overrides or {}, [checked_seed(seed) for seed in dict.fromkeys(seeds)]
    if not presets:
        raise ValueError("no preset is asked for; name some, or give a settings file that has some for 'all'")
    if size not in REPEATS:
        raise ValueError(f"{size!r} is not a size of evaluation; choose quick or full")
    if unused := [name for name in overrides if name not in presets]:
        raise SettingsError(f"settings for '{unused[0]}', which isn't asked for; presets: {', '.join(presets)}")
    settings = {preset: settings_of(preset, overrides.get(preset, {})) for preset in presets}
    known = _concepts(vocabulary, concepts)
    jobs = [Job(concept, towards, preset, settings[preset], seed, size, draws=seed == seeds[0])
            for seed in seeds for concept, towards in known for preset in settings
            if seed in overrides.get(preset, {}).get(_SEEDS, seeds)]
    if not jobs:
        raise ValueError(f"nothing to do: by their settings, none of the presets uses the seeds {seeds}")
    return jobs


def _concepts(vocabulary: Vocabulary, wanted: Sequence[str]) -> list[tuple[Concept, str | None]]:
    """The wanted concepts, with groups spelled out and each once, ambiguous words with their other reading."""
    groups = {"objects": vocabulary.objects, "styles": vocabulary.styles, "identities": vocabulary.names,
              "words": tuple(vocabulary.readings)}
    kinds = vocabulary.concepts()
    names = list(dict.fromkeys(name for item in wanted or groups for name in groups.get(item, (item,))))
    if unknown := [name for name in names if name not in kinds]:
        raise ValueError(f"the {vocabulary.world} world has no '{unknown[0]}'; groups: {', '.join(groups)}; names: "
                         + ", ".join(name for group in groups.values() for name in group))
    return [(Concept(name, kind=kinds[name]), vocabulary.readings.get(name, (None, None))[1]) for name in names]


def settings_of(name: str, changes: Mapping[str, Any]) -> Settings:
    """The settings of a preset or variant, from what `read_overrides` says of it."""
    if not isinstance(seeds := changes.get(_SEEDS, ()), (list, tuple)):
        raise SettingsError(f"the seeds of '{name}' are a list, [0, 1], not {seeds!r}")
    return settings_for(changes.get(_BASE, name),
                        {key: value for key, value in changes.items() if key not in (_BASE, _SEEDS)})


def read_overrides(file: Path | None, single: Sequence[str] = (),
                   presets: Sequence[str] = tuple(PRESETS)) -> dict[str, dict[str, Any]]:
    """Settings to replace, preset -> name -> value, from a YAML or JSON file and from texts "preset.name=value".

    The file may hold more presets than are asked for (["all"] asks for everything in it); the texts, which override the
    file, may not. Settings under another name are a variant of the preset that they name:

        tuned_on: [cat]       # concepts that the settings were chosen on (`tuned_on`)
        paper:
          learning_rate: 1e-4
        paper-words:
          preset: paper
          positions: [words]
          seeds: [0]          # whatever seeds are asked for, it uses only this one

    Raises:
        SettingsError: the file or a text isn't of this shape, names an unknown preset, or gives a variant a name that
            is no word (results are filed under it).
    """
    content = (read_yaml(file) or {}) if file is not None else {}
    tuned = content.pop(TUNED_ON, []) if isinstance(content, dict) else None
    if not isinstance(tuned, list) or not all(isinstance(settings, dict) for settings in content.values()):
        raise SettingsError(f"{file} must hold presets, each with its settings (paper: {{learning_rate: 1.0e-4}}), and "
                            f"perhaps {TUNED_ON}: [concepts]")
    for name, settings in content.items():
        preset = settings.get(_BASE, name)
        if str(preset) not in PRESETS:
            raise SettingsError(f"no preset '{preset}'; there are {', '.join(PRESETS)}")
        if not re.fullmatch(r"[\w.-]+", str(name)) or name == EVERYTHING or (name in PRESETS and preset != name):
            raise SettingsError(f"'{name}' can't name a variant of '{preset}': use letters, digits, '.', '-' and '_', "
                                f"but not {EVERYTHING} or another preset's name")
    if list(presets) != [EVERYTHING]:
        content = {preset: settings for preset, settings in content.items() if preset in presets}
    content = {preset: dict(settings) for preset, settings in content.items()}  # a YAML alias is the same dict
    for text in single:
        said, value = single_setting(text)
        preset, dot, name = said.rpartition(".")
        if not (preset and name):
            raise SettingsError(f"a setting is given as preset.name=value, not '{text}'")
        content.setdefault(preset, {})[name] = value
    return content


def tuned_on(file: Path | None, vocabulary: Vocabulary | None = None) -> list[str]:
    """The concepts that a settings file says its settings were chosen on; none if it says nothing.

    Raises:
        SettingsError: one that the vocabulary, if there is one, doesn't have: it would count in means by mistake.
    """
    chosen = list((read_yaml(file) or {}).get(TUNED_ON, ())) if file is not None else []
    if vocabulary is not None and (unknown := [one for one in chosen if one not in vocabulary.concepts()]):
        raise SettingsError(f"{file} says {TUNED_ON} '{unknown[0]}', which the {vocabulary.world} world doesn't have"
                            f"{did_you_mean(unknown[0], vocabulary.concepts())}")
    return chosen


# ---- doing them ------------------------------------------------------------------------------------------------------


def run_benchmark(bench: Bench, jobs: Sequence[Job], out: Path, *, made: Mapping[str, Any], limit: int | None = None,
                  workers: int = 1, log: Callable[[str], None] = print) -> Path:
    """Do the jobs that are not done yet, at most `limit`, and write the table of all done jobs; returns its file. Rows
    that a table there has of other jobs stay (`_others`).

    Args:
        out: the folder of the table, the figures and the record of how they were made.
        made: what goes into results.json, such as the command and the concepts of `tuned_on`.
        workers: how many jobs run at a time and share the cores; a single one runs in this process.
        log: gets a line for each job.

    Raises:
        BenchmarkError: some jobs failed (after the others were done and the table written); the next start tries them
            again. Also if nothing at all is done.
        Stopped: a KeyboardInterrupt came; what is done is kept.
    """
    from fmn_nb.runs.executors import executed

    earlier, failures = _earlier(bench, jobs, out), []
    kept, others = _kept(bench, jobs, earlier), _others(bench, jobs, earlier, out)

    def finished() -> str:
        return f"{len(jobs) - len(left_of(bench, jobs, kept))} of {len(jobs)} jobs finished; the same command continues"

    stored = {job: one for job in jobs if (one := _fuller(bench.stored(job), kept.get(job))) is not None}
    todo = [job for job in jobs if job not in stored][:limit]
    waiting = _waiting(bench, jobs, kept, earlier)
    _check_one_way(others | waiting | stored | {job: bench.ends_in(job) for job in todo})
    if said := _what_goes(out, earlier, [*jobs, *others]):
        log(said)
    log("\n".join(schedule(bench, jobs, workers, limit, kept)))
    with telling(finished):
        ended = (executed(todo, bench.attempt, workers) if min(workers, len(todo)) > 1
                 else ((job, bench.attempt(job)) for job in todo))
        with closing(ended):
            for number, (job, error) in enumerate(ended, 1):
                failures += [f"{job.name}: {error}"] if error else []
                said = f"{job.name}: FAILED: {error}" if error else _described(job, bench.stored(job))
                log(f"[{number}/{len(todo)}] {said}")
        done = {job: result for job in jobs if (result := _fuller(bench.stored(job), kept.get(job))) is not None}
        waiting = {job: result for job, result in waiting.items() if job not in done}  # to be done anew, another time
        if not done:
            raise BenchmarkError("no job is done, so there is no table\n  " + "\n  ".join(failures))
        missing = [job.name for job in jobs if job not in done]
        now = _earlier(bench, jobs, out)  # another command may have ended meanwhile
        others |= _others(bench, jobs, now, out)
        told = {name: lines for name, lines in (("missing", missing), ("failed", failures)) if lines}
        said = {**made, **(_of_others(now or earlier, made) if others else {}), **identity_of(bench)}
        table = write_results(out, others | waiting | done, said, told)
    if failures:
        raise BenchmarkError(f"{len(failures)} of {len(todo)} jobs failed; start again to try them once more:\n  "
                             + "\n  ".join(failures))
    return table


def _fuller(stored: dict[str, Any] | None, kept: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of two results of one job the one with more measured beside it, in doubt the stored one; None if there is
    neither."""
    known = [one for one in (stored, kept) if one is not None]
    return max(known, key=lambda one: len({"attack", "oracle"} & set(one)), default=None)


def _check_one_way(found: Mapping[Job, Mapping[str, Any]]) -> None:
    """Raise a BenchmarkError if results of one table were attacked with several budgets or stand beside several
    oracles: their means would mix these."""
    for name, key in ONE_WAY:
        ways = {json.dumps(result[name][key], sort_keys=True): job for job, result in found.items() if name in result}
        if len(ways) > 1:
            (one, first), (other, second) = list(ways.items())[:2]
            raise BenchmarkError(f"{first.name} has the {name} {one} and {second.name} {other}: one table can't hold "
                                 f"both; ask for one of them with --{name} (for the same --attack-seeds), or give "
                                 "another --work and --out")


def _what_goes(out: Path, earlier: Earlier | None, jobs: Sequence[Job]) -> str:
    """Which rows of the table in `out` will be replaced or go, in words; "" for none."""
    if earlier is None:
        return (f"{out / TABLE_FILE} is of another model, judge or size, or made in another way: it will be replaced"
                if (out / TABLE_FILE).is_file() else "")
    places = {(job.concept.name, job.preset, job.seed) for job in jobs if earlier.result(job) is not None}
    presets = sorted({preset for concept, preset, seed in set(earlier.rows) - places})
    return f"rows of other settings go from {out / TABLE_FILE}: {', '.join(presets)}" if presets else ""


def _of_others(earlier: Earlier, made: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json also says where rows of other commands stay: these commands, and what was tuned on."""
    commands = [one for one in earlier.commands if one != made.get("command")]
    tuned = dict.fromkeys([*earlier.made.get(TUNED_ON, ()), *made.get(TUNED_ON, ())])
    return {"earlier_commands": commands, TUNED_ON: list(tuned)}


def identity_of(bench: Bench) -> dict[str, Any]:
    """What results.json says of the model, the judge and the ways of measuring: rows of others aren't comparable."""
    from fmn_nb.runs.measure import ALGORITHM

    return {"model": bench.model, "algorithm": ALGORITHM, **bench.shared}


def kept_rows(bench: Bench, jobs: Sequence[Job], out: Path) -> dict[Job, dict[str, Any]]:
    """Job -> its result as the table in `out` has it, if that was made in the same way, and the job with the same
    settings and attacks (`Earlier.result`)."""
    return _kept(bench, jobs, _earlier(bench, jobs, out))


def _kept(bench: Bench, jobs: Sequence[Job], earlier: Earlier | None) -> dict[Job, dict[str, Any]]:
    if earlier is None:
        return {}
    found = {job: result for job in jobs if (result := earlier.result(job)) is not None}
    return {job: result for job, result in found.items() if bench.ends_as_asked(
        job, result.get("attack", {}).get("budget"), result.get("oracle", {}).get("compared_with"))}


def _others(bench: Bench, jobs: Sequence[Job], earlier: Earlier | None, out: Path) -> dict[Job, dict[str, Any]]:
    """Job -> its result, of those in the earlier table in `out` that aren't asked for: they stay in it. Those of a
    preset that is asked for with other settings don't.

    Raises:
        BenchmarkError: they were attacked with another budget or stand beside another oracle than asked for, so one
            table can't hold both.
    """
    if earlier is None:
        return {}
    asked, settings = {job.name for job in jobs}, {job.preset: job.settings for job in jobs}
    found: dict[Job, dict[str, Any]] = {}
    for concept, preset, seed in earlier.rows:
        (known, towards), = _concepts(bench.session.vocabulary, [concept])
        job = Job(known, towards, preset, settings.get(preset) or Settings(**earlier.made["settings"][preset]), seed,
                  jobs[0].size)
        if job.name not in asked and (result := earlier.result(job)) is not None:
            found[job] = result
    for job, result in found.items():
        for name, key in _otherwise(bench, result):
            raise BenchmarkError(f"{job.name} in {out / TABLE_FILE} has another {name} ({result[name][key]}); give "
                                 "another --out, or ask for that row, too")
    return found


def _otherwise(bench: Bench, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a result has from another budget or beside another oracle than asked for: `ONE_WAY`'s entries."""
    asked = {"attack": asdict(bench.attack) if bench.attack else None,
             "oracle": bench.compared_with if bench.oracles else None}
    return [(name, key) for name, key in ONE_WAY if asked[name] and name in result and result[name][key] != asked[name]]


def _waiting(bench: Bench, jobs: Sequence[Job], kept: Collection[Job], earlier: Earlier | None,
             ) -> dict[Job, dict[str, Any]]:
    """Job -> its earlier result, of those that are asked for and lack a measure: they stay until that is made."""
    if earlier is None:
        return {}
    return {job: result for job in jobs if job not in kept and (result := earlier.result(job)) is not None
            and not _otherwise(bench, result)}


def _earlier(bench: Bench, jobs: Sequence[Job], out: Path) -> Earlier | None:
    return Earlier.read(out, identity_of(bench), jobs[0].size)


def left_of(bench: Bench, jobs: Sequence[Job], kept: Mapping[Job, Any] | None = None) -> list[Job]:
    """The jobs that are neither in the work folder nor in the table of before."""
    return [job for job in jobs if job not in (kept or {}) and bench.stored(job) is None]


def schedule(bench: Bench, jobs: Sequence[Job], workers: int = 1, limit: int | None = None,
             kept: Mapping[Job, Any] | None = None) -> list[str]:
    """What there is to do and how long it will take, judging by done jobs of the same presets in the work folder.

    It has a line for each preset and one for all.
    """
    from fmn_nb.runs.progress import readable_time

    left, lines, whole = left_of(bench, jobs, kept), [], 0.0
    todo = left[:limit]
    for preset, count in Counter(job.preset for job in todo).items():
        results = [read_json(file) for file in bench.work.glob(f"*-{preset}-seed*.json")]
        seconds = [result["seconds"] for result in results if "seconds" in result]
        each = sum(seconds) / len(seconds) if seconds else math.nan
        lines.append(f"{preset}: {count} to do, " + (f"{each:.0f} s each" if seconds else "not timed yet"))
        whole += count * each / workers
    about = f", about {readable_time(whole)}" if whole and not math.isnan(whole) else ""
    return [*lines, f"{len(jobs)} jobs, {len(jobs) - len(left)} done before, {len(todo)} to do now{about}"]


def _described(job: Job, result: Mapping[str, Any]) -> str:
    """One line on a finished job."""
    after, cost = result["after"], result["forgetting"]
    text = (f"{job.name}: UA {after['ua']:.2f}  IRA {after['ira']:.2f}  CRA {after['cra']:.2f}  H {after['h']:.2f} "
            f"of {after['ceiling']:.2f}  {cost['seconds']:.0f} s")
    if overshadowed := result.get("overshadowed"):
        text += f"  '{job.towards}' {overshadowed['before']['value']:.2f} to {overshadowed['after']['value']:.2f}"
    return text + (f"  attack {result['attack']['success']:.2f}" if "attack" in result else "")
