"""Forgetting with an adversary: forget what attacks find, too, first in rounds and then everything at once.

A patch trained on the concept's own words cuts the way from these words; textual inversion finds another. So the
fine-tune of Forget-Me-Not runs against an adversary that works on the text, and remembers each of its finds:

1. Erase with few steps, from the original weights, on the concept's prompts and on the *pool* of all finds so far.
2. Probe what is left, on the model that carries this erasure:
   - in closed form (RECE; Gong et al., arXiv 2407.12383): the embeddings e' to which keys and values now answer as they
     did to the concept's e, for all weights W' at once,  e' = (sum W'^T W' + r I)^-1 (sum W'^T W + r I) e, with r a
     tenth of the first sum's mean diagonal (RECE has no r in the second bracket: here, nothing moves without a change);
   - by gradients (STEREO; Srivatsan et al., arXiv 2408.16807): textual inversion on the concept's references, once from
     its word and once from random vectors, with one token and with two in turn.
   Each find takes the concept's place in all of its prompts and joins the pool.
3. After `rounds` of these, erase once from the original weights with the whole pool, as STEREO does, so that what the
   rounds' erasures damaged doesn't add up.

Finds and plain prompts come equally often, for every concept. Re-steering takes attention from a find's own columns and
from all later ones, which it reaches through the causal text encoder; the anchor pulls the prediction with it to the
frozen model's prediction without the concept. The retain pairs that the last erasure hurt most come twice as often
(adversarial preservation; Bui et al., arXiv 2410.15618).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.attention import text_parts
from fmn_nb.forgetting.methods.fmn import concept_mask, objective
from fmn_nb.inversion import InversionSettings, invert
from fmn_nb.models import (
    Latents,
    Noising,
    NoisyBatch,
    Stream,
    UnsupportedPipelineError,
    conditions,
    denoiser,
    predict_noisy,
    seeded,
)
from fmn_nb.patches.least_squares import COLUMNS, text_inputs

if TYPE_CHECKING:
    from fmn_nb.concepts import Concept
    from fmn_nb.forgetting.data import Task, TrainingSet
    from fmn_nb.patches import Patch

__all__ = ["Find", "findings", "objective", "with_finds", "with_hurt_pairs"]

TOKEN = "<find>"
POSITIONS = ("words", "later", "first_eot", "padding")  # of a find: its own columns and all that it reaches
LEARNING_RATE, BATCH = 2e-2, 4  # of an inversion
RIDGE = 0.1  # of the closed form
HURT = 0.25  # of the retain pairs come twice
_AT_ONCE = 32


@dataclass(frozen=True)
class Find:
    """What stands for the concept in its prompts.

    Attributes:
        rows: the denoiser's arguments with it in the concept's place, one row for each of the concept's prompts.
        concept: which text columns are its own or lie within its reach, bool [prompts, columns].
        prompts: the numbers of these prompts in the forget set, [prompts].
    """

    rows: Mapping[str, Tensor]
    concept: Tensor
    prompts: Tensor


def findings(task: Task, patch: Patch, forget: TrainingSet, number: int) -> list[Find]:
    """What brings the concepts back on the model with the patch, in round `number` from 0."""
    found, first = [], 0
    for concept in task.concepts:
        prompts = torch.arange(first, first := first + len(task.prompts_of(concept)))
        if number == 0:
            found += closed_form(task, patch, forget, prompts)
        found += [inverted(task, patch, forget, prompts, concept, number, fresh) for fresh in (False, True)]
    return found


def closed_form(task: Task, patch: Patch, forget: TrainingSet, prompts: Tensor) -> list[Find]:
    """The embeddings to which keys and values answer as before; none if a denoiser has no such weights."""
    try:
        weights = next(one.weights for one in text_inputs(task.pipe) if one.argument == COLUMNS)
    except UnsupportedPipelineError:
        return []
    changes = dict(patch.differences())
    before = {name: weight.cpu().double() for name, weight in weights.items()}
    after = {name: weight + changes.get(f"{name}.weight", torch.zeros(1)).double() for name, weight in before.items()}
    gram = sum(weight.T @ weight for weight in after.values())
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    wanted = sum(after[name].T @ before[name] for name in after)
    brought = torch.linalg.solve(gram + ridge, wanted + ridge)  # [in, in]: without a change, nothing moves
    rows = {name: values[prompts.to(values.device)].clone() for name, values in forget.given.rows.items()}
    own, said = forget.concept[prompts], rows[COLUMNS]
    parts = text_parts(task.pipe, own.shape[1])  # of another tokenizer's columns, none comes after the concept
    later = torch.cat([own[:, part.start:part.stop].cumsum(1) > 0 for part in parts], dim=1)  # its own, all after them
    moved = (said.cpu().double() @ brought.T).to(said)
    rows[COLUMNS] = torch.where(later[..., None].to(said.device), moved, said)
    return [Find(rows, later, prompts)]


def inverted(task: Task, patch: Patch, forget: TrainingSet, prompts: Tensor, concept: Concept, number: int,
             fresh: bool) -> Find:
    """What textual inversion of the concept's references finds on the model with the patch in round `number`, from its
    word or from `fresh` random vectors; in turn, one uses one token and the other two."""
    settings = InversionSettings(tokens=1 + (number + fresh) % 2, steps=task.settings.probe_steps, batch_size=BATCH,
                                 learning_rate=LEARNING_RATE, warmup=0, weight_decay=0.0, norm="free")
    seed = (task.seed + 1000 * (2 * number + fresh)) % 2**62
    shown = forget.latent_of[torch.isin(forget.prompt_of, prompts)].unique()
    latents = Latents(forget.latents.mean[shown], forget.latents.std[shown])
    texts = task.with_word(concept, TOKEN)
    with patch.applied(task.pipe):
        learned = invert(task.pipe, latents, kind=concept.kind, name=TOKEN, settings=settings,
                         initial=None if fresh else concept.phrase, seed=seed, size=task.settings.size)
    with learned.loaded(task.pipe), torch.no_grad():
        given = conditions(task.pipe, texts, size=task.settings.size)
        columns = given.rows[COLUMNS].shape[1]
        marked = torch.stack([concept_mask(task.pipe, text, TOKEN, POSITIONS, columns) for text in texts])
    return Find(given.rows, marked, prompts)


def with_finds(forget: TrainingSet, finds: Sequence[Find]) -> TrainingSet:
    """The forget set with the finds beside the plain prompts, on the same images and with the same anchors; finds and
    plain prompts come equally often."""
    if not finds:
        return forget
    given = forget.given
    rows = {name: torch.cat([values, *(find.rows[name].to(values) for find in finds)])
            for name, values in given.rows.items()}
    unmarked = torch.zeros(len(given) - len(forget.concept), forget.concept.shape[1], dtype=torch.bool)
    marked = torch.cat([forget.concept, unmarked, *(find.concept for find in finds)])
    pairs, prompts, first = [], [], len(given)
    for find in finds:
        own = torch.isin(forget.prompt_of, find.prompts).nonzero().flatten()  # pairs of these prompts
        pairs.append(own)
        prompts.append(first + forget.prompt_of[own] - find.prompts[0])
        first += len(find.prompts)
    plain = torch.cat(pairs)  # the same pairs with their own prompts
    pair = torch.cat([plain, plain])

    def same(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[pair]

    return replace(forget, given=replace(given, rows=rows), concept=marked, latent_of=forget.latent_of[pair],
                   prompt_of=torch.cat([forget.prompt_of[plain], *prompts]), target_of=same(forget.target_of),
                   guide_of=same(forget.guide_of))


@torch.no_grad()
def with_hurt_pairs(task: Task, patch: Patch, retain: TrainingSet) -> TrainingSet:
    """The retain set with a quarter of its pairs twice: those on which the patch changes the prediction most."""
    model, noising = denoiser(task.pipe), Noising(task.pipe)
    generator = seeded(task.seed, Stream.RETAIN)
    noise = torch.randn(retain.latents.mean[retain.latent_of].shape, generator=generator)
    times = torch.randint(noising.steps, (len(noise),), generator=generator)

    def predicted() -> Tensor:
        parts = []
        for rows in torch.arange(len(noise)).split(_AT_ONCE):
            batch = NoisyBatch(retain.latents.mean[retain.latent_of[rows]], noise[rows], times[rows])
            parts.append(predict_noisy(model, noising, batch, retain.given, retain.prompt_of[rows]).float().cpu())
        return torch.cat(parts)

    before = predicted()
    with patch.applied(task.pipe):
        after = predicted()
    change = F.mse_loss(after, before, reduction="none").flatten(1).mean(1)  # [pairs, ...] -> [pairs]
    pairs = torch.cat([torch.arange(len(change)), change.topk(max(1, round(HURT * len(change)))).indices])
    return replace(retain, latent_of=retain.latent_of[pairs], prompt_of=retain.prompt_of[pairs])
