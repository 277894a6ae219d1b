"""The results table of all concepts by one command: `fmn-nb benchmark`.

Each job forgets one concept with one preset and measures UA, IRA, CRA and H (`fmn_nb.evaluation_measures`), for an
ambiguous word the share of images with the reading that is to show instead, what it cost, and, where wanted, whether
concept inversion brings the concept back. A job's result is one file that is whole or absent: killed at any moment and
started again, the command goes on where it stood and ends in the same table.

    OUT/runs/cat-balanced-seed0.json    one job
    OUT/base.json                       what the judge says of the base model's drawings
    OUT/results.csv, results.json       the table, and how it was made
    OUT/forgetting-against-keeping.png  every concept a point
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fmn_nb.attacks import InversionBudget, concept_inversion
from fmn_nb.benchmark_base import BaseVerdicts, outcomes_of
from fmn_nb.benchmark_plan import Job
from fmn_nb.benchmark_table import describe, how_made, table_of
from fmn_nb.digests import digest_of
from fmn_nb.evaluation_images import draw_images, images_at_once
from fmn_nb.evaluation_measures import JudgeLike, judge_images, measure, with_ceiling
from fmn_nb.evaluation_probes import probe_shares
from fmn_nb.files import read_json, replacing, write_json, write_text
from fmn_nb.forgetting import forget
from fmn_nb.generation import GUIDANCE, STEPS
from fmn_nb.models import fingerprint, load
from fmn_nb.patches import Patch
from fmn_nb.plots_benchmark import forgetting_against_keeping
from fmn_nb.protocol import drawings
from fmn_nb.worlds import world_of

RUNS, BASE_FILE = "runs", "base.json"
TABLE_FILE, RESULTS_FILE, FIGURE_FILE = "results.csv", "results.json", "forgetting-against-keeping.png"
SCHEMA = 1
ATTACK_IMAGES = 12  # judged after each attack: few, since the table averages over dozens of concepts
_COSTS = ("steps", "seconds", "stopped_because", "trainable_parameters", "patch_bytes", "peak_memory_bytes",
          "loss_first", "loss_last")


class BenchmarkError(RuntimeError):
    """Some jobs failed; the others' results are there."""


@dataclass(frozen=True)
class Bench:
    """What all jobs share: the model, its judge, where results go, and how images are sampled.

    Attributes:
        attack: the budget of a concept inversion after each job of `attack_seed`, or None for none.
        shared: what every job's result depends on.
    """

    pipe: DiffusionPipeline
    judge: JudgeLike
    out: Path
    model: str
    steps: int = STEPS
    guidance: float = GUIDANCE
    attack: InversionBudget | None = None
    attack_seed: int = 0
    shared: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, out: Path, **options: Any) -> Bench:
        """A bench for a model of the emoji world by its name.

        Raises:
            ValueError: the model isn't of the emoji world, so that nobody judges its images.
        """
        pipe = load(model)
        pipe.set_progress_bar_config(disable=True)
        world = world_of(pipe)
        if world is None:
            raise ValueError(f"the benchmark's judge knows the emoji world only; '{model}' is another model")
        bench = cls(pipe, world.judge, out, model, **options)
        bench.shared.update(fingerprint=fingerprint(pipe), judge=digest_of(world.judge), sampling_steps=bench.steps,
                            guidance=bench.guidance, batch=images_at_once(pipe))
        return bench

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `draw_images`: with batches of one size an image doesn't depend on what else is drawn."""
        return {"steps": self.steps, "guidance": self.guidance}

    def file_of(self, job: Job) -> Path:
        """Where a job's result stands."""
        return self.out / RUNS / f"{job.name}.json"

    def made_from(self, job: Job) -> dict[str, Any]:
        """What a job's result depends on, attack apart."""
        return {**job.made_from(), **self.shared}

    def stored(self, job: Job) -> dict[str, Any] | None:
        """The job's result if it is there, made from the same, and holds the attack where one is wanted."""
        if not (file := self.file_of(job)).is_file():
            return None
        result = read_json(file)
        same = result.get("schema") == SCHEMA and result.get("made_from") == self.made_from(job)
        attacked = not self.attacks(job) or result.get("attack", {}).get("budget") == asdict(self.attack)
        return result if same and attacked else None

    def attacks(self, job: Job) -> bool:
        """Whether the job ends in an attack: an inversion takes as long as a fine-tune, so one seed has to do."""
        return self.attack is not None and job.seed == self.attack_seed


