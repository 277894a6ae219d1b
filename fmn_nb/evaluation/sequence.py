"""Several concepts forgotten by one model: one after another, by patches made apart, or all at once.

After each stage, the same prompts and seeds measure what each way does to the concepts forgotten earlier (does the
first come back?), to those still to come (do they go before anybody asked?), and to everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict

import pandas as pd
from diffusers import DiffusionPipeline

from fmn_nb.concepts import Concept, Vocabulary, same_name
from fmn_nb.evaluation.protocol import Drawing, drawings, evenly, share_of
from fmn_nb.evaluation.session import Session
from fmn_nb.patches import Patch

OTHERS, FORGOTTEN = "all others", "all forgotten"


def sequence_table(pipe: DiffusionPipeline | Session, concepts: Sequence[Concept], patches: Sequence[Patch], *,
                   images: int = 12, retain_images: int = 24, seed: int = 0) -> pd.DataFrame:
    """Apply one more patch of `forget_several` at each stage, and measure after each.

    Args:
        pipe: the base model, or a session with a judge or sampling of its own.
        images: images for each concept, with the same prompts and seeds at every stage. `retain_images`: images of
            everything else.

    Returns:
        Rows (stage, concept) with `forgotten` (how many concepts are forgotten by then), `state` ("forgotten",
        "waiting", or "retained" for the rows of `all others`), `measure` and its `value` with 95% interval `low`,
        `high`, and `images`. The measures are "ua" for a concept (share of images in which it isn't seen), and "label"
        and "style" for all others (share in which what was asked for is seen). Stage 0 is the base model.

    Raises:
        ValueError: patches that are neither one for each concept nor a single one.
        MeasurementError: nobody judges.
    """
    if len(patches) not in (1, len(concepts)):
        raise ValueError(f"{len(patches)} patches for {len(concepts)} concepts; give one for each or one for all")
    session = Session.of(pipe)
    asked = {concept: session.fresh_drawings(concept, images, seed) for concept in concepts}
    others = kept_drawings(concepts, session.vocabulary, retain_images, seed)
    rows = []
    with ExitStack() as carried:
        for stage in range(len(patches) + 1):
            if stage:
                carried.enter_context(patches[stage - 1].applied(session.pipe))
            forgotten = len(concepts) if stage == len(patches) else stage
            place = {"stage": stage, "forgotten": forgotten}
            for number, concept in enumerate(concepts):
                share = share_of(~session.seen(concept, asked[concept]))
                state = "forgotten" if number < forgotten else "waiting"
                rows.append({**place, "concept": concept.name, "state": state, "measure": "ua", **asdict(share)})
            rows += _kept(session, concepts[0], others, place)
    return pd.DataFrame(rows)


def together_table(pipe: DiffusionPipeline | Session, concepts: Sequence[Concept], patches: Mapping[int, Patch], *,
                   images: int = 12, retain_images: int = 24, seed: int = 0) -> pd.DataFrame:
    """What patches that forget the first few concepts at once do, each alone on the base model.

    Args:
        patches: how many of the concepts a patch forgets -> the patch.
        images: images of the forgotten concepts together, divided among them (at least one each), so that each UA rests
            on about as many images, whatever their number.
            `retain_images`: images for prompts that name none of the concepts, the same for every patch.

    Returns:
        Rows as in `sequence_table`, a stage for each patch, with the number that it forgets; UA is that of `all
        forgotten`.

    Raises:
        ValueError: a patch for no concept, or for more than there are.
        MeasurementError: nobody judges.
    """
    if not patches or not set(patches) <= set(range(1, len(concepts) + 1)):
        raise ValueError(f"patches for {sorted(patches)} of {len(concepts)} concepts; give them for 1 to "
                         f"{len(concepts)}")
    session, rows = Session.of(pipe), []
    others = kept_drawings(concepts, session.vocabulary, retain_images, seed)
    for count, patch in sorted(patches.items()):
        place = {"stage": count, "forgotten": count}
        with patch.applied(session.pipe):
            gone = pd.concat([~session.seen(concept, session.fresh_drawings(concept, max(1, images // count), seed))
                              for concept in concepts[:count]])
            rows.append({**place, "concept": FORGOTTEN, "state": "forgotten", "measure": "ua",
                         **asdict(share_of(gone))})
            rows += _kept(session, concepts[0], others, place)
    return pd.DataFrame(rows)


def _kept(session: Session, concept: Concept, others: Sequence[Drawing], place: Mapping[str, int]) -> list[dict]:
    """Rows for all others: how often the label and the style that were asked for are seen."""
    outcomes = session.judged(concept, others)
    right = {"label": outcomes["right"], "style": outcomes.loc[outcomes["asked_style"].notna(), "right_style"]}
    return [{**place, "concept": OTHERS, "state": "retained", "measure": measure, **asdict(share_of(values))}
            for measure, values in right.items() if measure == "label" or len(values)]


def kept_drawings(concepts: Sequence[Concept], vocabulary: Vocabulary, count: int, seed: int = 0) -> list[Drawing]:
    """`count` drawings that name none of the concepts, evenly spread over the first one's retain set.

    Raises:
        ValueError: the concepts leave fewer prompts than that.
    """
    def names_one(drawing: Drawing) -> bool:
        said = [name for name in (drawing.label, drawing.style) if name]
        return any(same_name(name, concept) for concept in concepts for name in said)

    free = [d for d in drawings(concepts[0], vocabulary, seed) if d.role == "retain" and not names_one(d)]
    if len(free) < count:
        raise ValueError(f"only {len(free)} prompts name none of the concepts; ask for at most as many retain images")
    return evenly(free, count)


def rebound(table: pd.DataFrame, concept: str) -> float:
    """How much a concept came back: its UA when it was first forgotten minus its UA at the last stage, in [-1, 1].

    Raises:
        ValueError: the table never forgot it.
    """
    rows = table[(table["concept"] == concept) & (table["state"] == "forgotten")].sort_values("stage")
    if rows.empty:
        raise ValueError(f"'{concept}' was never forgotten; concepts: {', '.join(table['concept'].unique())}")
    return float(rows["value"].iloc[0] - rows["value"].iloc[-1])


def stages(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row for each stage and a column for each concept's UA and for what is kept of all others."""
    wide = table.assign(column=table["concept"] + ", " + table["measure"].str.replace("ua", "UA"))
    order = wide["column"].drop_duplicates()
    return wide.pivot(index="stage", columns="column", values="value")[order].rename_axis(columns=None)
