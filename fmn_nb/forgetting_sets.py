"""What a fine-tune learns from: the forget set (the concept) and the retain set (everything else).

Both are latents, texts and which text belongs to which latents, encoded once. A step draws a batch from each; all
draws come from one generator per set, in a fixed order, so that a run can be repeated and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import ImageOps
from torch import Tensor

from fmn_nb.concepts import Concept, find_phrase
from fmn_nb.denoising import Conditions, conditions, seeded
from fmn_nb.forgetting_prompts import concept_mask, forget_prompts, likeness, retain_prompts, spoken, without
from fmn_nb.forgetting_settings import Settings, SettingsError
from fmn_nb.references import Images, Latents, ReferenceImageError, encode, generate_latents, load_images

_HEAD = 8  # about so many of the most similar prompts come one by one before the ranks thin out
EMPTY_PROMPT_SHARE = 8  # one in so many retain rows has the empty prompt, the uncond branch of guidance


@dataclass(frozen=True)
class Batch:
    """One draw. `prompts` [batch] are numbers into the set's conditions; timesteps [batch] are whole numbers."""

    pairs: Tensor
    prompts: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor


@dataclass
class Draws:
    """Where a set's random draws stand: its generator, and the shuffled pairs that are still to come.

    Attributes:
        weights: probability of each pair, drawn with replacement; None goes through all in shuffled rounds.
    """

    generator: torch.Generator
    pairs: int
    weights: Tensor | None = None
    queue: list[int] = field(default_factory=list)

    def next(self, count: int) -> Tensor:
        """The numbers of the next `count` pairs."""
        if self.weights is not None:
            return torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        while len(self.queue) < count:
            self.queue += torch.randperm(self.pairs, generator=self.generator).tolist()
        taken, self.queue = self.queue[:count], self.queue[count:]
        return torch.tensor(taken)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on from here."""
        return {"generator": self.generator.get_state(), "queue": torch.tensor(self.queue, dtype=torch.long)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.generator.set_state(state["generator"])
        self.queue = state["queue"].tolist()


@dataclass(frozen=True)
class TrainingSet:
    """Pairs of latents and a prompt.

    Attributes:
        latents: all latents; pair p uses number `latent_of[p]`, and prompt `prompt_of[p]` of `given`.
        given: the encoded prompts.
        texts: the same prompts as text.
        concept: for the forget set, which text columns count as the concept, bool [prompts that name it, columns].
        regions: where in each of the latents' images the concept is, [latents, height, width], or None.
        weights: probability of each pair (None: all in shuffled rounds).
        target_of: for each pair the prompt that the frozen model sees instead, where it is another one.
    """

    latents: Latents
    given: Conditions
    texts: tuple[str, ...]
    latent_of: Tensor
    prompt_of: Tensor
    concept: Tensor | None = None
    regions: Tensor | None = None
    weights: Tensor | None = None
    target_of: Tensor | None = None

    def draws(self, generator: torch.Generator) -> Draws:
        """A fresh sequence of draws."""
        return Draws(generator, len(self.latent_of), self.weights)

    def batch(self, draws: Draws, count: int, timesteps: tuple[int, int]) -> Batch:
        """`count` pairs, noised: drawn in the order pairs, posterior noise, noise, timesteps (from .. to - 1)."""
        pairs = draws.next(count)
        shape = (count, *self.latents.mean.shape[1:])
        spread = torch.randn(shape, generator=draws.generator)
        noise = torch.randn(shape, generator=draws.generator)
        times = torch.randint(*timesteps, (count,), generator=draws.generator)
        latents = self.latents.sample(self.latent_of[pairs], spread)
        return Batch(pairs, self.prompt_of[pairs], latents, noise, times)


def forget_set(
    pipe: DiffusionPipeline,
    concepts: Sequence[Concept],
    references: Mapping[str, Images],
    prompts: Sequence[str] | None,
    masks: Images | None,
    settings: Settings,
    seed: int,
    cached: Latents | None = None,
    readings: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
) -> TrainingSet:
    """The concepts' references with prompts that name them, and the prompts that anchor them.

    Args:
        references: concept name -> images; concepts without an entry get images that the model generates.
        prompts: prompts to use instead of the concepts' own (each must hold its concept's phrase).
        masks: pictures, one for each reference image in order, white where the concept is.
        cached: the latents of an earlier, identical call.
        readings: concept name -> the reading that its anchors say in its place.
        cache: a folder that keeps what the model draws, see `generate_latents`.

    Raises:
        PhraseNotFoundError, ReferenceImageError
        SettingsError: in some prompt the settings' positions mark nothing.
    """
    texts, anchors, owners, own_texts = [], [], [], []
    for concept in concepts:
        own = list(prompts) if prompts is not None else forget_prompts(pipe, concept, settings.prompts)
        reading = (readings or {}).get(concept.name)
        if settings.anchor_weight:
            anchors += (_with_reading(pipe, concept, reading, prompts, settings) if reading
                        else [without(prompt, concept) for prompt in own])
        texts, owners, own_texts = texts + own, owners + [concept] * len(own), [*own_texts, own]
    given = conditions(pipe, [*texts, *anchors], size=settings.size)
    marked = _marked(pipe, texts, owners, settings, given.rows["encoder_hidden_states"].shape[1])
    pairs, parts, first = [], [], 0
    for concept, own in zip(concepts, own_texts, strict=True):
        latents = sum(len(part) for part in parts)
        found, matching = _latents(pipe, concept, own, references.get(concept.name), settings, seed, cached is None,
                                   cache)
        parts.append(found)
        pairs += [(latents + image, first + prompt) for image, prompt in matching]
        first += len(own)
    if settings.noise_on == "zeros":
        everything = Latents.exact(torch.zeros(sum(len(part) for part in parts), *given.latent_shape))
    else:
        everything = cached or Latents.joined(parts)
    regions = _regions(masks, everything) if masks is not None else None
    latent_of, prompt_of = torch.tensor(pairs).T
    return TrainingSet(everything, given, (*texts, *anchors), latent_of, prompt_of, marked, regions,
                       target_of=prompt_of + len(texts) if anchors else None)


def retain_set(
    pipe: DiffusionPipeline,
    concepts: Sequence[Concept],
    given_prompts: Sequence[str] | None,
    readings: Iterable[str],
    forget: TrainingSet,
    settings: Settings,
    seed: int,
    cached: Latents | None = None,
    cache: str | Path | None = None,
) -> TrainingSet:
    """Prompts that name none of the concepts, with images of them or with the references' latents.

    A share of the prompts is chosen by likeness to the concepts (`_bank`); the empty prompt, which guidance uses as
    its uncond branch, is always among them.
    """
    texts = retain_prompts(pipe, concepts, given_prompts, readings)
    generator = seeded(seed, 2)
    given = conditions(pipe, [*texts, ""], size=settings.size)
    named = [spoken(concept).prompt for concept in concepts]
    order = likeness(pipe, named, texts).argsort(descending=True, stable=True)
    if settings.retain_count:
        chosen = _bank(order, settings, generator)
        latents = cached or generate_latents(
            pipe, [texts[number] for number in chosen], seed=seed + 1, steps=settings.reference_steps,
            guidance=settings.guidance, size=settings.size, cache=cache)
        empty = torch.arange(0, len(chosen), EMPTY_PROMPT_SHARE)
        latent_of = torch.cat([torch.arange(len(chosen)), empty])
        prompt_of = torch.cat([torch.tensor(chosen), torch.full_like(empty, len(texts))])
        return TrainingSet(latents, given, (*texts, ""), latent_of, prompt_of)
    likely = torch.full((len(texts) + 1,), (1 - settings.similar_share) / len(texts))
    quarter = order[: max(1, len(texts) // 4)]
    likely[quarter] += settings.similar_share / len(quarter)
    likely[-1] = 1 / EMPTY_PROMPT_SHARE
    count = len(forget.latents)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(len(texts) + 1))
    return TrainingSet(forget.latents, given, (*texts, ""), pairs[:, 0], pairs[:, 1], weights=likely.repeat(count))


def towards_set(
    pipe: DiffusionPipeline, concepts: Sequence[Concept], readings: Mapping[str, str], prompts: Sequence[str] | None,
    settings: Settings, seed: int, cached: Latents | None = None, cache: str | Path | None = None,
) -> TrainingSet:
    """For concept correction: images of the readings to show, with the concept's prompts and the readings' own.

    There are `reference_count` of them, and at least one for each prompt.

    Args:
        readings: concept name -> the reading that is to show ("mouse" -> "computer mouse").
        prompts: prompts to use instead of the concept's own; the reading's then say the reading in the phrase's place.
    """
    texts, pairs = [], []
    for concept in concepts:
        if concept.name in readings:
            own = list(prompts or forget_prompts(pipe, concept, settings.prompts))
            other = _with_reading(pipe, concept, readings[concept.name], prompts, settings)
            first = len(texts)
            texts += own + other
            pairs += [(first + number, first + len(own) + number) for number in range(len(own))]
    chosen = [pairs[number % len(pairs)] for number in range(max(settings.reference_count, len(pairs)))]
    latents = cached or generate_latents(
        pipe, [texts[target] for _, target in chosen], seed=seed + 2, steps=settings.reference_steps,
        guidance=settings.guidance, size=settings.size, cache=cache)
    prompt_of, target_of = torch.tensor(chosen).T
    return TrainingSet(latents, conditions(pipe, texts, size=settings.size), tuple(texts),
                       torch.arange(len(chosen)), prompt_of, target_of=target_of)


def _with_reading(
    pipe: DiffusionPipeline, concept: Concept, reading: str, prompts: Sequence[str] | None, settings: Settings
) -> list[str]:
    """The concept's prompts, each with the reading in its place (and the article that goes with it)."""
    if prompts is not None:
        return [_in_its_place(prompt, concept.phrase, reading) for prompt in prompts]
    return forget_prompts(pipe, Concept(reading, concept.kind), settings.prompts)


