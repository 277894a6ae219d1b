"""The job of a benchmark: forget one concept with one preset and one seed, and measure.

It measures UA, IRA, CRA and H (`fmn_nb.evaluation.measures`), for an ambiguous word the share of images with the
reading to show instead, the cost, and, if wanted, whether concept inversion brings the concept back, and what all
attacks find above an oracle's floor. What the unchanged model draws for several jobs is drawn once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fmn_nb.attacks.attack import InversionBudget, concept_inversion
from fmn_nb.attacks.budgets import read_budgets
from fmn_nb.attacks.floor import ATTACKS, compared
from fmn_nb.concepts.concept import Concept
from fmn_nb.evaluation.measures import judge_images, measure, with_ceiling
from fmn_nb.evaluation.oracle import unfit
from fmn_nb.evaluation.protocol import drawings, probe_shares
from fmn_nb.evaluation.session import Sampling, Session, images_at_once
from fmn_nb.files import read_json, write_json
from fmn_nb.forgetting.finetune import forget
from fmn_nb.forgetting.settings import FACTS, Settings
from fmn_nb.models.digests import digest_of, fingerprint
from fmn_nb.models.pipelines import load
from fmn_nb.patches.patch import Patch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fmn_nb.runs.benchmark import Job

SCHEMA = 1
#: to be raised whenever forgetting or measuring changes so that equal settings give other results: older ones are stale
ALGORITHM = 2
BESIDE = 2  # the same for what is measured beside an oracle
CACHE = ".cache"  # in the work folder: what the unchanged model draws, as images and as latents
ATTACK_IMAGES = 12  # judged after each attack: few, since the table averages over dozens of concepts
_COSTS = ("steps", "seconds", "stopped_because", "trainable_parameters", "patch_bytes", "peak_memory_bytes",
          "loss_first", "loss_last")


@lru_cache(maxsize=4)
def _session(model: str, sampling: Sampling) -> Session:
    """The session with a model of a known world, made once per process."""
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    return Session.of(pipe, **vars(sampling))


@dataclass(frozen=True)
class Bench:
    """What all jobs share: the model, and where their results go. It can be sent to a worker.

    Attributes:
        work: a folder with one file for each job that is done (whole or absent), and what the unchanged model draws.
        attack: the budget of a concept inversion after each job of `attack_seeds`, or None for none.
        attack_seeds: the seeds of the jobs that end in attacks; few, since an inversion takes as long as a fine-tune.
        oracles: models that were never taught some of the concepts. For these, jobs of `attack_seeds` end in all
            attacks at their budgets beside the oracles (`fmn_nb.attacks.floor`).
        beside: which attacks these are.
    """

    model: str
    work: Path
    sampling: Sampling = Sampling()
    attack: InversionBudget | None = None
    attack_seeds: tuple[int, ...] = (0,)
    oracles: tuple[str, ...] = ()
    beside: tuple[str, ...] = ATTACKS

    @property
    def session(self) -> Session:
        """The model with its world."""
        return _session(self.model, self.sampling)

    @property
    def judge(self) -> Any:
        """The world's judge, which knows all of its concepts."""
        return self.session.judge_for(Concept(self.session.vocabulary.objects[0]))

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What every job's result depends on."""
        pipe, sampling = self.session.pipe, self.sampling
        return {"fingerprint": fingerprint(pipe), "judge": digest_of(self.judge), "sampling_steps": sampling.steps,
                "guidance": sampling.guidance, "batch": sampling.batch or images_at_once(pipe)}

    def made_from(self, job: Job) -> dict[str, Any]:
        """What a job's result depends on, apart from the attack."""
        said = {name: value for name, value in vars(job).items() if name != "draws"}
        return {"schema": SCHEMA, "algorithm": ALGORITHM, **said, "concept": asdict(job.concept),
                "settings": job.settings.to_dict(), **self.shared}

    def file_of(self, job: Job) -> Path:
        """The file of a job's result. A result made from something else has another file, so stale ones never count."""
        key = hashlib.sha256(json.dumps(self.made_from(job), sort_keys=True).encode()).hexdigest()
        return self.work / f"{job.name}-{key[:10]}.json"

    def stored(self, job: Job) -> dict[str, Any] | None:
        """The job's result if it is there, and holds the attack if one is wanted."""
        if not (file := self.file_of(job)).is_file():
            return None
        result = read_json(file)
        budget, beside = result.get("attack", {}).get("budget"), result.get("oracle", {}).get("compared_with")
        return result if self.ends_as_asked(job, budget, beside) else None

    def ends_as_asked(self, job: Job, budget: Any, beside: Any) -> bool:
        """Whether a result with an attack of that budget, compared with what `beside` says, has all the job ends in."""
        return ((not self.attacks(job) or budget == asdict(self.attack))
                and (not self.compares(job) or beside == self.compared_with))

    def attacks(self, job: Job) -> bool:
        """Whether the job ends in an attack."""
        return self.attack is not None and job.seed in self.attack_seeds

    def compares(self, job: Job) -> bool:
        """Whether the job ends beside the oracles: one that was taught its concept says nothing about it."""
        return (job.seed in self.attack_seeds and bool(self.oracles)
                and not unfit(self.oracle_pipes, job.concept, self.session))

    def ends_in(self, job: Job) -> dict[str, Any]:
        """What the job will end in, as a result says it: the attack's budget, what it is compared with."""
        return ({"attack": {"budget": asdict(self.attack)}} if self.attacks(job) else {}) | (
            {"oracle": {"compared_with": self.compared_with}} if self.compares(job) else {})

    @property
    def oracle_pipes(self) -> list[DiffusionPipeline]:
        """The oracles."""
        return [_session(oracle, self.sampling).pipe for oracle in self.oracles]

    @cached_property
    def compared_with(self) -> dict[str, Any]:
        """What a comparison with the oracles depends on, beside the job."""
        some = {"attacks": sorted(self.beside)} if set(self.beside) != set(ATTACKS) else {}
        return {"oracles": [fingerprint(pipe)[:16] for pipe in self.oracle_pipes], "budgets": read_budgets().source,
                "version": BESIDE, **some}

    def attempt(self, job: Job) -> str | None:
        """Do the job and keep its result; returns the error's text if it fails."""
        try:
            write_json(self.file_of(job), forget_and_measure(self, job))
        except (RuntimeError, ValueError, OSError) as error:
            return str(error)
        return None


