"""Forgetting measured: UA, IRA, CRA and their harmonic mean, what else was lost, image quality, attention, cost.

`evaluate` draws every image of the protocol with the base model and with the patch, lets a judge say what each shows,
and counts. The definitions are in `measures`, the prompts in `protocol`; a `Session` draws and asks the judge.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import pandas as pd
from diffusers import DiffusionPipeline

from fmn_nb.attention import (
    AttentionBudgetError,
    MissedLayersError,
    NotRecordedError,
    UnknownArchitectureError,
    record_attention,
)
from fmn_nb.concepts import Concept, JudgeLike, NotThereError, PhraseNotFoundError, world_of
from fmn_nb.evaluation.checkpoints import CheckpointWorld
from fmn_nb.evaluation.clip import Clip, similar_names, similarities
from fmn_nb.evaluation.measures import Measures, check_measurable, judge_images, measure, with_ceiling
from fmn_nb.evaluation.oracle import OracleReport
from fmn_nb.evaluation.protocol import Drawing, drawings, probe_drawings, probe_shares
from fmn_nb.evaluation.quality import Quality
from fmn_nb.evaluation.report import Report
from fmn_nb.evaluation.session import Progress, Sampling, Session
from fmn_nb.models import (
    GUIDANCE,
    STEPS,
    Cost,
    Images,
    UnsupportedPipelineError,
    denoiser,
    generate,
    load_images,
    measured_cost,
)
from fmn_nb.models.arguments import checked_seed, finite_number, whole_number
from fmn_nb.patches import Patch

#: what compares with an oracle; attacks are a floor above evaluation, so it is found by its name, like a world
COMPARISON = "fmn_nb.attacks.floor", "compared"
JUDGED = ("ua", "ira", "cra", "h", "ceiling")


def evaluate(pipe: DiffusionPipeline, concept: Concept | str, *, patch: Patch | str | Path | None = None, seed: int = 0,
             size: str = "quick", judge: JudgeLike | None = None, clip: str | Path | Clip | None = None,
             real: Images | None = None, prompts: str | Path | None = None, cache: str | Path | None = None,
             steps: int = STEPS, guidance: float = GUIDANCE, batch: int | None = None,
             progress: Progress | None = None,
             oracle: DiffusionPipeline | Sequence[DiffusionPipeline] | None = None) -> Report:
    """Measure what the model shows of `concept` and of everything else, before and, with a patch, after.

    Args:
        pipe: the base model; left as it was.
        concept: what to forget, or what was forgotten: a `Concept` or, for an object, its name.
        patch: what makes the model forget: a `Patch` or the folder of one.
        size: "quick" (about 70 images of the protocol and 24 of the probes for each model) or "full" (every object x
            style prompt at least three times, 72 of the probes).
        judge: tells what images show; by default the emoji world's, or for other models a zero-shot judge made of
            `clip`.
        clip: a CLIPModel (folder or hub id) for the CLIP score, similar concepts and the zero-shot judge; by default
            the emoji world's.
        real: real images, for the distances of a model that isn't of the emoji world: a folder or a list.
        prompts: a folder with prompt lists of your own for such a model, made like `data/prompts`.
        cache: a folder that keeps the drawn images, so that a killed evaluation continues where it was and ends in the
            same table. Images of damaged or foreign files are drawn anew.
        batch: how many images the pipeline draws at once; always exactly this many, since the last bits depend on it.
        progress: called with (images drawn, images in all) for each model.
        oracle: a model that was never taught the concept, or several: adds `Report.oracle`, what attacks achieve on it
            (the floor) and on the forgetting model, and how far apart the two are. That takes many times as long as
            the evaluation itself; a `cache` keeps what belongs to the oracle and the unchanged model.

    Whatever needs missing weights, images or parts is absent, with the reason under `skipped`. Without a judge, only
    distances to real images, the CLIP score and attention remain: they need no verdicts. What can't be read is named
    before anything is drawn.

    Raises:
        UnknownConceptError: the emoji world holds no such concept.
        ValueError: neither a concept nor a name, an unknown size, a single real image, or a judge that doesn't judge
            every image.
        ModelLoadError: `clip` names no readable CLIPModel.
        ReferenceImageError: `real` can't be read.
    """
    concept, seed = Concept(concept) if isinstance(concept, str) else concept, checked_seed(seed)
    if not isinstance(concept, Concept):
        raise ValueError(f"{concept!r} is not a concept: give one, Concept('noto', kind='style'), or an object's name")
    steps, guidance = whole_number("steps", steps, 1), finite_number("guidance", guidance, 0)
    batch = None if batch is None else whole_number("batch", batch, 1)
    patch = patch if patch is None or isinstance(patch, Patch) else Patch.load(patch)
    real = None if real is None else load_images(real)
    world = world_of(pipe)
    if world is not None and (real is not None or prompts is not None):
        raise ValueError(f"this model belongs to the {world.vocabulary.world} world, which has real images and prompts "
                         f"of its own: leave out {'real' if real is not None else 'prompts'}")
    if world is None:
        world = CheckpointWorld(clip, real, prompts)
    elif clip is not None:
        world = copy(world)  # the process's other sessions share it
        world.scorer = clip if isinstance(clip, Clip) else Clip.load(clip)
    sampling = Sampling(steps, guidance, batch, cache, progress)
    oracles = [] if oracle is None else [oracle] if isinstance(oracle, DiffusionPipeline) else list(oracle)
    if wrong := [one for one in oracles if not isinstance(one, DiffusionPipeline)]:
        raise ValueError(f"an oracle is a pipeline, not {wrong[0]!r}; load it with fmn.load")
    session = Session(pipe, world, judge, sampling)
    with measured_cost(denoiser(pipe).device) as cost:
        report = _evaluated(session, concept, patch, seed, size)
        if oracles:
            report = replace(report, oracle=_comparison()(session, concept, patch, oracles, seed, size))
    return replace(report, cost=cost_of(patch, cost))


def _comparison() -> Callable[..., OracleReport]:
    module, name = COMPARISON
    return getattr(importlib.import_module(module), name)


def _evaluated(session: Session, concept: Concept, patch: Patch | None, seed: int, size: str) -> Report:
    """Draw, judge and count with the base model, and with the patch if there is one.

    Without a judge, measure only what needs no verdicts: attention on one prompt, and the retain set's quality if there
    is something to compare it with.
    """
    session.check_fits(patch)
    vocabulary = session.vocabulary
    wanted = [*drawings(concept, vocabulary, seed, size), *probe_drawings(concept, vocabulary, seed, size)]
    asked = [drawing for drawing in wanted if drawing.role == "forget"]
    quality, unknown = Quality.of(session.world, concept), {}
    try:
        judge, nobody = session.judge_for(concept), ""
    except NotThereError as missing:
        judge, nobody, asked = None, str(missing), asked[:1]
        comparable = quality.features is not None or quality.scorer is not None
        wanted = [drawing for drawing in wanted if comparable and drawing.role == "retain"]
    similarity, similar = pd.Series(dtype=float, name="similarity"), None
    if judge:
        check_measurable(wanted, concept)
        try:
            similarity = similarities(session.world, concept)
            similar = similar_names(similarity) if len(similarity) else None
        except NotThereError as missing:
            unknown = {"similar": str(missing), "unrelated": str(missing)}
    images, outcomes, layers, totals, found = {}, [], [], {}, {}
    for when, change in ({"before": None} | ({} if patch is None else {"after": patch})).items():
        with session.patched(change):
            drawn, reasons = session.draw(wanted) if wanted else [], {}
            try:
                heard = attention_by_layer(session.pipe, concept, asked, session.sampling)
                layers.append(heard.add_suffix(f"_{when}"))
                totals |= {f"mass_{when}": float(heard["words"].mean()), f"later_{when}": float(heard["later"].mean())}
            except NOT_HEARD as error:
                reasons = {"attention": str(error)}
        if judge:
            rows = judge_images(judge, concept, wanted, drawn, vocabulary)
            outcomes.append(rows.assign(when=when))
            measures = measure(rows, concept, seed)
            shares = probe_shares(rows, concept, vocabulary, similar)
            measures = replace(with_ceiling(measures, found.get("before", measures)), probes=shares)
        else:
            measures = Measures(skipped=dict.fromkeys(JUDGED, nobody))
        skipped = {**measures.skipped, **unknown, **reasons, **quality.reasons}
        found[when] = replace(measures, **quality.figures(wanted, drawn, seed), skipped=skipped)
        if drawn:
            images[when] = drawn
    return Report(concept, seed, size, found["before"], found.get("after"), totals,
                  pd.concat(outcomes, ignore_index=True) if outcomes else pd.DataFrame(), images, wanted,
                  pd.concat(layers, axis=1) if layers else pd.DataFrame(), similarity, vocabulary=vocabulary)


#: why attention can't be measured: a reason to skip it, not to lose the images
NOT_HEARD = (AttentionBudgetError, MissedLayersError, NotRecordedError, PhraseNotFoundError, UnknownArchitectureError,
             UnsupportedPipelineError)
MOST_PROMPTS = 4
LATER = ("later", "first_eot", "padding")


def attention_by_layer(pipe: DiffusionPipeline, concept: Concept, wanted: Sequence[Drawing],
                       sampling: Sampling) -> pd.DataFrame:
    """The share of cross-attention that goes to the concept's words and to the positions after them, in [0, 1].

    Index: layer; columns: "words", "later" (words after the concept, end of text, padding). It is the mean over pixels,
    heads, steps and the first four different prompts among the drawings.
    """
    chosen, tables = list({d.prompt: d for d in wanted}.values())[:MOST_PROMPTS], []
    for one in chosen:  # one at a time and without heads: all layers of a large model take gigabytes otherwise
        with record_attention(pipe, heads="mean", branch="cond", keep="mean") as attention:
            generate(pipe, [one.prompt], [one.seed], steps=sampling.steps, guidance=sampling.guidance)
        tables.append(pd.DataFrame.from_dict({layer: {
            name: sum(attention.mass(concept, part=part, layer=layer) for part in parts)
            for name, parts in {"words": ("words",), "later": LATER}.items()} for layer in attention.layers},
            orient="index"))
    return (sum(tables) / len(tables)).rename_axis("layer")


def cost_of(patch: Patch | None, evaluation: Cost) -> dict[str, float | int]:
    """The cost section of metrics.json: what the patch's fine-tune reported, its bytes, and the evaluation's own."""
    found: dict[str, float | int] = {}
    if patch is not None:
        said = patch.info.get("forgetting", {})
        found = {f"forgetting_{name}": said[name] for name in ("seconds", "peak_memory_bytes") if name in said}
        found["patch_bytes"] = patch.nbytes
    return found | {"evaluation_seconds": round(evaluation.seconds, 3),
                    "evaluation_peak_memory_bytes": evaluation.peak_memory_bytes}
