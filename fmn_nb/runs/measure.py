"""The job of a benchmark: forget one concept with one preset and one seed, and measure.

Measured are UA, IRA, CRA and H (`fmn_nb.evaluation.measures`), for an ambiguous word the share of images with the
reading that is to show instead, what it cost, and, where wanted, whether concept inversion brings the concept back.
What the unchanged model draws for several jobs is drawn once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.attacks.attack import InversionBudget, concept_inversion
from fmn_nb.concepts.concept import Concept
from fmn_nb.evaluation.measures import judge_images, measure, with_ceiling
from fmn_nb.evaluation.protocol import drawings, probe_shares
from fmn_nb.evaluation.session import Session, images_at_once
from fmn_nb.files import read_json, write_json
from fmn_nb.forgetting.finetune import forget
from fmn_nb.models.digests import digest_of, fingerprint
from fmn_nb.models.pipelines import load

if TYPE_CHECKING:
    from fmn_nb.runs.benchmark import Job

SCHEMA = 1
#: to be raised whenever forgetting or measuring changes so that equal settings give other results: older ones are stale
ALGORITHM = 2
CACHE = ".cache"  # in the work folder: images of the unchanged model
ATTACK_IMAGES = 12  # judged after each attack: few, since the table averages over dozens of concepts
_COSTS = ("steps", "seconds", "stopped_because", "trainable_parameters", "patch_bytes", "peak_memory_bytes",
          "loss_first", "loss_last")


@dataclass(frozen=True)
class Bench:
    """What all jobs share: the session with the model, and where their results lie.

    Attributes:
        work: a folder with one file for each job that is done (whole or absent), and what the unchanged model draws.
        attack: the budget of a concept inversion after each job of `attack_seed`, or None for none: an inversion takes
            as long as a fine-tune, so one seed has to do.
    """

    session: Session
    model: str
    work: Path
    attack: InversionBudget | None = None
    attack_seed: int = 0

    @classmethod
    def of(cls, model: str, work: Path, attack: InversionBudget | None = None, attack_seed: int = 0,
           **sampling: Any) -> Bench:
        """A bench for a model of a known world, by its name; `sampling` as in `Sampling`."""
        pipe = load(model)
        pipe.set_progress_bar_config(disable=True)
        return cls(Session.of(pipe, **sampling), model, work, attack, attack_seed)

    @cached_property
    def judge(self) -> Any:
        """The world's judge, which knows all of its concepts."""
        return self.session.judge_for(Concept(self.session.vocabulary.objects[0]))

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What every job's result depends on."""
        pipe, sampling = self.session.pipe, self.session.sampling
        return {"fingerprint": fingerprint(pipe), "judge": digest_of(self.judge), "sampling_steps": sampling.steps,
                "guidance": sampling.guidance, "batch": sampling.batch or images_at_once(pipe)}

    def made_from(self, job: Job) -> dict[str, Any]:
        """What a job's result depends on, attack apart."""
        return {"schema": SCHEMA, "algorithm": ALGORITHM, **vars(job), "concept": asdict(job.concept),
                "settings": job.settings.to_dict(), **self.shared}

    def file_of(self, job: Job) -> Path:
        """Where a job's result stands. One made from something else has another file, so a stale one never counts."""
        key = hashlib.sha256(json.dumps(self.made_from(job), sort_keys=True).encode()).hexdigest()
        return self.work / f"{job.name}-{key[:10]}.json"

    def stored(self, job: Job) -> dict[str, Any] | None:
        """The job's result if it is there, and holds the attack where one is wanted."""
        if not (file := self.file_of(job)).is_file():
            return None
        result = read_json(file)
        attacked = not self.attacks(job) or result.get("attack", {}).get("budget") == asdict(self.attack)
        return result if attacked else None

    def attacks(self, job: Job) -> bool:
        """Whether the job ends in an attack."""
        return self.attack is not None and job.seed == self.attack_seed

    def do(self, job: Job) -> dict[str, Any]:
        """Do the job, keep its result, and return it."""
        result = forget_and_measure(self, job)
        write_json(self.file_of(job), result)
        return result


def forget_and_measure(bench: Bench, job: Job) -> dict[str, Any]:
    """One job's result, as its file holds it."""
    session, vocabulary = bench.session, bench.session.vocabulary
    wanted = drawings(job.concept, vocabulary, job.seed, job.size)
    images = {"before": replace(session, sampling=replace(session.sampling, cache=bench.work / CACHE)).draw(wanted)}
    patch = forget(session.pipe, job.concept, preset=job.settings, seed=job.seed, towards=job.towards)
    with session.patched(patch):
        images["after"] = session.draw(wanted)
    outcomes = {when: judge_images(bench.judge, job.concept, wanted, drawn, vocabulary)
                for when, drawn in images.items()}
    measures = {when: measure(rows, job.concept, job.seed) for when, rows in outcomes.items()}
    result = {"made_from": bench.made_from(job), "group": job.group}
    result |= {when: with_ceiling(found, measures["before"]).to_metrics() for when, found in measures.items()}
    result["forgetting"] = {name: value for name in _COSTS if (value := patch.info["forgetting"].get(name)) is not None}
    if job.towards:
        result["overshadowed"] = {when: asdict(probe_shares(rows, job.concept, vocabulary)["overshadowed"])
                                  for when, rows in outcomes.items()}
    if bench.attacks(job):
        attack = concept_inversion(session, job.concept, patch, budget=bench.attack, seed=job.seed)
        result["attack"] = {"budget": asdict(bench.attack), **attack.to_dict()}
    return result