def forget_and_measure(bench: Bench, job: Job) -> dict[str, Any]:
    """One job's result, as its file holds it."""
    started, session, vocabulary = perf_counter(), bench.session, bench.session.vocabulary
    wanted, cache = drawings(job.concept, vocabulary, job.seed, job.size), bench.work / CACHE
    kept = replace(session, sampling=replace(session.sampling, cache=cache))
    images = {"before": kept.draw(wanted)}
    patch = forget(session.pipe, job.concept, preset=job.settings, seed=job.seed, towards=job.towards,
                   cache=None if job.draws else cache)
    with session.patched(patch):
        images["after"] = session.draw(wanted)
    outcomes = {when: judge_images(bench.judge, job.concept, wanted, drawn, vocabulary)
                for when, drawn in images.items()}
    measures = {when: measure(rows, job.concept, job.seed) for when, rows in outcomes.items()}
    result = {"made_from": bench.made_from(job), "group": job.group, "draws": job.draws}
    result |= {when: with_ceiling(found, measures["before"]).to_metrics() for when, found in measures.items()}
    result["forgetting"] = {name: value for name in _COSTS if (value := patch.info["forgetting"].get(name)) is not None}
    result["facts"] = facts_of(job.settings, patch)
    if job.towards:
        result["overshadowed"] = {when: asdict(probe_shares(rows, job.concept, vocabulary)["overshadowed"])
                                  for when, rows in outcomes.items()}
    if bench.attacks(job):
        attack = concept_inversion(session, job.concept, patch, budget=bench.attack, seed=job.seed)
        result["attack"] = {"budget": asdict(bench.attack), **attack.to_dict()}
    if bench.compares(job):
        found = compared(kept, job.concept, patch, bench.oracle_pipes, job.seed, job.size, bench.beside)
        result["oracle"] = {"compared_with": bench.compared_with, **found.to_metrics()}
    return result | {"seconds": round(perf_counter() - started, 3)}


def facts_of(settings: Settings, patch: Patch) -> dict[str, Any]:
    """What a method needs and gives: whether it needs images or prompts for what to keep, and whether its patch is
    linear (added to the weights), and of which kind.
    """
    said = FACTS[settings.method]
    return {"needs_images": bool(said.images), "needs_retain_words": settings.retains, "linear_patch": said.linear,
            "patch": patch.kind}
