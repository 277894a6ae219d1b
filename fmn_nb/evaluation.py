"""Forgetting measured: UA, IRA, CRA and their harmonic mean, image quality, and the attention on the concept.

Definitions follow UnlearnCanvas (Zhang et al., arXiv 2402.11846, section 4): UA is the share of the forget set's images
that the judge does not call the concept; IRA the judge's accuracy on the concept's own domain, CRA in the other domain,
both on the retain set. A missing image is an error, never a success.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.attention import record_attention
from fmn_nb.concepts import Concept
from fmn_nb.emoji.judge import Verdict
from fmn_nb.generation import GUIDANCE, STEPS, generate
from fmn_nb.image_quality import clip_score, frechet_distance
from fmn_nb.intervals import bootstrap, wilson
from fmn_nb.patches import Patch
from fmn_nb.protocol import Drawing, drawings, target_label
from fmn_nb.worlds import EmojiWorld, world_of


class JudgeLike(Protocol):
    """Whatever tells what images show; the bundled judge is one."""

    def verdicts(self, images: Sequence[Image.Image] | np.ndarray) -> list[Verdict]: ...


@dataclass(frozen=True)
class Measures:
    """One model's figures. Accuracies are in [0, 1]; a figure that could not be computed is None, with its reason.

    Attributes:
        ua, ira, cra: see the module. h: their harmonic mean, 0 where one of them is 0.
        ceiling: the h that the base model's own ira and cra would give with ua = 1.
        frechet: Frechet distance of the retain set's images to real scenes, on the judge's features; 0 is equal.
        clip_score: mean cosine, times 100, of the retain set's images with their prompts, on the bundled CLIP.
        images: how many images were judged. ci95: 95% intervals, Wilson for accuracies, bootstrap for h.
    """

    ua: float | None = None
    ira: float | None = None
    cra: float | None = None
    h: float | None = None
    ceiling: float | None = None
    frechet: float | None = None
    clip_score: float | None = None
    images: int = 0
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_metrics(self) -> dict:
        """As metrics.json holds it: what is None is absent, its reason stands under "skipped"."""
        values = {k: getattr(self, k) for k in ("ua", "ira", "cra", "h", "ceiling", "frechet", "clip_score")}
        found = {k: v for k, v in values.items() if v is not None} | {"images": self.images}
        found["ci95"] = {k: list(v) for k, v in self.ci95.items()}
        return found | ({"skipped": self.skipped} if self.skipped else {})


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `outcomes` holds a row per image: what was asked, what the judge saw, before and after."""

    concept: Concept
    seed: int
    size: str
    before: Measures
    after: Measures | None
    attention: dict[str, float]
    outcomes: pd.DataFrame
    images: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)

    def table(self) -> pd.DataFrame:
        """Measures as rows, before and after as columns, with 95% intervals."""
        columns = {"before": self.before} | ({"after": self.after} if self.after else {})
        names = ("ua", "ira", "cra", "h", "ceiling", "frechet", "clip_score", "images")
        return pd.DataFrame({when: {n: _cell(m, n) for n in names} for when, m in columns.items()})

    def confusion(self, when: str = "after", what: str = "label") -> pd.DataFrame:
        """How often each asked label or style (rows) was seen as each (columns), in images."""
        if when not in set(self.outcomes["when"]):
            raise ValueError(f"nothing was evaluated {when!r}; there is: {', '.join(self.outcomes['when'].unique())}")
        rows = self.outcomes[self.outcomes["when"] == when]
        return pd.crosstab(rows[f"asked_{what}"], rows[f"seen_{what}"])

    def collateral(self) -> pd.DataFrame:
        """The retain set's accuracy before and after for each label asked for, worst loss first."""
        rows = self.outcomes[self.outcomes["role"] == "retain"]
        table = rows.pivot_table(index="asked_label", columns="when", values="right", aggfunc="mean")
        if "after" in table:
            table["change"] = table["after"] - table["before"]
            table = table.sort_values("change")
        return table

    def to_metrics(self) -> dict:
        """The sections before, after and attention of metrics.json."""
        found = {"before": self.before.to_metrics(), "attention": dict(self.attention)}
        return found | ({"after": self.after.to_metrics()} if self.after else {})

    def _repr_html_(self) -> str:
        return self.table().to_html()


