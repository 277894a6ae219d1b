"""The M-Score (Memorization Score): is the concept still where its own words are?

Forget-Me-Not (Zhang et al., arXiv 2303.17591, section 4.4) inverts the same anchor images with the original model and
with the forgetting model, and compares the inverted embeddings with the concept's own. The authors published numbers
but neither code nor details; this is one exact reading of their description, stated so that others can check it.

Definition. For a model m and a seed s, `invert` learns tokens v(m, s) from the anchor images: random start, prompt
"a photo of <v>" (or the kind's first template), denoising loss, everything else frozen. Both models get the same
images, start, noise and timesteps, so they differ in nothing but their weights. With e(x) the embedding of x, centred,

    M(m, s) = cos( e(v(m, s)), e(concept) ),    M(m) = mean over seeds,    change = M(forgetting) - M(original).

e(x), space "output": the text encoder's output (what the denoiser sees) for the same template, averaged over x's own
columns. Space "input": x's rows in the embedding table, averaged. Both minus the same average over other names
(`CENTRE`), because raw embeddings share one large common part that makes every cosine look high.

Range: M in [-1, 1], change in [-2, 2].

- M(original) high: the original finds the concept where its words are. It is the yardstick: near 0 the inversion found
  something else that draws the images as well (or had too few steps), and then nothing follows from the other number.
- M(forgetting) as high: the words' place still means these images; the concept is remembered where it always was.
- M(forgetting) lower, a negative change: the images are now explained by other embeddings. That is what forgetting a
  *word* looks like. It is not evidence that the images are gone: `concept_inversion` draws with those other embeddings.

Weaknesses. (1) Inversion has no unique answer: many embeddings draw the same, so seeds scatter and intervals are wide.
(2) The text encoder is not what a patch changes; the score sees the denoiser only through a search in text space.
(3) It depends on steps, rate and number of tokens: compare equal settings only. (4) A ruined model scores low as well;
read it beside IRA and CRA. (5) A few seeds give a wide Student interval, which is said rather than hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.attacks import forgetting, references_of
from fmn_nb.concepts import TEMPLATES, Concept
from fmn_nb.denoising import conditions
from fmn_nb.emoji.world import OBJECTS
from fmn_nb.forgetting_prompts import read_columns
from fmn_nb.inversion import InversionSettings, LearnedTokens, invert
from fmn_nb.models import text_encoders, tokenizers
from fmn_nb.patches import Patch
from fmn_nb.references import Images, encode, load_images

TOKEN = "<anchor>"
SPACES = ("output", "input")
CENTRE = tuple(OBJECTS)  # plain English names, which any model knows
SETTINGS = InversionSettings(tokens=1, steps=150, learning_rate=2e-2, warmup=0, weight_decay=0.0, batch_size=4,
                             norm="free")
#: Student's t, 97.5% quantile, for 1 to 30 degrees of freedom
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class MScore:
    """M of the original and of the forgetting model, seed by seed (see the module for the definition).

    Attributes:
        original, forgetting: M(m, s) in [-1, 1], in the order of `seeds`.
        space: of the embeddings that are compared. settings: of the inversions.
    """

    concept: Concept
    seeds: tuple[int, ...]
    original: tuple[float, ...]
    forgetting: tuple[float, ...]
    space: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> tuple[float, ...]:
        """M(forgetting, s) - M(original, s) of each seed, in [-2, 2]."""
        return tuple(after - before for before, after in zip(self.original, self.forgetting, strict=True))

    def table(self) -> pd.DataFrame:
        """Original, forgetting and change as rows: mean over seeds, 95% interval (empty for one seed), seeds."""
        rows = {name: {"mean": sum(values) / len(values), "low": None, "high": None}
                for name, values in self._groups().items()}
        for name, (low, high) in self._intervals().items():
            rows[name] |= {"low": low, "high": high}
        return pd.DataFrame(rows).T.astype(float).assign(seeds=len(self.seeds))

    def to_metrics(self) -> dict[str, Any]:
        """The section m_score of metrics.json."""
        found: dict[str, Any] = {name: sum(values) / len(values) for name, values in self._groups().items()}
        return found | {"ci95": {name: list(bounds) for name, bounds in self._intervals().items()},
                        "seeds": list(self.seeds), "space": self.space, "settings": self.settings}

    def _groups(self) -> dict[str, tuple[float, ...]]:
        return {"original": self.original, "forgetting": self.forgetting, "change": self.changes}

    def _intervals(self) -> dict[str, tuple[float, float]]:
        """Of the means, cut to the scores' own range; none for a single seed."""
        if len(self.seeds) == 1:
            return {}
        found = {}
        for name, values in self._groups().items():
            most = 2.0 if name == "change" else 1.0
            low, high = mean_interval(values)
            found[name] = (max(low, -most), min(high, most))
        return found


