"""How a forgetting model compares with an oracle, and how far apart the two are.

An oracle is a model that was never taught the concept. Attacks succeed on it, too, at a rate called the *floor*:
textual inversion and fine-tuning teach new things, so not all that they bring back was remembered.
`fmn_nb.attacks.floor` measures the attacks; the distances are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.concepts import Concept, NotThereError, untaught_of
from fmn_nb.evaluation.protocol import Drawing, drawings
from fmn_nb.evaluation.quality import kernel_distance
from fmn_nb.evaluation.session import Session
from fmn_nb.models import (
    Noising,
    ReferenceImageError,
    Stream,
    UnsupportedPipelineError,
    conditions,
    denoiser,
    denoising_loss,
    encode,
    seeded,
    spread_batch,
)
from fmn_nb.patches import Patch

NOISES = 4  # of each image
_AT_ONCE = 64  # rows through the denoiser
NO_ORACLE = "no oracle was given: evaluate(..., oracle=PIPE) with a model that was never taught the concept"


@dataclass(frozen=True)
class Distance:
    """One distance of the forgetting model to the oracle.

    Attributes:
        value: the distance. unchanged: that of the unchanged model to the oracle. zero: that of a second oracle to it;
            without one it is 0, which is only the distance of two equal models.
        second: whether there was a second oracle.
    """

    value: float
    unchanged: float
    zero: float = 0.0
    second: bool = False

    @property
    def scaled(self) -> float | None:
        """The distance on a scale with oracle to oracle at 0 and the unchanged model at 1; None if these coincide."""
        width = self.unchanged - self.zero
        return (self.value - self.zero) / width if width > 0 else None


@dataclass(frozen=True, eq=False)
class OracleReport:
    """What the comparison with an oracle found; empty, with the reason, if there is none.

    Attributes:
        attacks: a row for each attack and budget: steps, success (of the forgetting model), floor, unchanged, excess
            with its 95% interval, residual.
        revive: for each attack the first number of steps, of those tried, after which at least half of the images show
            the concept: for the forgetting model and for the oracle; NaN for none.
        distances: name -> distance.
        curves: attack -> model -> steps and shares.
        budgets: where the budgets come from, in words.
        skipped: what could not be measured, with the reason.
    """

    attacks: pd.DataFrame = field(default_factory=pd.DataFrame)
    revive: pd.DataFrame = field(default_factory=pd.DataFrame)
    distances: dict[str, Distance] = field(default_factory=dict)
    curves: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict, repr=False)
    budgets: str = ""
    skipped: dict[str, str] = field(default_factory=dict)

    def distance_table(self) -> pd.DataFrame:
        """Distances as rows: the value, that of the unchanged model and of a second oracle, and the scaled value."""
        rows = {name: {"value": d.value, "unchanged": d.unchanged, "second oracle": d.zero if d.second else None,
                       "scaled": d.scaled} for name, d in self.distances.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("distance")

    def to_metrics(self) -> dict[str, Any]:
        """The section oracle of metrics.json, without what is unknown."""
        found: dict[str, Any] = {}
        if len(self.attacks):
            rows = self.attacks.reset_index().to_dict("records")
            found["attacks"] = [{name: value for name, value in row.items() if not pd.isna(value)} for row in rows]
            found["steps_to_revive"] = {attack: {name: int(steps) for name, steps in row.items() if not pd.isna(steps)}
                                        for attack, row in self.revive.to_dict("index").items()}
            found["budgets"] = self.budgets
        if self.distances:
            found["distance"] = {name: asdict(d) | ({} if d.scaled is None else {"scaled": d.scaled})
                                 for name, d in self.distances.items()}
        return found | ({"skipped": dict(self.skipped)} if self.skipped else {})


def no_oracle() -> OracleReport:
    """The report without an oracle."""
    return OracleReport(skipped={"oracle": NO_ORACLE})


def unfit(oracles: Sequence[DiffusionPipeline], concept: Concept, session: Session) -> str:
    """Why one of the models isn't an oracle of the session's model for the concept: it is of another kind, or says that
    it was taught the concept; "" if all are."""
    kind = type(denoiser(session.pipe))
    if other := next((one for one in oracles if type(denoiser(one)) is not kind), None):
        return (f"an oracle is the same kind of model: this one has a {kind.__name__}, the oracle a "
                f"{type(denoiser(other)).__name__}")
    own = {concept.name, session.vocabulary.target_label(concept)}
    for names in filter(None, map(untaught_of, oracles)):
        if not own & set(names):
            return f"the oracle was taught {concept.name!r}; it never learned {', '.join(names)}"
    return ""


# ---- distances ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One model, and what it draws for the concept's prompts."""

    session: Session
    patch: Patch | None
    images: Sequence[Image.Image]


