"""An optimised prompt: words before the prompt that make the forgetting model draw the concept again.

In the spirit of UnlearnDiffAtk (Zhang et al., arXiv 2310.11868): the denoising loss on images of the concept says how
well the model, under a prompt, explains them; the words before the prompt are searched so that it falls. Gradients with
respect to the words' embeddings propose replacements (HotFlip, Ebrahimi et al., arXiv 1712.06751), the exact loss
chooses among them. The result is plain text that anybody can type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from fmn_nb.attacks import TOKEN, Attack, AttackError, asked_for, forgetting, judge_of, references_of, seen
from fmn_nb.concepts import Concept, find_phrase
from fmn_nb.denoising import Conditions, Noising, conditions, predict, seeded
from fmn_nb.evaluation_measures import JudgeLike
from fmn_nb.evaluation_probes import share_of
from fmn_nb.generation import STEPS
from fmn_nb.inversion import LearnedTokens
from fmn_nb.models import denoiser, text_encoders, tokenizers
from fmn_nb.patches import Patch
from fmn_nb.protocol import EMOJI, Vocabulary
from fmn_nb.references import Images, Latents, encode

_AT_ONCE = 64  # rows through the denoiser
_PROPOSED = 32  # best replacements for each place, by the gradient


@dataclass(frozen=True)
class SearchBudget:
    """What a search may spend: words before the prompt, rounds, candidates tried exactly in each, references, noises.

    `images` are drawn afterwards to see whether it worked.
    """

    words: int = 3
    rounds: int = 12
    candidates: int = 16
    references: int = 4
    noises: int = 2
    images: int = 24


@dataclass(frozen=True)
class _Rows:
    """The fixed noised references that every candidate is measured on; row r belongs to prompt `prompt_of[r]`."""

    noisy: Tensor
    target: Tensor
    times: Tensor
    prompt_of: Tensor


def optimised_prompt(pipe: DiffusionPipeline, concept: Concept, patch: Patch | None, *,
                     references: Images | None = None, budget: SearchBudget | None = None, seed: int = 0,
                     judge: JudgeLike | None = None, steps: int = STEPS, vocabulary: Vocabulary = EMOJI) -> Attack:
    """Search words that, put before the concept's prompts, bring it back.

    The words are whole ones of the model's own vocabulary; the concept's name is not among them, it stands in the
    prompt anyway. Unlike UnlearnDiffAtk, which attacks one image at a time, one prefix is searched for all references
    and judged on fresh seeds. `found` holds the prefix, the losses, and the success of a random prefix of the same
    length: what lies above it is the search's own.

    Raises:
        AttackError: no judge, too few references, or no tokenizer with whole words (CLIP's) to search in.
    """
    started, budget, judge = perf_counter(), budget or SearchBudget(), judge_of(pipe, judge)
    known = whole_words(pipe, concept)
    prompts = [d.prompt for d in asked_for(concept, budget.references, seed, vocabulary)]
    pictures = references_of(pipe, concept, references, budget.references, seed, vocabulary)
    asked = asked_for(concept, budget.images, seed, vocabulary)
    generator = seeded(seed, 41)
    first = [known[i] for i in torch.randint(len(known), (budget.words,), generator=generator).tolist()]
    with forgetting(pipe, patch):
        rows = _rows(pipe, encode(pipe, pictures), len(prompts), budget.noises, generator)
        prefix, losses = _search(pipe, prompts, rows, first, known, budget, generator)
        shares = {name: seen(pipe, judge, concept, asked, [" ".join([*words, d.prompt]) for d in asked], steps=steps,
                             vocabulary=vocabulary)
                  for name, words in {"before": [], "random": first, "after": prefix}.items()}
    after = shares["after"]
    found = {"prefix": " ".join(prefix), "loss_first": round(losses[0], 5), "loss_last": round(losses[-1], 5),
             "random_prefix": " ".join(first), "random_success": float(shares["random"].mean())}
    return Attack("optimised prompt", int(after.sum()), len(after), share_of(shares["before"]), budget.rounds,
                  perf_counter() - started, found)


def whole_words(pipe: DiffusionPipeline, concept: Concept) -> list[str]:
    """The words that are one token each in all of the pipeline's tokenizers, without those of the concept's name."""
    first, *others = tokenizers(pipe) or [None]
    if first is None or not any(token.endswith("</w>") for token in first.get_vocab()):
        raise AttackError("the search needs a CLIP tokenizer, whose vocabulary marks whole words")
    vocabulary = first.get_vocab()
    if any(other.get_vocab() != vocabulary for other in others):
        raise AttackError("the search needs tokenizers that share one vocabulary")
    words = sorted(token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    names = f"{concept.name} {concept.phrase}"
    fitting = [word for word in words if len(word) > 1 and word.isascii() and word.isalpha()
               and not find_phrase(names, word)]
    ids = first(fitting, add_special_tokens=False)["input_ids"]
    return [word for word, one in zip(fitting, ids, strict=True) if one == [vocabulary[word + "</w>"]]]


def _rows(pipe: DiffusionPipeline, latents: Latents, prompts: int, noises: int, generator: torch.Generator) -> _Rows:
    """Every reference `noises` times, at timesteps spread over the schedule; shared by all candidates."""
    index = torch.arange(len(latents)).repeat(noises)
    shape, noising = (len(index), *latents.mean.shape[1:]), Noising(pipe)
    noise = torch.randn(shape, generator=generator)
    times = ((torch.arange(len(index)) + 0.5) / len(index) * noising.steps).long()
    times = times[torch.randperm(len(index), generator=generator)]
    clean = latents.mean[index]
    return _Rows(noising.noisy(clean, noise, times), noising.target(clean, noise, times), times, index % prompts)


def _search(pipe: DiffusionPipeline, prompts: Sequence[str], rows: _Rows, prefix: list[str], known: Sequence[str],
            budget: SearchBudget, generator: torch.Generator) -> tuple[list[str], list[float]]:
    """The best prefix, and its loss at the start and after each round."""
    best = _losses(pipe, prompts, rows, [prefix])[0]
    losses = [best]
    for _ in range(budget.rounds):
        scores = _scores(pipe, prompts, rows, prefix, known)  # [words, known]: the loss's change, to first order
        proposed = scores.topk(min(_PROPOSED, len(known)), dim=1, largest=False).indices
        tried = []
        for _ in range(budget.candidates):
            place, which = (int(torch.randint(n, (1,), generator=generator)) for n in proposed.shape)
            tried.append([*prefix[:place], known[int(proposed[place, which])], *prefix[place + 1:]])
        found = _losses(pipe, prompts, rows, tried)
        winner = min(range(len(tried)), key=found.__getitem__)
        if found[winner] < best:
            prefix, best = tried[winner], found[winner]
        losses.append(best)
    return prefix, losses


@torch.no_grad()
def _losses(pipe: DiffusionPipeline, prompts: Sequence[str], rows: _Rows, prefixes: Sequence[Sequence[str]]
            ) -> list[float]:
    """The exact denoising loss of the prompts after each prefix."""
    given = conditions(pipe, [" ".join([*prefix, prompt]) for prefix in prefixes for prompt in prompts])
    count = len(rows.times)
    which = torch.arange(len(prefixes)).repeat_interleave(count)
    row = torch.arange(count).repeat(len(prefixes))
    parts = [_error(pipe, rows, given, row[i : i + _AT_ONCE], which[i : i + _AT_ONCE] * len(prompts))
             for i in range(0, len(row), _AT_ONCE)]
    return torch.cat(parts).reshape(len(prefixes), count).mean(1).tolist()


def _error(pipe: DiffusionPipeline, rows: _Rows, given: Conditions, row: Tensor, first: Tensor | int = 0) -> Tensor:
    """Mean squared error of each row's prediction; its prompt is number `first` + `prompt_of`."""
    model = denoiser(pipe)
    predicted = predict(model, rows.noisy[row].to(model.device), rows.times[row], given, rows.prompt_of[row] + first)
    return F.mse_loss(predicted.float().cpu(), rows.target[row], reduction="none").flatten(1).mean(1)


def _scores(pipe: DiffusionPipeline, prompts: Sequence[str], rows: _Rows, prefix: Sequence[str],
            known: Sequence[str]) -> Tensor:
    """(e_known - e_word) . dloss/de_word for every place and known word, summed over the text encoders."""
    vocabulary = tokenizers(pipe)[0].get_vocab()
    places, words = ([vocabulary[word + "</w>"] for word in some] for some in (prefix, known))
    tables = [encoder.get_input_embeddings().weight.detach() for encoder in text_encoders(pipe)]
    leaves = [table[places].float().requires_grad_() for table in tables]
    with LearnedTokens(TOKEN, tuple(leaves)).loaded(pipe), torch.enable_grad():
        given = conditions(pipe, [f"{TOKEN} {prompt}" for prompt in prompts], with_gradient=True)
        loss = _error(pipe, rows, given, torch.arange(len(rows.times))).mean()
        gradients = torch.autograd.grad(loss, leaves)
    changes = [(table[words].float() @ g.T).T - (leaf.detach() * g).sum(-1, keepdim=True)
               for table, leaf, g in zip(tables, leaves, gradients, strict=True)]
    return torch.stack([change.cpu() for change in changes]).sum(0)
