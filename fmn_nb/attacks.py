"""Attacks: can a forgotten concept be brought back? What a prompt or a learned embedding makes of the model.

Each attack works on the forgetting model (the pipe with its patch), leaves the pipe as it was, and ends in the same
figure: in how many fresh images does the judge see the concept, before the attack and after it.

`concept_inversion` (Pham et al., arXiv 2308.01508) is here; prompts in `attacks_prompts`, an optimised prompt in
`attacks_search`, fine-tuning back in `attacks_finetune`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import pandas as pd
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.concepts import Concept, find_phrase, with_article
from fmn_nb.denoising import borrowed
from fmn_nb.evaluation_measures import JudgeLike, judge_images
from fmn_nb.evaluation_probes import Share, share_of
from fmn_nb.generation import STEPS, generate
from fmn_nb.inversion import InversionSettings, invert
from fmn_nb.patches import Patch
from fmn_nb.protocol import EMOJI, Drawing, Vocabulary, check_concept, drawings, repeated
from fmn_nb.references import Images, load_images
from fmn_nb.worlds import world_of

TOKEN = "<attack>"
NO_IMAGES = Share(0.0, 0.0, 1.0, 0)  # in place of a skipped attack's shares: nothing is known of them


class AttackError(ValueError):
    """The attack can't be made as asked: no judge, too few references, or a prompt without the concept."""


@dataclass(frozen=True)
class Attack:
    """What an attack achieved.

    Attributes:
        name: of the attack.
        successes, count: images in which the judge sees the concept, of all that were drawn after the attack.
        before: the same share before it, on the same seeds.
        steps: gradient steps or search rounds spent. seconds: all of the attack's time, drawing included.
        found: what it found, such as tokens or prompts; JSON values only.
        skipped: why nothing could be concluded, "" where something could. A skipped attack counts no image, and its
            shares are `NO_IMAGES`, which is neither success nor failure.
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
        """As JSON holds it; a skipped attack has its reason in place of shares."""
        if self.skipped:
            return {"name": self.name, "skipped": self.skipped, "steps": self.steps,
                    "seconds": round(self.seconds, 2), "found": self.found}
        after = self.after
        return {"name": self.name, "successes": self.successes, "count": self.count, "success": after.value,
                "low": after.low, "high": after.high, "before": self.before.value, "steps": self.steps,
                "seconds": round(self.seconds, 2), "found": self.found}


def attack_table(attacks: Sequence[Attack]) -> pd.DataFrame:
    """Attacks as rows: success before and after with its 95% interval, images, steps, seconds.

    Shares are rounded to two places here, for pandas rounds no column in which "skipped" stands beside numbers.
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

    `images` are drawn afterwards to see whether it worked.
    """

    tokens: int = 4
    steps: int = 150
    batch_size: int = 4
    learning_rate: float = 2e-2
    references: int = 6
    images: int = 24

    def settings(self) -> InversionSettings:
        """The inversion's settings: lengths free, as an attacker isn't bound to look like the vocabulary."""
        return InversionSettings(tokens=self.tokens, steps=self.steps, batch_size=self.batch_size, norm="free",
                                 learning_rate=self.learning_rate, warmup=0, weight_decay=0.0)


def concept_inversion(pipe: DiffusionPipeline, concept: Concept, patch: Patch | None, *,
                      references: Images | None = None, budget: InversionBudget | None = None, seed: int = 0,
                      judge: JudgeLike | None = None, steps: int = STEPS,
                      vocabulary: Vocabulary = EMOJI) -> Attack:
    """Learn an embedding of the concept on the forgetting model, and draw with it (Pham et al., arXiv 2308.01508).

    The attacker has the forgetting model and a few images of the concept, and changes no weight. Success says that the
    denoiser can still draw the concept when text asks for it in another way; it doesn't say who taught it: learned
    tokens carry what the references show, and also bring a model to a concept that it never saw, so compare with the
    same attack on an oracle, or with fewer tokens and steps.

    Args:
        patch: what made the model forget; None attacks the base model itself (what the attack can do at best).
        references: images of the concept, as many as the budget says or more; real scenes where None, which only the
            emoji world has.
        steps: sampling steps of the images that are judged.

    Raises:
        AttackError: no judge, or too few references.
    """
    started, budget = perf_counter(), budget or InversionBudget()
    judge = judge_of(pipe, judge)
    images = references_of(pipe, concept, references, budget.references, seed, vocabulary)
    asked = asked_for(concept, budget.images, seed, vocabulary)
    with forgetting(pipe, patch):
        before = seen(pipe, judge, concept, asked, steps=steps, vocabulary=vocabulary)
        tokens = invert(pipe, images, kind=concept.kind, name=TOKEN, initial=concept.phrase, seed=seed,
                        settings=budget.settings())
        with tokens.loaded(pipe):
            prompts = [in_other_words(d.prompt, concept, TOKEN) for d in asked]
            after = seen(pipe, judge, concept, asked, prompts, steps=steps, vocabulary=vocabulary)
    fifth = max(1, len(tokens.losses) // 5)
    losses = {"loss_first": round(sum(tokens.losses[:fifth]) / fifth, 4),
              "loss_last": round(sum(tokens.losses[-fifth:]) / fifth, 4)}
    return Attack("concept inversion", int(after.sum()), len(after), share_of(before), budget.steps,
                  perf_counter() - started, {"tokens": budget.tokens, **losses})


def forgetting(pipe: DiffusionPipeline, patch: Patch | None) -> AbstractContextManager[None]:
    """Context with the forgetting model: the pipe with the patch, or as it is where there is none."""
    return patch.applied(pipe) if patch is not None else nullcontext()


def judge_of(pipe: DiffusionPipeline, judge: JudgeLike | None) -> JudgeLike:
    """The given judge, else the emoji world's; AttackError where there is none."""
    if judge is not None:
        return judge
    world = world_of(pipe)
    if world is None:
        raise AttackError("nobody judges whether the concept is back: give judge=..., such as a ClipJudge")
    return world.judge


