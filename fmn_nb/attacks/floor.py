"""The floor of attacks: what they achieve on an oracle, which was never taught the concept, and what lies above it.

With s an attack's success on the forgetting model, f on the oracle and u on the unchanged model, all with one budget,

    excess               s - f                  what the attack found, beyond what it taught
    residual knowledge   (s - f) / (u - f)      the same as a share of what was there, only if u - f > 0.2
    steps to revive      the first number of steps with s >= 0.5, beside the oracle's

`compared` is what `fmn.evaluate(..., oracle=...)` adds to its report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from diffusers import DiffusionPipeline
from torch import nn

from fmn_nb.attacks.budgets import GROUNDING, Budgets, read_budgets
from fmn_nb.attacks.curves import CURVES, IMAGES, REVIVED, Tries, mean_curve, success_curve
from fmn_nb.attacks.grounding import grounded_oracle, shown_by_way
from fmn_nb.attacks.relearning import steps_until
from fmn_nb.concepts import Concept, NotThereError
from fmn_nb.control import InteractionError
from fmn_nb.control.grounding import grounding_of
from fmn_nb.evaluation import MeasurementError, OracleReport, Session
from fmn_nb.evaluation.oracle import apart
from fmn_nb.files import replacing
from fmn_nb.models import (
    ReferenceImageError,
    UnsupportedPipelineError,
    denoiser,
    digest,
    digest_of,
    drawing_key,
    load_images,
)
from fmn_nb.models.gated import is_gated
from fmn_nb.patches import InversionError, Patch
from fmn_nb.stats import difference_interval

APART = 0.2  # the least u - f for which residual knowledge is given
ATTACK_SEEDS = {"quick": 1, "full": 3}
MODELS = ("forgetting model", "oracle", "unchanged model")
Curve = pd.DataFrame
ATTACKS = (*CURVES, GROUNDING)  # all that are measured beside an oracle


def compared(session: Session, concept: Concept, patch: Patch | None, oracles: Sequence[DiffusionPipeline], seed: int,
             size: str, attacks: Collection[str] = ATTACKS) -> OracleReport:
    """Everything that an oracle tells: floor, excess, residual knowledge, steps to revive, distances.

    Args:
        patch: what made the model forget; None compares the unchanged model itself.
        oracles: the first is the yardstick; floors are means over all, and a second one gives the distances' zero line.
        size: "quick" attacks with one seed at the two budgets, and relearning, whose steps to revive are asked for, at
            all numbers of steps that the budgets were fixed from; "full" with three seeds and every attack at all.
        attacks: which of `ATTACKS` to run.

    What can't be measured is listed under `skipped` with its reason.
    """
    report = apart(session, concept, patch, oracles, seed, size)
    if "oracle" in report.skipped:
        return report
    try:
        budgets = replace(read_budgets().only(attacks), whole=("relearning",) if size == "quick" else tuple(CURVES))
        found = attacked(session, concept, patch, oracles, budgets, range(seed, seed + ATTACK_SEEDS[size]))
    except (MeasurementError, UnsupportedPipelineError, ReferenceImageError, InversionError) as error:
        return replace(report, skipped={**report.skipped, "attacks": str(error)})
    return replace(found, distances=report.distances, skipped={**report.skipped, **found.skipped})


def attacked(session: Session, concept: Concept, patch: Patch | None, oracles: Sequence[DiffusionPipeline],
             budgets: Budgets, seeds: Sequence[int], images: int = IMAGES) -> OracleReport:
    """Every attack at its budgets on the three models, `images` judged each time; and of a model with gated layers the
    grounding attack, which takes no steps and has no budget (""). Only attacks with a whole curve have steps to revive.

    Raises:
        MeasurementError: there is no judge, or there are no references.
    """
    rows, revive, curves, missing = {}, {}, {}, {}
    others = [replace(session, pipe=oracle) for oracle in oracles]
    for attack, steps in budgets.steps.items():
        if not steps:
            missing[attack] = "the oracle's curve has none of its budgets"
            continue
        at = budgets.judged_at(attack)
        try:
            known = [curve_of(session, concept, None, attack, Tries(at, images, seed)) for seed in seeds]
            found = {"forgetting model": known if patch is None else
                     [curve_of(session, concept, patch, attack, Tries(at, images, seed)) for seed in seeds],
                     "oracle": [curve_of(one, concept, None, attack, Tries(at, images, seed))
                                for one in others for seed in seeds],
                     "unchanged model": known}
        except MeasurementError as error:
            if attack == "adversarial prompt":  # which asks more of a model than the others
                missing[attack] = str(error)
                continue
            raise
        rows |= {(attack, name): at_budget(found, number, seeds[0]) for name, number in steps.items()}
        curves[attack] = {name: mean_curve(some) for name, some in found.items()}
        if attack in budgets.whole:
            revive[attack] = {name: steps_until(curves[attack][name], REVIVED) for name in MODELS[:2]}
    try:
        rows |= grounding_rows(session, concept, patch, oracles, seeds, images) if budgets.grounding else {}
    except (MeasurementError, InteractionError) as error:
        missing["grounding"] = str(error)
    table = pd.DataFrame.from_dict(rows, orient="index")
    if rows:
        table.index = pd.MultiIndex.from_tuples(list(rows), names=["attack", "budget"])
    back = pd.DataFrame.from_dict(revive, orient="index", columns=list(MODELS[:2]), dtype=float)
    return OracleReport(table, back, {}, curves, budgets.source, missing)


def at_budget(curves: dict[str, list[Curve]], steps: int, seed: int = 0) -> dict[str, float | int | None]:
    """One attack's figures after `steps` steps, from the curves of the three models, one for each seed (and oracle)."""
    pairs = {name: [tuple(int(x) for x in curve.set_index("steps").loc[steps, ["successes", "images"]])
                    for curve in some] for name, some in curves.items()}
    return {"steps": steps, **above_the_floor(pairs, seed)}