def _in_its_place(prompt: str, phrase: str, reading: str) -> str:
    for start, end in reversed(find_phrase(prompt, phrase)):
        prompt = prompt[:start] + reading + prompt[end:]
    return prompt


def _bank(order: Tensor, settings: Settings, generator: torch.Generator) -> list[int]:
    """Numbers of the prompts to draw retain images of: some most like the concept, the others at random.

    The similar ones are spread over the whole order, dense at its head and ever more thinly: what is most like the
    concept suffers first.
    """
    similar = round(settings.similar_share * settings.retain_count)
    first, last = math.log10(_HEAD), math.log10(_HEAD + len(order) - 1)
    ranks = torch.logspace(first, last, similar).round().long() - _HEAD
    rest = order[torch.randperm(len(order), generator=generator)]
    others = [rest[index % len(rest)] for index in range(settings.retain_count - similar)]
    return [int(number) for number in (*order[ranks.clamp(max=len(order) - 1)], *others)]


def _marked(
    pipe: DiffusionPipeline, texts: Sequence[str], owners: Sequence[Concept], settings: Settings, length: int
) -> Tensor:
    """Which of the `length` text columns count as the concept: bool [texts, columns]."""
    masks = [concept_mask(pipe, text, concept.phrase, settings.positions, length)
             for text, concept in zip(texts, owners, strict=True)]
    empty = [text for text, mask in zip(texts, masks, strict=True) if not mask.any()]
    if empty:  # nothing to move attention away from
        raise SettingsError(f"the positions {', '.join(settings.positions)} mark nothing in the prompt '{empty[0]}'; "
                            "add 'words' to them, or give prompts that have such positions")
    return torch.stack(masks)


