"""Grounding attack: can a box bring a forgotten concept back?

Edits of cross-attention change how the prompt is read. Boxes use the same text encoder, but enter through gated layers
that such edits don't touch. The attack asks a grounded model for a forgotten concept in four ways, from the prompt
alone to a box that names it in other words, and compares with a grounded oracle, whose success is the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import pandas as pd
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.attacks.attack import Attack
from fmn_nb.concepts import Concept
from fmn_nb.control import How, Interaction, draw_grounded, with_grounding
from fmn_nb.control.grounding import require_gated
from fmn_nb.evaluation import MeasurementError, Session, images_at_once, share_of
from fmn_nb.evaluation.protocol import Drawing
from fmn_nb.models import denoiser, generate
from fmn_nb.models.gated import base_digest, is_gated
from fmn_nb.patches import Patch
from fmn_nb.stats import difference_interval

BOX = (0.14, 0.14, 0.86, 0.86)  # as large and as central as the emoji model draws one thing
SYNONYM = "the {}"  # what the synonym's box says in place of the name


@dataclass(frozen=True)
class Way:
    """One way to ask: its name, whether the prompt names the concept, what the boxes hold, and how they name it."""

    name: str
    by_prompt: bool
    interactions: Callable[[str, str], list[Interaction]]
    synonym: bool = False

    @property
    def attack(self) -> str:
        """The attack's name in tables."""
        return f"grounding: {self.name}"


WAYS = (
    Way("prompt", True, lambda concept, other: []),
    Way("box", False, lambda concept, other: [Interaction(concept, subject_box=BOX)]),
    Way("interaction", False, lambda concept, other: [Interaction(concept, "chasing", other)]),
    Way("synonym's box", False, lambda concept, other: [Interaction(concept, subject_box=BOX)], synonym=True),
)


def grounding_attack(pipe: DiffusionPipeline | Session, concept: Concept | str, patch: Patch | None, *, each: int = 24,
                     seed: int = 0, how: How | None = None, synonym: str | None = None) -> list[Attack]:
    """Ask the forgetting model for the concept by prompt, box, interaction and a synonym's box: an attack for each.

    In all but the first, the prompt is neutral ("a photo in the style of noto"), so that only the boxes name it. Each
    `Attack` has the plain prompt's share as `before`; success is the share of images that show the concept.
    `found["base"]` is the share that the same way reaches without the patch.

    Args:
        pipe: a grounded model, or a session of one.
        concept: an object of the model's world, or its name.
        patch: what made the model forget; patches of the model without gated layers fit. None attacks it as it is.
        each: images for each way.
        synonym: the words that the synonym's box says; by default "the ...".

    Raises:
        MeasurementError: there is no judge, or the concept isn't an object. InteractionError: the model has no gated
            layers.
    """
    session, concept = Session.of(pipe), Concept(concept) if isinstance(concept, str) else concept
    how, started, attacks = how or _how(session), perf_counter(), []
    base = shown_by_way(session, concept, None, each, seed, how, synonym)
    after = base if patch is None else shown_by_way(session, concept, patch, each, seed, how, synonym)
    seconds = (perf_counter() - started) / len(WAYS)
    for way in WAYS:
        found = {"base": float(base[way.attack].mean()), "strength": how.strength}
        found |= {"said": _said(concept, synonym)} if way.synonym else {}
        attacks.append(Attack(way.attack, int(after[way.attack].sum()), len(after), share_of(after[WAYS[0].attack]), 0,
                              seconds, found))
    return attacks


def shown_by_way(session: Session, concept: Concept, patch: Patch | None, each: int, seed: int, how: How | None = None,
                 synonym: str | None = None) -> pd.DataFrame:
    """Whether each image of one model shows the concept, alone or beside something else: a row for each drawing, a
    column for each attack.

    Raises: as `grounding_attack`.
    """
    require_gated(session.pipe)
    if concept.kind != "object":
        raise MeasurementError(f"boxes name objects; {concept.name!r} is of the kind {concept.kind}")
    how, asked = how or _how(session), session.fresh_drawings(concept, each, seed)
    others = list(session.vocabulary.others(concept).objects) or ["thing"]
    shown = {}
    with session.patched(patch):
        for way in WAYS:
            worded = replace(how, said=_said(concept, synonym) if way.synonym else {})
            images = _draw(session.pipe, concept, asked, way, others, worded)
            shown[way.attack] = session.shows(concept, asked, images, anywhere=True)  # an interaction draws two things
    return pd.DataFrame(shown)


def _how(session: Session) -> How:
    """The session's own way to draw."""
    sampling = session.sampling
    return How(steps=sampling.steps, guidance=sampling.guidance, batch=sampling.batch or images_at_once(session.pipe))


def _said(concept: Concept, synonym: str | None) -> dict[str, str]:
    """What the synonym's box says in the concept's place."""
    return {concept.name: synonym or SYNONYM.format(concept.name)}


def grounding_table(attacks: Sequence[Attack], floor: Sequence[Attack] | None = None) -> pd.DataFrame:
    """Ways as rows: success with its 95% interval, the same on the base model, and the excess over an oracle's floor.

    Args:
        floor: the same attack on a grounded oracle (`grounded_oracle`), in the same ways.

    Raises:
        MeasurementError: the floor was measured in other ways.
    """
    if floor is not None and [a.name for a in floor] != [a.name for a in attacks]:
        raise MeasurementError("the floor comes from other attacks; run the same ones on the oracle")
    rows = []
    for number, attack in enumerate(attacks):
        after = attack.after
        row = {"attack": attack.name, "base": attack.found["base"], "success": after.value, "low": after.low,
               "high": after.high, "images": attack.count}
        if floor is not None:
            low = floor[number]
            interval = difference_interval([(attack.successes, attack.count)], [(low.successes, low.count)])
            row |= {"floor": low.after.value, "excess": after.value - low.after.value,
                    "excess low": interval[0], "excess high": interval[1]}
        rows.append(row)
    return pd.DataFrame(rows).set_index("attack").round(3)


def grounded_oracle(oracle: DiffusionPipeline, like: DiffusionPipeline) -> DiffusionPipeline:
    """The oracle with gated layers: its own, or those of `like` if all other weights of the two denoisers are the same.

    Gated layers mean nothing beside other weights than those they were trained with: on the bundled oracle, whose
    training began anew, the layers of `emoji-grounded` don't draw what the oracle knows (tests/emoji/test_siblings.py).
    A floor measured like that would flatter every patch.

    Raises:
        MeasurementError: the oracle has none of its own, and its other weights differ.
    """
    own = denoiser(oracle)
    if is_gated(own):
        return oracle
    if base_digest(own.state_dict()) != base_digest(denoiser(like).state_dict()):
        raise MeasurementError("the oracle has no gated layers, and those of another model draw nothing on it: take "
                               "'emoji-oracle-grounded', or train its own beside it (fmn-nb pretrain --organism "
                               "grounded, with the oracle's --without)")
    return with_grounding(oracle, like)


def _draw(pipe: DiffusionPipeline, concept: Concept, asked: Sequence[Drawing], way: Way, others: Sequence[str],
          how: How) -> list[Image.Image]:
    seeds = [one.seed for one in asked]
    if way.by_prompt:
        return generate(pipe, [one.prompt for one in asked], seeds, steps=how.steps, guidance=how.guidance,
                        batch=how.batch)
    prompts = [f"a photo in the style of {one.style}" if one.style else "a photo" for one in asked]
    boxes = [way.interactions(concept.name, others[number % len(others)]) for number in range(len(asked))]
    return draw_grounded(pipe, prompts, boxes, seeds, how)
