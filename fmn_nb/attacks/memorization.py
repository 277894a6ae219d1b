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
(`centre_of`), because raw embeddings share one large common part that makes every cosine look high.

Range: M in [-1, 1], change in [-2, 2].

- M(original) high: the original finds the concept where its words are. This is the yardstick: near 0, the inversion
  found something else that draws the images as well (or had too few steps), and nothing follows from the other number.
- M(forgetting) as high: the words' place still means these images; the concept is remembered where it always was.
- M(forgetting) lower, a negative change: the images are now explained by other embeddings. That is what forgetting a
  *word* looks like. It is not evidence that the images are gone: `concept_inversion` draws with those other embeddings.

Weaknesses. (1) Inversion has no unique answer: many embeddings draw the same, so seeds scatter and intervals are wide.
(2) A patch doesn't change the text encoder; the score sees the denoiser only through a search in text space.
(3) It depends on steps, rate and number of tokens: compare only equal settings. (4) A ruined model scores low, too;
read it beside IRA and CRA. (5) A few seeds give a wide Student interval, which is shown, not hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.attention import read_columns
from fmn_nb.concepts import TEMPLATES, Concept, same_name, written_out
from fmn_nb.evaluation import Session
from fmn_nb.inversion import InversionSettings, invert
from fmn_nb.models import Images, conditions, encode, load_images, tokenized_encoders
from fmn_nb.patches import LearnedTokens, Patch
from fmn_nb.stats import mean_interval

TOKEN = "<anchor>"
SPACES = ("output", "input")
ANCHORS = 6  # real images to invert if none are given
SETTINGS = InversionSettings(tokens=1, steps=150, learning_rate=2e-2, warmup=0, weight_decay=0.0, batch_size=4,
                             norm="free")


@dataclass(frozen=True)
class MScore:
    """M of the original and of the forgetting model, seed by seed (see the module for the definition).

    Attributes:
        original, forgetting: M(m, s) in [-1, 1], in the order of `seeds`.
        space: where embeddings are compared. settings: those of the inversions.
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
        """Original, forgetting and change as rows: mean over seeds, 95% interval (empty for one seed), seeds.

        Intervals are cut to the scores' own range.
        """
        rows = {}
        for name, values in {"original": self.original, "forgetting": self.forgetting, "change": self.changes}.items():
            most, mean = (2.0 if name == "change" else 1.0), sum(values) / len(values)
            low, high = mean_interval(values) if len(self.seeds) > 1 else (None, None)
            rows[name] = {"mean": mean, "low": low and max(low, -most), "high": high and min(high, most)}
        return pd.DataFrame(rows).T.astype(float).assign(seeds=len(self.seeds))

    def to_metrics(self) -> dict[str, Any]:
        """The section m_score of metrics.json."""
        table = self.table()
        ci95 = {name: [row.low, row.high] for name, row in table.iterrows()} if len(self.seeds) > 1 else {}
        return {**table["mean"].to_dict(), "ci95": ci95, "seeds": list(self.seeds), "space": self.space,
                "settings": self.settings}


def m_score(pipe: DiffusionPipeline | Session, concept: Concept, patch: Patch, *, references: Images | None = None,
            seeds: Sequence[int] = (0, 1, 2), settings: InversionSettings = SETTINGS, space: str = "output") -> MScore:
    """Invert the same anchor images with the original and with the forgetting model; `pipe` stays as it is.

    Args:
        references: the anchor images, all of which are used; None for `ANCHORS` real ones of the model's world.
        seeds: one inversion of each model for each; several are needed for an interval.
        settings: those of every inversion.
        space: "output" or "input", where embeddings are compared.

    Raises:
        ValueError: no seeds, a seed twice, or an unknown space.
        MeasurementError: no references.
        ReferenceImageError: one can't be read.
    """
    if space not in SPACES or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"give distinct seeds and a space of {', '.join(SPACES)}, not {list(seeds)} and {space!r}")
    session = Session.of(pipe)
    session.check_fits(patch)
    pipe = session.pipe
    anchors = load_images(references) if references is not None else session.references(concept, None, ANCHORS, 0)
    latents = encode(pipe, anchors)
    own, centre = embedding(pipe, concept, space), centre_of(session, concept, space)
    scores = []
    for change in (None, patch):
        with session.patched(change):
            tokens = (invert(pipe, latents, kind=concept.kind, name=TOKEN, seed=seed, settings=settings)
                      for seed in seeds)
            found = [embedding(pipe, concept, space, learned) for learned in tokens]
        scores.append(tuple(float(F.cosine_similarity(one - centre, own - centre, dim=0)) for one in found))
    return MScore(concept, tuple(seeds), *scores, space, asdict(settings))


@torch.no_grad()
def embedding(pipe: DiffusionPipeline, concept: Concept, space: str = "output", tokens: LearnedTokens | None = None
              ) -> Tensor:
    """e(x) before centring, [width] (several text encoders' one after the other): of the concept's own words, or of
    learned tokens in their place."""
    phrase = tokens.name if tokens else concept.phrase
    prompt, parts = TEMPLATES[concept.kind][0].format(phrase), []
    with tokens.loaded(pipe) if tokens else nullcontext():
        if space == "output":
            states = conditions(pipe, [prompt]).rows["encoder_hidden_states"][0]
            return states[list(read_columns(pipe, prompt, len(states)).find(phrase).columns)].float().mean(0).cpu()
        for _, tokenizer, encoder in tokenized_encoders(pipe):
            ids = torch.tensor(tokenizer(written_out(tokenizer, phrase), add_special_tokens=False)["input_ids"])
            parts.append(encoder.get_input_embeddings()(ids.to(encoder.device)).float().mean(0).cpu())
        return torch.cat(parts)


def centre_of(pipe: DiffusionPipeline | Session, concept: Concept, space: str = "output") -> Tensor:
    """The mean of e over the other objects of the model's vocabulary, [width]."""
    session = Session.of(pipe)
    names = [name for name in session.vocabulary.objects if not same_name(name, concept)]
    return torch.stack([embedding(session.pipe, replace(concept, phrase=name), space) for name in names]).mean(0)
