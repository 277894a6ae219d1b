"""From images to UA, IRA, CRA and H: what the judge saw, counted, with intervals.

Definitions follow UnlearnCanvas (Zhang et al., arXiv 2402.11846, section 4): UA is the share of the forget set's images
that the judge does not call the concept; IRA the judge's accuracy on the concept's own domain, CRA in the other domain,
both on the retain set. A missing image is an error, never a success.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from PIL import Image

from fmn_nb.concepts import Concept
from fmn_nb.emoji.judge import Verdict
from fmn_nb.evaluation_probes import Share
from fmn_nb.intervals import harmonic_mean_interval, wilson
from fmn_nb.protocol import EMOJI, Drawing, Vocabulary

SEEN = " + "  # between the names of everything that was seen in one image
FIGURES = ("ua", "ira", "cra", "h", "ceiling", "frechet", "kernel", "clip_score")


class JudgeLike(Protocol):
    """Whatever tells what images show; the bundled judges and a zero-shot CLIP are some."""

    def verdicts(self, images: Sequence[Image.Image] | np.ndarray) -> list[Verdict]: ...


@dataclass(frozen=True)
class Measures:
    """One model's figures. Accuracies are in [0, 1]; a figure that could not be computed is None, with its reason.

    Attributes:
        ua, ira, cra: see the module. h: their harmonic mean, 0 where one of them is 0.
        ceiling: the h that the base model's own ira and cra would give with ua = 1.
        frechet: Frechet distance of the retain set's images to real ones, 0 is equal. kernel: kernel distance of
            the same images, about 0 for equal sets, also below. features: what network's features both are on; only
            distances on the same features can be compared.
        clip_score: mean cosine, times 100, of the retain set's images with their prompts.
        images: how many images of forget and retain set were judged. ci95: 95% intervals: of ua, ira and cra Wilson's
            (`intervals.wilson`); of h the middle of its values when each of the three is drawn from its Jeffreys
            posterior (`intervals.harmonic_mean_interval`); both have a width at 0 and 1 too. The other figures have
            none.
        probes: shares of the probes' images, by name (`fmn_nb.probes.PROBES`).
    """

    ua: float | None = None
    ira: float | None = None
    cra: float | None = None
    h: float | None = None
    ceiling: float | None = None
    frechet: float | None = None
    kernel: float | None = None
    clip_score: float | None = None
    features: str | None = None
    images: int = 0
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    probes: dict[str, Share] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_metrics(self) -> dict[str, Any]:
        """As metrics.json holds it: what is None is absent, its reason stands under "skipped"."""
        values = {name: getattr(self, name) for name in (*FIGURES, "features")}
        found = {k: v for k, v in values.items() if v is not None} | {"images": self.images}
        found |= {name: share.value for name, share in self.probes.items()}
        found["ci95"] = {k: list(v) for k, v in self.ci95.items()}
        found["ci95"] |= {name: [share.low, share.high] for name, share in self.probes.items()}
        return found | ({"skipped": dict(self.skipped)} if self.skipped else {})

    def with_skipped(self, **reasons: str) -> Measures:
        """The same with further reasons for figures that could not be computed."""
        return replace(self, skipped={**self.skipped, **reasons})


def judge_images(judge: JudgeLike, concept: Concept, wanted: Sequence[Drawing], images: Sequence[Image.Image],
                 vocabulary: Vocabulary = EMOJI) -> pd.DataFrame:
    """A row per drawing: what was asked, what the judge saw, and whether that is right.

    `right`: in the forget set that the concept was NOT seen, among paraphrases too; in the retain set that the label
    was seen; beside another object, that all others were. `gone`: whether the concept is nowhere in the image.
    `right_style`: whether the style was right.

    Raises:
        ValueError: images are missing, or the judge gave another number of verdicts.
    """
    if len(images) != len(wanted):
        raise ValueError(f"{len(wanted)} images were asked for, {len(images)} are there; missing ones are not judged")
    verdicts = judge.verdicts(images)
    if len(verdicts) != len(wanted):
        raise ValueError(f"the judge gave {len(verdicts)} verdicts on {len(wanted)} images; it must give one on each")
    rows = [{"prompt": d.prompt, "seed": d.seed, "role": d.role, "domain": d.domain, "asked_label": d.label,
             "asked_style": d.style, "asked_other": SEEN.join(d.other), "seen_label": v.label, "seen_style": v.style,
             "seen": SEEN.join(sorted(v.seen)), "right": _right(concept, d, v, vocabulary),
             "gone": _gone(concept, v, vocabulary), "right_style": v.style == d.style}
            for d, v in zip(wanted, verdicts, strict=True)]
    return pd.DataFrame(rows)


def _right(concept: Concept, drawing: Drawing, verdict: Verdict, vocabulary: Vocabulary) -> bool:
    if drawing.role == "pair":
        return set(drawing.other) <= verdict.seen
    if drawing.role in ("forget", "paraphrase"):
        if concept.kind == "style":
            return verdict.style != concept.name
        return verdict.label != vocabulary.target_label(concept)
    return verdict.label == drawing.label


def _gone(concept: Concept, verdict: Verdict, vocabulary: Vocabulary) -> bool:
    if concept.kind == "style":
        return verdict.style != concept.name
    return vocabulary.target_label(concept) not in {*verdict.seen, verdict.label}


def measure(outcomes: pd.DataFrame, concept: Concept, seed: int = 0) -> Measures:
    """UA, IRA, CRA and H of judged images (`judge_images`), with 95% intervals; `seed` is of H's.

    Raises:
        ValueError: there is no image at all for one of the three.
    """
    retain = outcomes[outcomes["role"] == "retain"]
    label, style = retain["right"].to_numpy(bool), retain["right_style"].to_numpy(bool)
    own, other = {
        "object": (label, style),
        "style": (style, label),
        "identity": (label[retain["domain"] == "identity"], label[retain["domain"] != "identity"]),
    }[concept.kind]
    forgotten = outcomes.loc[outcomes["role"] == "forget", "right"].to_numpy(bool)
    groups = {"ua": forgotten, "ira": own, "cra": other}
    empty = [name.upper() for name, values in groups.items() if not len(values)]
    if empty:
        raise ValueError(f"no image was judged for {', '.join(empty)}; draw the whole protocol")
    shares = {name: float(values.mean()) for name, values in groups.items()}
    counts = {name: (int(values.sum()), len(values)) for name, values in groups.items()}
    intervals = {name: wilson(*of_all) for name, of_all in counts.items()}
    intervals["h"] = harmonic_mean_interval(*zip(*counts.values(), strict=True), seed=seed)
    return Measures(**shares, h=harmonic_mean(*shares.values()), images=len(forgotten) + len(retain), ci95=intervals)


def harmonic_mean(*values: float) -> float:
    """The harmonic mean of values in [0, 1]; 0 where one of them is 0, so that no model is praised for one figure."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def with_ceiling(measures: Measures, base: Measures) -> Measures:
    """The measures with the ceiling that the base model's own accuracies set."""
    return replace(measures, ceiling=harmonic_mean(1.0, base.ira, base.cra))


def cell(measures: Measures, name: str) -> str:
    """A figure as a table shows it: with its interval where there is one, "skipped" where there is none."""
    value = getattr(measures, name)
    if value is None:
        return "skipped"
    if name not in measures.ci95:
        return f"{value:.3f}" if isinstance(value, float) else str(value)
    low, high = measures.ci95[name]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