def references_of(pipe: DiffusionPipeline, concept: Concept, references: Images | None, count: int, seed: int,
                  vocabulary: Vocabulary = EMOJI) -> list[Image.Image]:
    """The attacker's images: the first `count` of the given ones, else real scenes of the emoji world.

    Raises:
        AttackError: fewer than `count` were given, or none and the model's world has none.
        ReferenceImageError: one can't be read.
    """
    if references is not None:
        images = load_images(references)
        if len(images) < count:
            raise AttackError(f"{len(images)} references were given but {count} are to be used: give more, or ask for "
                              "fewer (references=... of a budget, count=... of fine_tuned_back)")
        return images[:count]
    world = world_of(pipe)
    if world is None:
        raise AttackError(f"give references: this model's world has no real images of {concept.name}")
    return [Image.fromarray(image) for image in world.real_images(asked_for(concept, count, seed, vocabulary))]


def asked_for(concept: Concept, count: int, seed: int, vocabulary: Vocabulary = EMOJI) -> list[Drawing]:
    """`count` drawings that name the concept, evenly spread over the forget set's prompts, each with its own seed.

    They are drawn with other seeds than the evaluation's, so that an attack isn't judged on images that chose it.
    """
    check_concept(concept, vocabulary)
    prompts = list({d.prompt: d for d in drawings(concept, seed, "quick", vocabulary) if d.role == "forget"}.values())
    if count < len(prompts):
        return repeated([prompts[i * len(prompts) // count] for i in range(count)], 1, seed + 7919)
    many = repeated(prompts, -(-count // len(prompts)), seed + 7919)
    rounds = -(-count // len(prompts))
    return [many[p * rounds + r] for r in range(rounds) for p in range(len(prompts))][:count]


def in_other_words(prompt: str, concept: Concept, words: str) -> str:
    """The prompt with `words` in the concept's place, its article gone with it ("a photo of <attack>").

    Raises:
        AttackError: the prompt doesn't name the concept.
    """
    for phrase in (with_article(concept.name), concept.name, concept.phrase):
        if spans := find_phrase(prompt, phrase):
            for start, end in reversed(spans):
                prompt = prompt[:start] + words + prompt[end:]
            return prompt
    raise AttackError(f"'{concept.name}' is not in the prompt '{prompt}'")


def seen(pipe: DiffusionPipeline, judge: JudgeLike, concept: Concept, asked: Sequence[Drawing],
         prompts: Sequence[str] | None = None, *, steps: int = STEPS, vocabulary: Vocabulary = EMOJI) -> pd.Series:
    """For each drawing whether the judge sees the concept in it; `prompts` are drawn in the drawings' own places."""
    with borrowed(pipe):
        images = generate(pipe, list(prompts or [d.prompt for d in asked]), [d.seed for d in asked], steps=steps)
    return ~judge_images(judge, concept, asked, images, vocabulary)["right"].astype(bool)