def evaluate(pipe: DiffusionPipeline, concept: Concept, *, patch: Patch | None = None, seed: int = 0,
             size: str = "quick", judge: JudgeLike | None = None, steps: int = STEPS, guidance: float = GUIDANCE,
             batch: int = 72) -> Report:
    """Measure what the model shows of `concept` and of everything else, before and, with a patch, after.

    Args:
        pipe: the base model; left as it was.
        size: "quick" (about 80 images each) or "full" (every object x style prompt, five seeds each).
        judge: tells what images show; the bundled one where None. `batch` images are drawn at once.

    For a model that is not of the emoji world there is no protocol of prompts yet, and the measures are absent, with
    the reason under `skipped`.

    Raises:
        UnknownConceptError: the emoji world holds no such concept.
        ValueError: an unknown size.
    """
    world = world_of(pipe)
    if world is None:
        reason = "the bundled judge and prompts know the emoji world only; this model is another"
        nothing = Measures(skipped={k: reason for k in ("ua", "ira", "cra", "h", "frechet", "clip_score")})
        return Report(concept, seed, size, nothing, nothing if patch else None, {}, pd.DataFrame())
    wanted = drawings(concept, seed, size)
    judge = judge or world.judge
    images, outcomes, attention = {}, [], {}
    for when, change in _versions(pipe, patch):
        with change:
            images[when] = generate(pipe, [d.prompt for d in wanted], [d.seed for d in wanted], steps=steps,
                                    guidance=guidance, batch=batch)
            attention[f"mass_{when}"] = attention_mass(pipe, concept, wanted[0], steps)
        outcomes.append(judge_images(judge, concept, wanted, images[when]).assign(when=when))
    measures = [measure(rows, concept, seed) for rows in outcomes]
    measures = [_with_ceiling(m, measures[0]) for m in measures]
    measures = [_with_quality(m, wanted, images[when], world) for m, when in zip(measures, images, strict=True)]
    after = measures[1] if patch is not None else None
    return Report(concept, seed, size, measures[0], after, attention, pd.concat(outcomes, ignore_index=True), images)


def _versions(pipe: DiffusionPipeline, patch: Patch | None):
    yield "before", nullcontext()
    if patch is not None:
        yield "after", patch.applied(pipe)


def judge_images(judge: JudgeLike, concept: Concept, wanted: Sequence[Drawing],
                 images: Sequence[Image.Image]) -> pd.DataFrame:
    """A row per drawing: what was asked, what the judge saw, and whether that is right.

    `right` in the forget set means that the concept was NOT seen; in the retain set that the label was.
    `right_style` is whether the style was right. Raises ValueError when images are missing.
    """
    if len(images) != len(wanted):
        raise ValueError(f"{len(wanted)} images were asked for, {len(images)} are there; missing ones are not judged")
    verdicts = judge.verdicts(images)
    rows = [{"prompt": d.prompt, "seed": d.seed, "role": d.role, "domain": d.domain, "asked_label": d.label,
             "asked_style": d.style, "seen_label": v.label, "seen_style": v.style,
             "right": not _shows(concept, v) if d.role == "forget" else v.label == d.label,
             "right_style": v.style == d.style}
            for d, v in zip(wanted, verdicts, strict=True)]
    return pd.DataFrame(rows)


def _shows(concept: Concept, verdict: Verdict) -> bool:
    return concept.name == verdict.style if concept.kind == "style" else verdict.label == target_label(concept)


def measure(outcomes: pd.DataFrame, concept: Concept, seed: int = 0) -> Measures:
    """UA, IRA, CRA and H of judged images (`judge_images`), with 95% intervals."""
    retain = outcomes[outcomes["role"] == "retain"]
    label, style = retain["right"].to_numpy(), retain["right_style"].to_numpy()
    own, other = {
        "object": (label, style),
        "style": (style, label),
        "identity": (label[retain["domain"] == "identity"], label[retain["domain"] != "identity"]),
    }[concept.kind]
    groups = {"ua": outcomes.loc[outcomes["role"] == "forget", "right"].to_numpy(), "ira": own, "cra": other}
    shares = {name: float(values.mean()) for name, values in groups.items()}
    intervals = {name: wilson(int(values.sum()), len(values)) for name, values in groups.items()}
    intervals["h"] = bootstrap(list(groups.values()), harmonic_mean, seed)
    return Measures(**shares, h=harmonic_mean(*shares.values()), images=len(outcomes), ci95=intervals)


def harmonic_mean(*values: float) -> float:
    """The harmonic mean of values in [0, 1]; 0 where one of them is 0, so that no model is praised for one figure."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def _with_ceiling(measures: Measures, base: Measures) -> Measures:
    return Measures(**{**vars(measures), "ceiling": harmonic_mean(1.0, base.ira, base.cra)})


def _with_quality(measures: Measures, wanted: Sequence[Drawing], images: list[Image.Image],
                  world: EmojiWorld) -> Measures:
    retained = [(d, image) for d, image in zip(wanted, images, strict=True) if d.role == "retain"]
    kept = [image for _, image in retained]
    real = world.real_images([d for d, _ in retained])
    found = {**vars(measures), "frechet": frechet_distance(world.judge, real, kept)}
    try:
        found["clip_score"] = clip_score(world.clip, world.clip_tokenizer, kept, [d.prompt for d, _ in retained])
    except FileNotFoundError as missing:
        found["skipped"] = {**measures.skipped, "clip_score": str(missing)}
    return Measures(**found)


def attention_mass(pipe: DiffusionPipeline, concept: Concept, drawing: Drawing, steps: int = STEPS) -> float:
    """The share of all cross-attention, in [0, 1], that goes to the concept's words while its prompt is drawn."""
    with record_attention(pipe, branch="cond", phrases=[concept.phrase], keep="mean") as attention:
        generate(pipe, [drawing.prompt], [drawing.seed], steps=steps)
    return attention.mass(concept.phrase)


def _cell(measures: Measures, name: str) -> str:
    value = getattr(measures, name)
    if value is None:
        return "skipped"
    if name not in measures.ci95:
        return f"{value:.3f}" if isinstance(value, float) else str(value)
    low, high = measures.ci95[name]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
