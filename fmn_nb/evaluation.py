"""Forgetting measured: UA, IRA, CRA and their harmonic mean, what was lost beside, image quality, attention, cost.

`evaluate` draws every image of the protocol with the base model and with the patch, lets a judge say what each shows,
and counts. The definitions are in `evaluation_measures`, the prompts in `protocol` and `evaluation_probes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.attention_data import NotRecordedError
from fmn_nb.concepts import Concept, PhraseNotFoundError
from fmn_nb.evaluation_attention import attention_by_layer, attention_totals
from fmn_nb.evaluation_checkpoints import CheckpointWorld
from fmn_nb.evaluation_clip import Clip
from fmn_nb.evaluation_cost import cost_of, measured_cost
from fmn_nb.evaluation_images import Progress, draw_images
from fmn_nb.evaluation_measures import (
    JudgeLike,
    Measures,
    harmonic_mean,
    judge_images,
    measure,
    with_ceiling,
)
from fmn_nb.evaluation_neighbours import similarities
from fmn_nb.evaluation_probes import probe_drawings, probe_shares
from fmn_nb.evaluation_report import Report, similar_or_none
from fmn_nb.generation import GUIDANCE, STEPS
from fmn_nb.image_quality import frechet_distance, kernel_distance
from fmn_nb.models import UnsupportedPipelineError, denoiser
from fmn_nb.patches import Patch
from fmn_nb.protocol import Drawing, drawings
from fmn_nb.references import Images
from fmn_nb.worlds import EmojiWorld, NotThereError, world_of

__all__ = ["JudgeLike", "Measures", "Report", "evaluate", "harmonic_mean", "judge_images", "measure"]

JUDGED = ("ua", "ira", "cra", "h", "ceiling")
QUALITY = ("frechet", "kernel", "clip_score")


def evaluate(pipe: DiffusionPipeline, concept: Concept, *, patch: Patch | None = None, seed: int = 0,
             size: str = "quick", judge: JudgeLike | None = None, clip: str | Path | Clip | None = None,
             real: Images | None = None, prompts: str | Path | None = None, cache: str | Path | None = None,
             steps: int = STEPS, guidance: float = GUIDANCE, batch: int | None = None,
             progress: Progress | None = None) -> Report:
    """Measure what the model shows of `concept` and of everything else, before and, with a patch, after.

    Args:
        pipe: the base model; left as it was.
        size: "quick" (about 70 images of the protocol and 24 of the probes for each model) or "full" (every object x
            style prompt at least three times, 72 of the probes).
        judge: tells what images show; by default the emoji world's, or for other models a zero-shot judge made of
            `clip`.
        clip: a CLIPModel (folder or hub id) for the CLIP score, similar concepts and the zero-shot judge; by default
            the emoji world's.
        real: real images, for the distances of a model that isn't of the emoji world: a folder or a list.
        prompts: a folder with prompt lists of your own for such a model, made like `data/prompts`.
        cache: a folder that keeps the drawn images, so that an evaluation that was killed goes on where it was and
            ends in the same table. Damaged or foreign files in it are drawn anew.
        batch: how many images the pipeline draws at once; always exactly so many, for the last bits depend on it.
        progress: called with (images drawn, images in all) of each model.

    Whatever needs weights, images or parts that aren't there is absent, with the reason under `skipped`.

    Raises:
        UnknownConceptError: the emoji world holds no such concept.
        ValueError: an unknown size, or a judge that doesn't judge every image.
        ModelLoadError: `clip` names no readable CLIPModel.
    """
    work = _Evaluation(pipe, concept, seed, size, steps, guidance, batch, cache, progress)
    with measured_cost(denoiser(pipe).device) as cost:
        report = work.run(patch, judge, clip, world_of(pipe) or CheckpointWorld(clip, real, prompts))
    return replace(report, cost=cost_of(patch, cost))


@dataclass
class _Evaluation:
    """One call of `evaluate`."""

    pipe: DiffusionPipeline
    concept: Concept
    seed: int
    size: str
    steps: int
    guidance: float
    batch: int | None
    cache: str | Path | None
    progress: Progress | None

    def run(self, patch: Patch | None, judge: JudgeLike | None, clip: str | Path | Clip | None,
            world: EmojiWorld | CheckpointWorld) -> Report:
        if isinstance(world, EmojiWorld) and clip is not None:
            world.scorer = clip if isinstance(clip, Clip) else Clip.load(clip)
        wanted = drawings(self.concept, self.seed, self.size, world.vocabulary)
        wanted += probe_drawings(self.concept, self.seed, self.size, world.vocabulary)
        try:
            judge = judge or world.judge_for(self.concept)
        except NotThereError as missing:
            return self._without_a_judge(patch, wanted, str(missing))
        images, outcomes, layers, reasons = {}, {}, {}, {}
        for when, change in self._versions(patch):
            with change:
                images[when] = draw_images(self.pipe, wanted, steps=self.steps, guidance=self.guidance,
                                           batch=self.batch, cache=self.cache, progress=self.progress)
                layers[when], reasons[when] = self._attention(wanted)
            seen = judge_images(judge, self.concept, wanted, images[when], world.vocabulary)
            outcomes[when] = seen.assign(when=when)
        similarity, unknown = _similarity(world, self.concept)
        base = measure(outcomes["before"], self.concept, self.seed)
        found = {}
        for when, rows in outcomes.items():
            measures = with_ceiling(measure(rows, self.concept, self.seed), base)
            shares = probe_shares(rows, self.concept, similar_or_none(similarity), world.vocabulary)
            measures = replace(measures, probes=shares).with_skipped(**unknown, **reasons[when])
            found[when] = self._with_quality(measures, wanted, images[when], world)
        by_layer, totals = _joined(layers)
        return Report(self.concept, self.seed, self.size, found["before"], found.get("after"), totals,
                      pd.concat(outcomes.values(), ignore_index=True), images, wanted, by_layer, similarity,
                      vocabulary=world.vocabulary)

    def _versions(self, patch: Patch | None) -> Iterator[tuple[str, AbstractContextManager]]:
        yield "before", nullcontext()
        if patch is not None:
            yield "after", patch.applied(self.pipe)

    def _attention(self, wanted: Sequence[Drawing]) -> tuple[pd.DataFrame | None, dict[str, str]]:
        """The attention on the concept while its prompts are drawn, or the reason why it couldn't be heard."""
        forget = [drawing for drawing in wanted if drawing.role == "forget"]
        try:
            return attention_by_layer(self.pipe, self.concept, forget, self.steps), {}
        except (NotRecordedError, PhraseNotFoundError, UnsupportedPipelineError) as error:
            return None, {"attention": str(error)}

    def _without_a_judge(self, patch: Patch | None, wanted: Sequence[Drawing], reason: str) -> Report:
        """Attention alone: it needs no verdicts."""
        layers, found = {}, {}
        for when, change in self._versions(patch):
            with change:
                layers[when], reasons = self._attention(wanted[:1])
            found[when] = Measures(skipped=dict.fromkeys((*JUDGED, *QUALITY), reason)).with_skipped(**reasons)
        by_layer, totals = _joined(layers)
        return Report(self.concept, self.seed, self.size, found["before"], found.get("after"), totals,
                      attention_layers=by_layer)

    def _with_quality(self, measures: Measures, wanted: Sequence[Drawing], images: Sequence[Image.Image],
                      world: EmojiWorld | CheckpointWorld) -> Measures:
        """Distances to real images and the CLIP score, of the retain set's images."""
        retained = [(d.prompt, image) for d, image in zip(wanted, images, strict=True) if d.role == "retain"]
        prompts, kept = [prompt for prompt, _ in retained], [image for _, image in retained]
        try:
            real, features = world.real_set(self.concept), world.features
            measures = replace(measures, features=features.name, frechet=frechet_distance(features, real, kept),
                               kernel=kernel_distance(features, real, kept, self.seed))
        except NotThereError as missing:
            measures = measures.with_skipped(frechet=str(missing), kernel=str(missing))
        try:
            return replace(measures, clip_score=world.scorer.score(kept, prompts))
        except NotThereError as missing:
            return measures.with_skipped(clip_score=str(missing))


def _joined(layers: dict[str, pd.DataFrame | None]) -> tuple[pd.DataFrame, dict[str, float]]:
    """By layer: words_before, later_before, words_after, later_after; and their means."""
    heard = {when: table for when, table in layers.items() if table is not None}
    totals = {name: value for when, table in heard.items() for name, value in attention_totals(table, when).items()}
    tables = [table.add_suffix(f"_{when}") for when, table in heard.items()]
    return (pd.concat(tables, axis=1) if tables else pd.DataFrame()), totals


def _similarity(world: EmojiWorld | CheckpointWorld, concept: Concept) -> tuple[pd.Series, dict[str, str]]:
    try:
        return similarities(world, concept), {}
    except NotThereError as missing:
        return pd.Series(dtype=float, name="similarity"), {"similar": str(missing), "unrelated": str(missing)}
