"""Attacks: can a forgotten concept be brought back? The frame that all attacks share, and concept inversion.

Each attack works on the forgetting model (the pipe with its patch), leaves the pipe as it was, and ends in the same
figure: in how many fresh images does the judge see the concept before and after the attack? The first argument is the
base model's pipeline, or a `Session` with a judge or sampling of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import pandas as pd
from diffusers import DiffusionPipeline

from fmn_nb.concepts import Concept, put_instead, spoken, with_article
from fmn_nb.evaluation import MeasurementError, Session, Share, share_of
from fmn_nb.inversion import InversionSettings, invert
from fmn_nb.models import Images, Noising
from fmn_nb.patches import Patch

TOKEN = "<attack>"
NO_IMAGES = Share(0.0, 0.0, 1.0, 0)  # in place of a skipped attack's shares: nothing is known of them


@dataclass(frozen=True)
class Attack:
    """What an attack achieved.

    Attributes:
        name: the attack's name.
        successes, count: images in which the judge sees the concept, out of all drawn after the attack.
        before: the same share before it, on the same seeds.
        steps: gradient steps or search rounds spent. seconds: all of the attack's time, drawing included.
        found: what it found, such as tokens or prompts; JSON values only.
        skipped: why nothing can be concluded, "" if something can. A skipped attack counts no image, and its shares are
            `NO_IMAGES`, which is neither success nor failure.
    """

    name: str
    successes: int
    count: int
    before: Share
    steps: int
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    @property
    def after(self) -> Share:
        """The success: the share of images with the concept, in [0, 1], with its 95% Wilson interval."""
        if self.skipped:
            return NO_IMAGES
        return share_of(pd.Series([True] * self.successes + [False] * (self.count - self.successes)))

    def to_dict(self) -> dict[str, Any]:
        """The attack as JSON holds it; a skipped attack has its reason in place of shares."""
        after = self.after
        shares = {"skipped": self.skipped} if self.skipped else {
            "successes": self.successes, "count": self.count, "success": after.value, "low": after.low,
            "high": after.high, "before": self.before.value}
        return {"name": self.name, **shares, "steps": self.steps, "seconds": round(self.seconds, 2),
                "found": self.found}


def attack_table(attacks: Sequence[Attack]) -> pd.DataFrame:
    """Attacks as rows: success before and after with its 95% interval, images, steps, seconds.

    Shares are rounded to two places here, since pandas doesn't round a column that mixes "skipped" and numbers.
    """
    rows = []
    for a in attacks:
        shares = {"before": a.before.value, "after": a.after.value, "low": a.after.low, "high": a.after.high}
        cells = {name: "skipped" if a.skipped else round(value, 2) for name, value in shares.items()}
        rows.append({"attack": a.name, **cells, "images": a.count, "steps": a.steps, "seconds": a.seconds})
    return pd.DataFrame(rows).set_index("attack")


@dataclass(frozen=True)
class InversionBudget:
    """What a concept inversion may spend: learned tokens, gradient steps, images in each, reference images.

    `images` says how many images are drawn afterwards to see whether it worked.
    """

    tokens: int = 4
    steps: int = 150
    batch_size: int = 4
    learning_rate: float = 2e-2
    references: int = 6
    images: int = 24


def inversion_settings(budget: InversionBudget) -> InversionSettings:
    """How the budget's tokens are learned; their lengths are free: an attacker isn't bound to look like the
    vocabulary."""
    return InversionSettings(tokens=budget.tokens, steps=budget.steps, batch_size=budget.batch_size, norm="free",
                             learning_rate=budget.learning_rate, warmup=0, weight_decay=0.0)


def concept_inversion(pipe: DiffusionPipeline | Session, concept: Concept, patch: Patch | None, *,
                      references: Images | None = None, budget: InversionBudget | None = None, seed: int = 0,
                      initial: str | None = None) -> Attack:
    """Learn an embedding of the concept on the forgetting model, and draw with it (Pham et al., arXiv 2308.01508).

    The attacker has the forgetting model and a few images of the concept, and changes no weight. Success says that the
    denoiser can still draw the concept when text asks for it in another way; it doesn't say where the denoiser learned
    it: learned tokens carry what the references show, and can bring even a model that never saw the concept to draw it.
    So compare with the same attack on an oracle, or with fewer tokens and steps.

    Args:
        patch: what made the model forget; None attacks the base model itself (what the attack can do at best).
        references: images of the concept, at least as many as the budget says; None for real ones of the model's world.
        initial: the words that the learned tokens start from; None for the concept's own.

    Raises:
        MeasurementError: there is no judge, or there are too few references.
    """
    started, budget, session = perf_counter(), budget or InversionBudget(), Session.of(pipe)
    Noising(session.pipe)  # before anything is drawn
    images = session.references(concept, references, budget.references, seed)
    asked = session.fresh_drawings(concept, budget.images, seed)
    with session.patched(patch):
        before = session.seen(concept, asked)
        tokens = invert(session.pipe, images, kind=concept.kind, name=TOKEN, initial=initial or concept.phrase,
                        seed=seed, settings=inversion_settings(budget))
        with tokens.loaded(session.pipe):
            after = session.seen(concept, asked, [with_words(d.prompt, concept, TOKEN) for d in asked])
    fifth = max(1, len(tokens.losses) // 5)
    losses = {"loss_first": round(sum(tokens.losses[:fifth]) / fifth, 4),
              "loss_last": round(sum(tokens.losses[-fifth:]) / fifth, 4)}
    return Attack("concept inversion", int(after.sum()), len(after), share_of(before), budget.steps,
                  perf_counter() - started, {"tokens": budget.tokens, **losses})


def with_words(prompt: str, concept: Concept, words: str) -> str:
    """The prompt with `words` in place of the concept and its article ("a photo of <attack>").

    Raises:
        MeasurementError: the prompt doesn't name the concept.
    """
    name = spoken(concept).name
    if (text := put_instead(prompt, (with_article(name), name, concept.phrase), words)) is None:
        raise MeasurementError(f"'{name}' is not in the prompt '{prompt}'")
    return text
