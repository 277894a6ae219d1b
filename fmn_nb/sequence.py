"""Several concepts forgotten by one model: one after another, by patches made apart, or all at once.

What each way does to the concepts forgotten earlier (does the first come back?), to those still to come (do they go
before anybody asked?), and to everything else, is measured after each stage on the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd
from diffusers import DiffusionPipeline

from fmn_nb.attacks import asked_for, judge_of, seen
from fmn_nb.concepts import Concept
from fmn_nb.denoising import borrowed
from fmn_nb.evaluation_measures import JudgeLike, judge_images
from fmn_nb.evaluation_probes import Share, share_of
from fmn_nb.forgetting import forget
from fmn_nb.forgetting_settings import Settings
from fmn_nb.generation import STEPS, generate
from fmn_nb.patches import Patch
from fmn_nb.protocol import EMOJI, Drawing, Vocabulary, drawings, same_name

WAYS = ("one after another", "apart", "all at once")
OTHERS = "all others"


def forget_several(pipe: DiffusionPipeline, concepts: Sequence[Concept], way: str = "one after another", *,
                   preset: str | Settings = "balanced", seed: int = 0, patches: Sequence[Patch] = (),
                   **overrides: Any) -> list[Patch]:
    """Patches that together forget the concepts; `pipe` stays as it is.

    Args:
        way: "one after another" trains each patch on the model that carries the earlier ones; "apart" trains each on
            the base model (`combine` adds them up); "all at once" trains a single patch.
        patches: those of the first concepts, where they are there already; the rest is made. The first patch is the
            same one after another and apart.
        overrides: single settings of the fine-tune.

    Returns:
        One patch for each concept in their order, or a single one for "all at once".

    Raises:
        ValueError: an unknown way, no concepts, or one twice.
    """
    names = [concept.name for concept in concepts]
    if way not in WAYS or not names or len(set(names)) != len(names):
        raise ValueError(f"give each concept once and a way of {', '.join(WAYS)}, not {names} and {way!r}")
    if way == "all at once":
        return list(patches[:1]) or [forget(pipe, list(concepts), preset=preset, seed=seed, **overrides)]
    made = list(patches[:len(concepts)])
    with ExitStack() as carried:
        for number, concept in enumerate(concepts):
            if number >= len(made):
                made.append(forget(pipe, concept, preset=preset, seed=seed, **overrides))
            if way == "one after another":
                carried.enter_context(made[number].applied(pipe))
    return made


def sequence_table(pipe: DiffusionPipeline, concepts: Sequence[Concept], patches: Sequence[Patch], *, images: int = 12,
                   retain_images: int = 24, seed: int = 0, judge: JudgeLike | None = None, steps: int = STEPS,
                   vocabulary: Vocabulary = EMOJI) -> pd.DataFrame:
    """Apply the patches of `forget_several` one more at each stage, and measure after each.

    Args:
        images: for each concept; the same prompts and seeds at every stage. `retain_images`: of everything else.

    Returns:
        Rows (stage, concept) with `forgotten` (how many concepts are, by then), `state` ("forgotten", "waiting", or
        "retained" for the rows of `all others`), `measure` and its `value` with 95% interval `low`, `high`, and
        `images`. The measures: "ua" for a concept (share of images in which it isn't seen), "label" and "style" for all
        others (share in which what was asked for is seen). Stage 0 is the base model.

    Raises:
        ValueError: patches that are neither one for each concept nor a single one.
        AttackError: no judge.
    """
    if len(patches) not in (1, len(concepts)):
        raise ValueError(f"{len(patches)} patches for {len(concepts)} concepts; give one for each or one for all")
    judge = judge_of(pipe, judge)
    asked = {concept: asked_for(concept, images, seed, vocabulary) for concept in concepts}
    others = kept_drawings(concepts, retain_images, seed, vocabulary)
    options = {"steps": steps, "vocabulary": vocabulary}
    rows: list[dict[str, Any]] = []
    with ExitStack() as carried:
        for stage in range(len(patches) + 1):
            if stage:
                carried.enter_context(patches[stage - 1].applied(pipe))
            forgotten = len(concepts) if stage == len(patches) else stage
            for number, concept in enumerate(concepts):
                share = share_of(~seen(pipe, judge, concept, asked[concept], **options))
                state = "forgotten" if number < forgotten else "waiting"
                rows.append(_row(stage, forgotten, concept.name, state, "ua", share))
            for measure, share in _kept(pipe, judge, concepts[0], others, **options).items():
                rows.append(_row(stage, forgotten, OTHERS, "retained", measure, share))
    return pd.DataFrame(rows)


def forget_in_sequence(pipe: DiffusionPipeline, concepts: Sequence[Concept], way: str = "one after another", *,
                       preset: str | Settings = "balanced", seed: int = 0, **options: Any) -> pd.DataFrame:
    """`forget_several`, then `sequence_table` (which gets `options`)."""
    patches = forget_several(pipe, concepts, way, preset=preset, seed=seed)
    return sequence_table(pipe, concepts, patches, seed=seed, **options)


def kept_drawings(concepts: Sequence[Concept], count: int, seed: int = 0,
                  vocabulary: Vocabulary = EMOJI) -> list[Drawing]:
    """`count` drawings that name none of the concepts, evenly spread over the first one's retain set.

    Raises:
        ValueError: the concepts leave fewer prompts than that.
    """
    def names_one(drawing: Drawing) -> bool:
        said = [name for name in (drawing.label, drawing.style) if name]
        return any(same_name(name, concept) for concept in concepts for name in said)

    free = [d for d in drawings(concepts[0], seed, "quick", vocabulary) if d.role == "retain" and not names_one(d)]
    if len(free) < count:
        raise ValueError(f"only {len(free)} prompts name none of the concepts; ask for so many retain images at most")
    return [free[i * len(free) // count] for i in range(count)]


def rebound(table: pd.DataFrame, concept: str) -> float:
    """How much a concept came back: its UA when it was first forgotten minus its UA at the last stage, in [-1, 1].

    Raises:
        ValueError: the table never forgot it.
    """
    rows = table[(table["concept"] == concept) & (table["state"] == "forgotten")].sort_values("stage")
    if rows.empty:
        raise ValueError(f"'{concept}' was forgotten at no stage; concepts: {', '.join(table['concept'].unique())}")
    return float(rows["value"].iloc[0] - rows["value"].iloc[-1])


def stages(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row for each stage and a column for each concept's UA and for what is kept of all others."""
    wide = table.assign(column=table["concept"] + ", " + table["measure"].str.replace("ua", "UA"))
    order = wide["column"].drop_duplicates()
    return wide.pivot(index="stage", columns="column", values="value")[order].rename_axis(columns=None)


def _kept(pipe: DiffusionPipeline, judge: JudgeLike, concept: Concept, wanted: Sequence[Drawing], *, steps: int,
          vocabulary: Vocabulary) -> dict[str, Share]:
    with borrowed(pipe):
        drawn = generate(pipe, [d.prompt for d in wanted], [d.seed for d in wanted], steps=steps)
    outcomes = judge_images(judge, concept, wanted, drawn, vocabulary)
    styled = outcomes[outcomes["asked_style"].notna()]
    found = {"label": share_of(outcomes["right"])}
    return found | ({"style": share_of(styled["right_style"])} if len(styled) else {})


def _row(stage: int, forgotten: int, concept: str, state: str, measure: str, share: Share) -> dict[str, Any]:
    return {"stage": stage, "forgotten": forgotten, "concept": concept, "state": state, "measure": measure,
            "value": share.value, "low": share.low, "high": share.high, "images": share.images}