def side(session: Session, patch: Patch | None, wanted: Sequence[Drawing]) -> Side:
    """A model's side of the comparison: it draws the drawings."""
    with session.patched(patch):
        return Side(session, patch, session.draw(wanted))


def apart(session: Session, concept: Concept, patch: Patch | None, oracles: Sequence[DiffusionPipeline], seed: int,
          size: str) -> OracleReport:
    """How far the model with the patch is from the oracles on the concept's prompts, as far as it can be measured."""
    if reason := unfit(oracles, concept, session):
        return OracleReport(skipped={"oracle": reason})
    wanted = [drawing for drawing in drawings(concept, session.vocabulary, seed, size) if drawing.role == "forget"]
    try:
        unchanged = side(session, None, wanted)
        model = unchanged if patch is None else side(session, patch, wanted)
        others = [side(replace(session, pipe=oracle), None, wanted) for oracle in oracles]
        found, skipped = distances(model, unchanged, others, wanted, seed)
    except (UnsupportedPipelineError, ReferenceImageError) as error:
        return OracleReport(skipped={"distance": str(error)})
    return OracleReport(distances=found, skipped=skipped)


def distances(model: Side, unchanged: Side, oracles: Sequence[Side], wanted: Sequence[Drawing], seed: int,
              ) -> tuple[dict[str, Distance], dict[str, str]]:
    """The distances to the first oracle, and why one couldn't be measured.

    "denoising": how much worse each model explains the other's images, both ways (`loss_difference`); "kernel": the
    kernel distance of their images on the world's features. A second oracle gives the zero line.
    """
    first, more = oracles[0], oracles[1:2]

    def of(measure: Any) -> Distance:
        zero = {"zero": measure(more[0], first), "second": True} if more else {}
        base = measure(unchanged, first)
        return Distance(base if model is unchanged else measure(model, first), base, **zero)

    prompts = [drawing.prompt for drawing in wanted]
    found, skipped = {"denoising": of(lambda a, b: loss_difference(a, b, prompts, seed))}, {}
    try:
        features = model.session.world.features
        found["kernel"] = of(lambda a, b: kernel_distance(features, b.images, a.images, seed))
    except NotThereError as missing:
        skipped["kernel distance"] = str(missing)
    return found, skipped


def loss_difference(one: Side, other: Side, prompts: Sequence[str], seed: int) -> float:
    """How much larger the denoising loss of one model's images is under the other model: the mean of both directions.

    With L_m(x) the loss of m on image x, its noise and timesteps, the same for both models,

        1/2 ( mean over one's images of L_other - L_one  +  mean over the other's images of L_one - L_other ),

    0 for one and the same model. A loss is a bound of a likelihood (Ho et al., arXiv 2006.11239), so this estimates the
    symmetric Kullback-Leibler divergence, up to the weights of timesteps.
    """
    towards = mean_loss(other, one.images, prompts, seed) - mean_loss(one, one.images, prompts, seed)
    back = mean_loss(one, other.images, prompts, seed) - mean_loss(other, other.images, prompts, seed)
    return (towards + back) / 2


@torch.no_grad()
def mean_loss(model: Side, images: Sequence[Image.Image], prompts: Sequence[str], seed: int) -> float:
    """The mean denoising loss of images under their prompts, each with `NOISES` noises at timesteps spread over all."""
    pipe, generator = model.session.pipe, seeded(seed, Stream.DISTANCE)
    noising = Noising(pipe)
    batch, index = spread_batch(noising, encode(pipe, images), NOISES, generator)
    with model.session.patched(model.patch):
        given, losses = conditions(pipe, list(prompts)), []
        for rows in torch.arange(len(index)).split(_AT_ONCE):
            losses.append(denoising_loss(denoiser(pipe), noising, batch.rows(rows), given, index[rows], True).cpu())
    return float(torch.cat(losses).mean())