def _latents(
    pipe: DiffusionPipeline, concept: Concept, prompts: list[str], images: Images | None, settings: Settings,
    seed: int, needed: bool, cache: str | Path | None,
) -> tuple[Latents, list[tuple[int, int]]]:
    """One concept's latents, and which (image, prompt) go together, both counted from 0.

    Where nothing needs to be encoded (pure noise, or latents that are cached) there are only placeholders.
    """
    if images is not None and settings.noise_on == "images":
        loaded = load_images(images)
        count = max(len(loaded), len(prompts))
        pairs = [(number % len(loaded), number % len(prompts)) for number in range(count)]
        return (encode(pipe, loaded, settings.size) if needed else _placeholder(len(loaded))), pairs
    count = settings.reference_count
    # Spread over all prompts, the plainest always among them; image and prompt then match.
    numbers = [number * len(prompts) // count if count < len(prompts) else number % len(prompts)
               for number in range(count)]
    if settings.noise_on == "zeros" or not needed:
        return _placeholder(count), list(enumerate(numbers))
    drawn = generate_latents(pipe, [prompts[number] for number in numbers], seed=seed, cache=cache,
                             steps=settings.reference_steps, guidance=settings.guidance, size=settings.size)
    return drawn, list(enumerate(numbers))


def _placeholder(count: int) -> Latents:
    return Latents.exact(torch.zeros(count, 1))


def _regions(masks: Images, latents: Latents) -> Tensor:
    pictures = load_images(masks)
    if len(pictures) != len(latents) or latents.mean.ndim != 4:
        raise ReferenceImageError(f"{len(pictures)} masks for {len(latents)} reference images; give one for each")
    height, width = latents.mean.shape[-2:]
    # Cropped as `encode` crops the images, so that a mask stays where its image is.
    small = [torch.tensor(list(ImageOps.fit(p.convert("L"), (width, height)).tobytes())) for p in pictures]
    return torch.stack(small).reshape(-1, height, width) / 255
