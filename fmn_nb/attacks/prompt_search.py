"""An optimised prompt: words before the prompt that make the forgetting model draw the concept again.

In the spirit of UnlearnDiffAtk (Zhang et al., arXiv 2310.11868): the denoising loss on images of the concept says how
well the model explains them under a prompt, and we search for words before the prompt that lower it. Gradients with
respect to the words' embeddings propose replacements (HotFlip, Ebrahimi et al., arXiv 1712.06751); the exact loss
chooses among them. The result is plain text that anybody can type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fmn_nb.attacks.attack import TOKEN, Attack
from fmn_nb.concepts import Concept, find_phrase, spoken
from fmn_nb.evaluation import Drawing, MeasurementError, Session, share_of
from fmn_nb.models import (
    Conditions,
    Images,
    Latents,
    Noising,
    Stream,
    conditions,
    denoiser,
    denoising_loss,
    encode,
    seeded,
    spread_batch,
    tokenized_encoders,
    tokenizers,
)
from fmn_nb.patches import LearnedTokens, Patch

_AT_ONCE = 64  # rows through the denoiser
_PROPOSED = 32  # best replacements for each place, by the gradient


@dataclass(frozen=True)
class SearchBudget:
    """What a search may spend: words before the prompt, rounds, candidates tried exactly in each, references, noises.

    `images` says how many images are drawn afterwards to see whether it worked.
    """

    words: int = 3
    rounds: int = 12
    candidates: int = 16
    references: int = 4
    noises: int = 2
    images: int = 24


def adversarial_prompt(pipe: DiffusionPipeline | Session, concept: Concept, patch: Patch | None, *,
                       references: Images | None = None, budget: SearchBudget | None = None, seed: int = 0) -> Attack:
    """Search words that, put before the concept's prompts, bring it back.

    The words are whole words of the model's own vocabulary, without the concept's name, which is in the prompt anyway.
    Unlike UnlearnDiffAtk, which attacks one image at a time, this finds one prefix for all references and judges it on
    fresh seeds. `found` holds the prefix, the losses, and the success of a random prefix of the same length: only what
    lies above that comes from the search.

    Raises:
        MeasurementError: there is no judge, there are too few references, or there is no tokenizer with whole words
            (CLIP's) to search in.
    """
    started, budget, session = perf_counter(), budget or SearchBudget(), Session.of(pipe)
    Noising(session.pipe)  # before anything is drawn
    with session.patched(patch):
        search, first, asked = begin_search(session, concept, references, budget, seed)
        prefix, losses = search.run(first, budget)
        before, random, after = (session.seen(concept, asked, [" ".join([*words, d.prompt]) for d in asked])
                                 for words in ([], first, prefix))
    found = {"prefix": " ".join(prefix), "loss_first": round(losses[0], 5), "loss_last": round(losses[-1], 5),
             "random_prefix": " ".join(first), "random_success": float(random.mean())}
    return Attack("adversarial prompt", int(after.sum()), len(after), share_of(before), budget.rounds,
                  perf_counter() - started, found)


def begin_search(session: Session, concept: Concept, references: Images | None, budget: SearchBudget,
                 seed: int) -> tuple[Search, list[str], list[Drawing]]:
    """A search on the session's model as it is now, the random words that it starts from, and what is drawn to judge
    it.

    Raises:
        MeasurementError: too few references, or no tokenizer with whole words.
    """
    shown = [d.prompt for d in session.fresh_drawings(concept, budget.references, seed)]
    prompts = shown if references is None else [spoken(concept).prompt]  # own images come without a style that is known
    pictures = session.references(concept, references, budget.references, seed)
    known = whole_words(session.pipe, concept)
    asked, generator = session.fresh_drawings(concept, budget.images, seed), seeded(seed, Stream.PROMPT_SEARCH)
    first = [known[i] for i in torch.randint(len(known), (budget.words,), generator=generator).tolist()]
    return (Search(session.pipe, prompts, known, encode(session.pipe, pictures), budget.noises, generator), first,
            asked)


class Search:
    """A search of words before `prompts` that lower the denoising loss on noised references.

    Args:
        known: the words to choose from.
        references: latents; each is noised `noises` times, at timesteps spread over the schedule. All candidates see
            the same noise.
        generator: for the noise and the candidates.
    """

    def __init__(self, pipe: DiffusionPipeline, prompts: Sequence[str], known: Sequence[str], references: Latents,
                 noises: int, generator: torch.Generator) -> None:
        self.pipe, self.prompts, self.known, self.generator = pipe, list(prompts), list(known), generator
        self.noising = Noising(pipe)
        self.batch, index = spread_batch(self.noising, references, noises, generator)
        self.prompt_of = index % len(self.prompts)

    def run(self, prefix: list[str], budget: SearchBudget) -> tuple[list[str], list[float]]:
        """The best prefix, and its loss at the start and after each round."""
        best = self.losses([prefix])[0]
        losses = [best]
        for _ in range(budget.rounds):
            scores = self.scores(prefix)  # [words, known]: the loss's change, to first order
            proposed = scores.topk(min(_PROPOSED, len(self.known)), dim=1, largest=False).indices
            tried = []
            for _ in range(budget.candidates):
                place, which = (int(torch.randint(n, (1,), generator=self.generator)) for n in proposed.shape)
                tried.append([*prefix[:place], self.known[int(proposed[place, which])], *prefix[place + 1:]])
            found = self.losses(tried)
            winner = min(range(len(tried)), key=found.__getitem__)
            if found[winner] < best:
                prefix, best = tried[winner], found[winner]
            losses.append(best)
        return prefix, losses

    @torch.no_grad()
    def losses(self, prefixes: Sequence[Sequence[str]]) -> list[float]:
        """The exact denoising loss of the prompts after each prefix."""
        texts = [" ".join([*prefix, prompt]) for prefix in prefixes for prompt in self.prompts]
        given, count = conditions(self.pipe, texts), len(self.prompt_of)
        row, which = torch.arange(count).repeat(len(prefixes)), torch.arange(len(prefixes)).repeat_interleave(count)
        parts = [self._errors(given, r, self.prompt_of[r] + w * len(self.prompts))
                 for r, w in zip(row.split(_AT_ONCE), which.split(_AT_ONCE), strict=True)]
        return torch.cat(parts).reshape(len(prefixes), count).mean(1).tolist()  # [prefixes * rows] -> [prefixes]

    def scores(self, prefix: Sequence[str]) -> Tensor:
        """(e_known - e_word) . dloss/de_word for every place and known word, summed over the text encoders."""
        vocabulary = tokenizers(self.pipe)[0].get_vocab()
        places, words = ([vocabulary[word + "</w>"] for word in some] for some in (prefix, self.known))
        tables = [encoder.get_input_embeddings().weight.detach() for _, _, encoder in tokenized_encoders(self.pipe)]
        leaves = [table[places].float().requires_grad_() for table in tables]
        with LearnedTokens(TOKEN, tuple(leaves)).loaded(self.pipe), torch.enable_grad():
            given = conditions(self.pipe, [f"{TOKEN} {prompt}" for prompt in self.prompts], with_gradient=True)
            loss = self._errors(given, torch.arange(len(self.prompt_of)), self.prompt_of).mean()
            gradients = torch.autograd.grad(loss, leaves)
        changes = [(table[words].float() @ g.T).T - (leaf.detach() * g).sum(-1, keepdim=True)
                   for table, leaf, g in zip(tables, leaves, gradients, strict=True)]
        return torch.stack([change.cpu() for change in changes]).sum(0)

    def _errors(self, given: Conditions, row: Tensor, prompts: Tensor) -> Tensor:
        """Each row's mean squared error under its prompt, [rows]."""
        return denoising_loss(denoiser(self.pipe), self.noising, self.batch.rows(row), given, prompts, True).cpu()


def whole_words(pipe: DiffusionPipeline, concept: Concept) -> list[str]:
    """The words that are one token each in all of the pipeline's tokenizers, without those of the concept's name."""
    first, *others = tokenizers(pipe) or [None]
    if first is None or not any(token.endswith("</w>") for token in first.get_vocab()):
        raise MeasurementError("the search needs a CLIP tokenizer, whose vocabulary marks whole words")
    vocabulary = first.get_vocab()
    if any(other.get_vocab() != vocabulary for other in others):
        raise MeasurementError("the search needs tokenizers that share one vocabulary")
    words = sorted(token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    names = f"{concept.name} {concept.phrase}"
    fitting = [word for word in words if len(word) > 1 and word.isascii() and word.isalpha()
               and not find_phrase(names, word)]
    ids = first(fitting, add_special_tokens=False)["input_ids"]
    return [word for word, one in zip(fitting, ids, strict=True) if one == [vocabulary[word + "</w>"]]]