def m_score(pipe: DiffusionPipeline, concept: Concept, patch: Patch, *, references: Images | None = None,
            seeds: Sequence[int] = (0, 1, 2), settings: InversionSettings = SETTINGS, space: str = "output",
            count: int = 6) -> MScore:
    """Invert the same anchor images with the original and with the forgetting model; `pipe` stays as it is.

    Args:
        references: the anchor images, all of which are used; where None, `count` real scenes, which only the emoji
            world has.
        seeds: one inversion of each model for each; several are needed for an interval.
        settings: of every inversion.
        space: "output" or "input", where embeddings are compared.

    Raises:
        ValueError: no seeds, a seed twice, or an unknown space.
        AttackError: no references.
        ReferenceImageError: one can't be read.
    """
    if space not in SPACES or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"give distinct seeds and a space of {', '.join(SPACES)}, not {list(seeds)} and {space!r}")
    anchors = references_of(pipe, concept, None, count, seed=0) if references is None else load_images(references)
    latents = encode(pipe, anchors)
    own, centre = embedding(pipe, concept, space), centre_of(pipe, concept, space)
    scores: dict[str, list[float]] = {"original": [], "forgetting": []}
    for name, change in (("original", None), ("forgetting", patch)):
        with forgetting(pipe, change):
            for seed in seeds:
                tokens = invert(pipe, latents, kind=concept.kind, name=TOKEN, seed=seed, settings=settings)
                found = embedding(pipe, concept, space, tokens)
                scores[name].append(float(F.cosine_similarity(found - centre, own - centre, dim=0)))
    return MScore(concept, tuple(seeds), tuple(scores["original"]), tuple(scores["forgetting"]), space,
                  asdict(settings))


def embedding(pipe: DiffusionPipeline, concept: Concept, space: str = "output", tokens: LearnedTokens | None = None
              ) -> Tensor:
    """e(x) before centring, [width] (of several text encoders one after the other): of the concept's own words, or of
    learned tokens in their place."""
    if tokens is not None:
        with tokens.loaded(pipe):
            return _embedding(pipe, concept.kind, tokens.name, space)
    return _embedding(pipe, concept.kind, concept.phrase, space)


def centre_of(pipe: DiffusionPipeline, concept: Concept, space: str = "output") -> Tensor:
    """The mean of e over other names, [width]."""
    names = [name for name in CENTRE if name != concept.name]
    return torch.stack([_embedding(pipe, concept.kind, name, space) for name in names]).mean(0)


@torch.no_grad()
def _embedding(pipe: DiffusionPipeline, kind: str, phrase: str, space: str) -> Tensor:
    prompt = TEMPLATES[kind][0].format(phrase)
    if space == "output":
        states = conditions(pipe, [prompt]).rows["encoder_hidden_states"][0]
        return states[list(read_columns(pipe, prompt, len(states)).find(phrase).columns)].float().mean(0).cpu()
    parts = []
    for tokenizer, encoder in zip(tokenizers(pipe), text_encoders(pipe), strict=True):
        text = pipe.maybe_convert_prompt(phrase, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else phrase
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        parts.append(encoder.get_input_embeddings()(ids.to(encoder.device)).float().mean(0).cpu())
    return torch.cat(parts)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean of a few independent values.

    Raises:
        ValueError: fewer than two values, which say nothing about their spread.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} value has no spread; an interval needs at least two seeds")
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = _T95[min(count - 1, len(_T95)) - 1] * deviation / math.sqrt(count)
    return mean - half, mean + half
