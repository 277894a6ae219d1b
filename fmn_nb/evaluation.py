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
from fmn_nb.evaluation_quality import Quality
from fmn_nb.evaluation_report import Report, similar_or_none
from fmn_nb.generation import GUIDANCE, STEPS
from fmn_nb.models import UnsupportedPipelineError, denoiser
from fmn_nb.patches import Patch
from fmn_nb.protocol import Drawing, Vocabulary, drawings
from fmn_nb.references import Images
from fmn_nb.worlds import EmojiWorld, NotThereError, world_of

__all__ = ["JudgeLike", "Measures", "Report", "evaluate", "harmonic_mean", "judge_images", "measure"]

JUDGED = ("ua", "ira", "cra", "h", "ceiling")


def evaluate(pipe: DiffusionPipeline, concept: Concept | str, *, patch: Patch | None = None, seed: int = 0,
             size: str = "quick", judge: JudgeLike | None = None, clip: str | Path | Clip | None = None,
             real: Images | None = None, prompts: str | Path | None = None, cache: str | Path | None = None,
             steps: int = STEPS, guidance: float = GUIDANCE, batch: int | None = None,
             progress: Progress | None = None) -> Report:
    """Measure what the model shows of `concept` and of everything else, before and, with a patch, after.

    Args:
        pipe: the base model; left as it was.
        concept: what is, or was, to be forgotten: a `Concept` or, for an object, its name.
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

    Whatever needs weights, images or parts that aren't there is absent, with the reason under `skipped`. Without a
    judge distances to real images, the CLIP score and attention are left: they need no verdicts. What can't be read
    is named before anything is drawn.

    Raises:
        UnknownConceptError: the emoji world holds no such concept.
        ValueError: neither a concept nor a name, an unknown size, a single real image, or a judge that doesn't judge
            every image.
        ModelLoadError: `clip` names no readable CLIPModel.
        ReferenceImageError: `real` can't be read.
    """
    concept = _concept(concept)
    work = _Evaluation(pipe, concept, seed, size, steps, guidance, batch, cache, progress)
    with measured_cost(denoiser(pipe).device) as cost:
        report = work.run(patch, judge, clip, world_of(pipe) or CheckpointWorld(clip, real, prompts))
    return replace(report, cost=cost_of(patch, cost))


def _concept(given: Concept | str) -> Concept:
    concept = Concept(given) if isinstance(given, str) else given
    if not isinstance(concept, Concept):
        raise ValueError(f"{given!r} is no concept: give one, Concept('noto', kind='style'), or an object's name")
    return concept


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
        quality = Quality.of(world, self.concept)
        try:
            judge = judge or world.judge_for(self.concept)
        except NotThereError as missing:
            return self._without_a_judge(patch, wanted, quality, str(missing), world.vocabulary)
        images, outcomes, layers, reasons = {}, {}, {}, {}
        for when, change in self._versions(patch):
            with change:
                images[when] = self._draw(wanted)
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
            found[when] = quality.added(measures, wanted, images[when], self.seed)
        by_layer, totals = _joined(layers)
        return Report(self.concept, self.seed, self.size, found["before"], found.get("after"), totals,
                      pd.concat(outcomes.values(), ignore_index=True), images, wanted, by_layer, similarity,
                      vocabulary=world.vocabulary)

    def _versions(self, patch: Patch | None) -> Iterator[tuple[str, AbstractContextManager]]:
        yield "before", nullcontext()
        if patch is not None:
            yield "after", patch.applied(self.pipe)

    def _draw(self, wanted: Sequence[Drawing]) -> list[Image.Image]:
        return draw_images(self.pipe, wanted, steps=self.steps, guidance=self.guidance, batch=self.batch,
                           cache=self.cache, progress=self.progress)

    def _attention(self, wanted: Sequence[Drawing]) -> tuple[pd.DataFrame | None, dict[str, str]]:
        """The attention on the concept while its prompts are drawn, or the reason why it couldn't be heard."""
        forget = [drawing for drawing in wanted if drawing.role == "forget"]
        try:
            return attention_by_layer(self.pipe, self.concept, forget, self.steps), {}
        except (NotRecordedError, PhraseNotFoundError, UnsupportedPipelineError) as error:
            return None, {"attention": str(error)}

    def _without_a_judge(self, patch: Patch | None, wanted: Sequence[Drawing], quality: Quality, reason: str,
                         vocabulary: Vocabulary) -> Report:
        """What needs no verdicts: attention, and the retain set's quality where there is something to compare with."""
        retain = [] if quality.nothing else [drawing for drawing in wanted if drawing.role == "retain"]
        layers, found, images = {}, {}, {}
        for when, change in self._versions(patch):
            with change:
                drawn = self._draw(retain) if retain else []
                layers[when], reasons = self._attention(wanted[:1])
            measures = Measures(skipped=dict.fromkeys(JUDGED, reason)).with_skipped(**reasons)
            found[when] = quality.added(measures, retain, drawn, self.seed)
            if drawn:
                images[when] = drawn
        by_layer, totals = _joined(layers)
        return Report(self.concept, self.seed, self.size, found["before"], found.get("after"), totals,
                      images=images, wanted=retain, attention_layers=by_layer, vocabulary=vocabulary)


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