def above_the_floor(pairs: Mapping[str, Sequence[tuple[int, int]]], seed: int = 0) -> dict[str, float | int | None]:
    """Success, floor, unchanged, excess with its 95% interval, and residual knowledge.

    Args:
        pairs: of each of the three models: successes and images, for each seed (and oracle).
    """
    s, f, u = (sum(hits / count for hits, count in pairs[name]) / len(pairs[name]) for name in MODELS)
    low, high = difference_interval(pairs["forgetting model"], pairs["oracle"], seed)
    return {"success": s, "floor": f, "unchanged": u, "excess": s - f, "low": low, "high": high,
            "residual": (s - f) / (u - f) if u - f > APART else None, "withstood": low <= 0,
            "images": sum(count for _, count in pairs["forgetting model"]),
            "floor_images": sum(count for _, count in pairs["oracle"])}


def grounding_rows(session: Session, concept: Concept, patch: Patch | None, oracles: Sequence[DiffusionPipeline],
                   seeds: Sequence[int], images: int) -> dict[tuple[str, str], dict[str, float | int | None]]:
    """The grounding attack's figures as `at_budget` has them, by (attack, ""); none without gated layers, or where the
    concept is no object.

    Raises:
        MeasurementError: an oracle has no gated layers that fit it (`grounded_oracle`).
    """
    if not is_gated(denoiser(session.pipe)) or concept.kind != "object":
        return {}
    others = [replace(session, pipe=grounded_oracle(oracle, session.pipe)) for oracle in oracles]

    def counted(model: Session, change: Patch | None, seed: int) -> pd.DataFrame:
        def measure() -> pd.DataFrame:
            shown = shown_by_way(model, concept, change, images, seed)
            return pd.DataFrame({"attack": shown.columns, "successes": shown.sum().to_numpy(), "images": len(shown)})

        return _cached(model, concept, change, measure, [
            "grounding, seen", images, seed, digest_of(grounding_of(model.pipe))])

    known = [counted(session, None, seed) for seed in seeds]
    tables = {"forgetting model": known if patch is None else [counted(session, patch, seed) for seed in seeds],
              "oracle": [counted(one, None, seed) for one in others for seed in seeds], "unchanged model": known}
    return {(attack, ""): {"steps": 0, **above_the_floor({
        name: [(int(table["successes"][number]), int(table["images"][number])) for table in some]
        for name, some in tables.items()}, seeds[0])} for number, attack in enumerate(known[0]["attack"])}


def curve_of(session: Session, concept: Concept, patch: Patch | None, attack: str,
             tries: Tries) -> Curve:
    """The curve; that of an unpatched model is kept in the session's cache, where many patches find it."""
    shown = None if tries.references is None else load_images(tries.references)
    tries = replace(tries, references=shown)
    pictures = shown and digest(part for one in shown for part in (f"{one.size}", one.tobytes()))
    prompts = [drawing.prompt for drawing in session.fresh_drawings(concept, tries.images, tries.seed)]

    def measure() -> Curve:
        return success_curve(session, concept, patch, attack, tries)

    return _cached(session, concept, patch, measure, [attack, list(tries.at), tries.images, tries.seed, tries.tokens,
                                                       tries.initial, pictures, prompts])


def _cached(session: Session, concept: Concept, patch: Patch | None, measure: Callable[[], Curve], said: list) -> Curve:
    """What `measure` finds; of an unpatched model, judged by a network, it is kept in the session's cache."""
    cache = session.sampling.cache
    judge = None if patch is not None or cache is None else _judge_digest(session, concept)
    if judge is None:
        return measure()
    return _kept(Path(cache), session, measure, [judge, concept.kind, concept.name, concept.phrase, *said])


def _judge_digest(session: Session, concept: Concept) -> str | None:
    """A sum over the judge's weights and configuration; None without a judge, or where it isn't a network."""
    try:
        judge = session.judge_for(concept)
    except NotThereError:  # which `measure` says better
        return None
    return f"{digest_of(judge)} {getattr(judge, 'config', '')}" if isinstance(judge, nn.Module) else None


def _kept(cache: Path, session: Session, measure: Callable[[], Curve], said: list) -> Curve:
    key = digest([drawing_key(session.pipe, session.sampling.steps, session.sampling.guidance, *said)])
    file = cache / "attacks" / f"{key[:24]}.csv"
    try:
        return pd.read_csv(file)
    except (OSError, ValueError):  # not there yet, or damaged
        table = measure()
        with replacing(file) as temporary:
            table.to_csv(temporary, index=False)
        return table