def run_benchmark(bench: Bench, jobs: Sequence[Job], *, command: str, limit: int | None = None,
                  note: str = "", log: Callable[[str], None] = print) -> Path:
    """Do what is not done yet, at most `limit` jobs, and write the table of all that is done; returns its file.

    Args:
        command: what made the results, as written into them. `note` goes there too, such as how settings were tuned.
        log: told a line for each job.

    Raises:
        BenchmarkError: some jobs failed (after the others were done and the table written); they are tried again
            when started again. Also when nothing at all is done.
    """
    base = BaseVerdicts(bench.out / BASE_FILE, dict(bench.shared))
    open_jobs = [job for job in jobs if bench.stored(job) is None]
    todo, failures = open_jobs[:limit], []
    log(f"{len(jobs)} jobs, {len(jobs) - len(open_jobs)} done before, {len(todo)} to do now")
    for number, job in enumerate(todo, 1):
        try:
            result = do_job(bench, job, base)
        except (RuntimeError, ValueError) as error:
            failures.append(f"{job.name}: {error}")
            log(f"[{number}/{len(todo)}] {job.name}: FAILED: {error}")
            continue
        write_json(bench.file_of(job), result)
        log(f"[{number}/{len(todo)}] {describe(job, result)}")
    table = write_results(bench, jobs, command, note, failures)
    if failures:
        raise BenchmarkError(f"{len(failures)} of {len(todo)} jobs failed; start again to try them once more:\n  "
                             + "\n  ".join(failures))
    return table


def do_job(bench: Bench, job: Job, base: BaseVerdicts) -> dict[str, Any]:
    """One job's result, as its file holds it."""
    wanted = drawings(job.concept, job.seed, job.size)
    before = outcomes_of(base.of(bench.pipe, bench.judge, wanted, **bench.sampling), job.concept, wanted)
    patch = forget(bench.pipe, job.concept, preset=job.settings, seed=job.seed, towards=job.towards)
    with patch.applied(bench.pipe):
        images = draw_images(bench.pipe, wanted, **bench.sampling)
    outcomes = {"before": before, "after": judge_images(bench.judge, job.concept, wanted, images)}
    measures = {when: measure(rows, job.concept, job.seed) for when, rows in outcomes.items()}
    result = {"schema": SCHEMA, "made_from": bench.made_from(job), "group": job.group}
    result |= {when: with_ceiling(found, measures["before"]).to_metrics() for when, found in measures.items()}
    result["forgetting"] = {name: value for name in _COSTS if (value := patch.info["forgetting"].get(name)) is not None}
    if job.towards:
        result["overshadowed"] = {when: asdict(probe_shares(rows, job.concept)["overshadowed"])
                                  for when, rows in outcomes.items()}
    return result | (_attacked(bench, job, patch) if bench.attacks(job) else {})


def _attacked(bench: Bench, job: Job, patch: Patch) -> dict[str, Any]:
    attack = concept_inversion(bench.pipe, job.concept, patch, budget=bench.attack, seed=job.seed, judge=bench.judge)
    return {"attack": {"budget": asdict(bench.attack), **attack.to_dict()}}


def write_results(bench: Bench, jobs: Sequence[Job], command: str, note: str, failures: Sequence[str]) -> Path:
    """The table of the jobs that are done as CSV, how it was made as JSON, and the figure."""
    found = {job: result for job in jobs if (result := bench.stored(job)) is not None}
    if not found:
        raise BenchmarkError("no job is done, so there is no table\n  " + "\n  ".join(failures))
    table = table_of(found)
    write_text(bench.out / TABLE_FILE, table.to_csv(index=False, lineterminator="\n"))
    made = {"command": command, "model": bench.model, **bench.shared, **({"note": note} if note else {})}
    missing = [job.name for job in jobs if job not in found]
    write_json(bench.out / RESULTS_FILE, how_made(made, found, table, missing, failures))
    figure = forgetting_against_keeping(table)
    with replacing(bench.out / FIGURE_FILE) as temporary:
        figure.savefig(temporary, format="png", metadata={"Description": figure.words})
    return bench.out / TABLE_FILE
