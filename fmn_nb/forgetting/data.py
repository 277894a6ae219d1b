"""What to forget, as a `Task`, and what a fine-tune learns from: its training sets.

The forget set shows the concept, the retain set everything else, the towards set the reading to show instead. Each has
latents, texts and which text belongs to which latents, all encoded once. A step takes a batch from each; the random
numbers come from one generator per set, in a fixed order, so that a run can be repeated and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from fmn_nb.concepts import Concept, NotThereError, find_phrase, spoken, world_of
from fmn_nb.forgetting.methods.fmn import concept_mask
from fmn_nb.forgetting.prompts import (
    another_like,
    forget_prompts,
    likeness,
    retain_prompts,
    with_article_for,
    without,
)
from fmn_nb.forgetting.request import check_reading, checked_texts, concepts_of, in_its_words
from fmn_nb.forgetting.settings import Settings, SettingsError
from fmn_nb.models.arguments import SEED_LIMIT, checked_seed
from fmn_nb.models.denoising import (
    Conditions,
    Latents,
    NoisyBatch,
    SeedOffset,
    Stream,
    conditions,
    latent_grid,
    noisy_batch,
    seeded,
    with_guidances_empty,
)
from fmn_nb.models.images import ReferenceImageError, encode, generate_latents, generate_trajectories, load_images

_HEAD = 8  # about this many of the most similar prompts come one by one before the ranks thin out
EMPTY_PROMPT_SHARE = 8  # after each so many retain rows one has the empty prompt, the uncond branch of guidance


@dataclass(frozen=True)
class Task:
    """What to forget, in which model, and from which images: the arguments of `forget`, with its images read.

    Attributes:
        references: concept name -> images; concepts without an entry get images that the model generates.
        readings: concept name -> the reading of its word to show instead ("mouse" -> "computer mouse").
        gone: concepts that are forgotten elsewhere, by patches that the model carries or by the rest of a divided task.
    """

    pipe: DiffusionPipeline
    concepts: tuple[Concept, ...]
    settings: Settings
    seed: int = 0
    references: Mapping[str, Sequence[Image.Image]] = field(default_factory=dict)
    prompts: Sequence[str] | None = None
    retain_prompts: Sequence[str] | None = None
    readings: Mapping[str, str] = field(default_factory=dict)
    masks: Sequence[Image.Image] | None = None
    cache: Path | None = None
    gone: Sequence[Concept] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", concepts_of(self.concepts))
        object.__setattr__(self, "seed", checked_seed(self.seed))
        for name in ("prompts", "retain_prompts"):
            object.__setattr__(self, name, checked_texts(name, getattr(self, name)))
        if self.prompts is not None and len(self.concepts) > 1:
            raise ValueError("prompts are a list of texts for a single concept")
        for concept in self.concepts:
            if concept.name in self.readings:
                check_reading(concept, self.readings[concept.name])
            if self.settings.guide:
                for one in (concept, *self.apart_from(concept)):
                    check_reading(one, self.settings.guide, "guide")
        images = sum(self.count_of(concept) for concept in self.concepts)
        if self.masks is not None and len(self.masks) != images:
            raise ReferenceImageError(f"{len(self.masks)} masks for {images} reference images; give one for each")

    def count_of(self, concept: Concept) -> int:
        """How many reference images of the concept there are or will be generated."""
        given = self.references.get(concept.name) if self.settings.noise_on == "images" else None
        return self.settings.reference_count if given is None else len(given)

    def prompts_of(self, concept: Concept) -> list[str]:
        """Prompts that name the concept: those given, or its own in the settings' wording."""
        return list(self.prompts or forget_prompts(self.pipe, concept, self.settings.wording))

    def prompts_of_reading(self, concept: Concept) -> list[str]:
        """The same prompts with the concept's reading in its place, and the article that goes with it."""
        return self.with_word(concept, self.readings[concept.name])

    def guides_of(self, concept: Concept) -> list[str]:
        """For each of the concept's prompts, the prompt that it gives way to: with the concept's reading if it has one,
        otherwise as the setting `guide` says."""
        guide = self.settings.guide
        if concept.name in self.readings:
            return self.prompts_of_reading(concept)
        if guide in ("empty", "without"):
            return ["" if guide == "empty" else without(prompt, concept) for prompt in self.prompts_of(concept)]
        return self.with_word(concept, another_like(self.pipe, concept, self.apart_from(concept))
                              if guide == "another" else guide)

    def apart_from(self, concept: Concept) -> list[Concept]:
        """The other concepts that are gone afterwards, none of which may stand in for this one."""
        return [one for one in (*self.concepts, *self.gone) if one.name != concept.name]

    def with_word(self, concept: Concept, word: str) -> list[str]:
        """The concept's prompts with another word in its place."""
        if self.prompts is None:
            return forget_prompts(self.pipe, Concept(word, concept.kind), self.settings.wording)
        replaced = []
        for prompt in self.prompts:
            for start, end in reversed(find_phrase(prompt, concept.phrase)):
                prompt = with_article_for(word, prompt[:start]) + word + prompt[end:]
            replaced.append(prompt)
        return replaced

    def alone(self, concept: Concept) -> Task:
        """The part of the task that belongs to one concept."""
        before = sum(self.count_of(one) for one in self.concepts[:self.concepts.index(concept)])

        def own(given: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in given.items() if name == concept.name}

        masks = self.masks and self.masks[before:before + self.count_of(concept)]
        return replace(self, concepts=(concept,), references=own(self.references), readings=own(self.readings),
                       masks=masks, gone=self.apart_from(concept))

    def with_scenes(self) -> Task:
        """The task with scenes and exact masks of its model's world as references, if the setting `scenes` asks for
        them, the method learns from images of the concept, the world has them, and no references are given."""
        world, wanted = world_of(self.pipe), self.settings.scenes and self.settings.learns_from_references
        if not wanted or world is None or self.references or self.masks is not None:
            return self
        try:
            found = {concept.name: world.masked_scenes(in_its_words(world.vocabulary, concept),
                                                       self.settings.reference_count) for concept in self.concepts}
        except NotThereError:
            return self
        return replace(self, references={name: load_images(list(images)) for name, (images, _) in found.items()},
                       masks=[mask for _, masks in found.values() for mask in load_images(list(masks))])

    def generated(self, prompts: Sequence[str], offset: int = 0) -> Latents:
        """What the model draws for the prompts, from the task's seed plus `offset`."""
        seed = (self.seed + offset) % SEED_LIMIT
        return generate_latents(self.pipe, prompts, seed=seed, steps=self.settings.reference_steps,
                                guidance=self.settings.guidance, size=self.settings.size, cache=self.cache)


def by_concept(given: Any, concepts: Sequence[Concept], what: str) -> dict[str, Any]:
    """Concept name -> what was given for it, from a mapping or, for a single concept, from the thing itself."""
    if given is None:
        return {}
    names = [concept.name for concept in concepts]
    if not isinstance(given, Mapping):
        if len(names) > 1:
            raise ValueError(f"{what} for several concepts need a mapping from name to {what}: {', '.join(names)}")
        return {names[0]: given}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{what} name '{unknown[0]}', which isn't a concept to forget; those are {', '.join(names)}")
    return dict(given)


# ---- sets and their batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What a step takes from a set: numbers of pairs [batch], of their prompts [batch], and the noised latents."""

    pairs: Tensor
    prompts: Tensor
    noisy: NoisyBatch


@dataclass
class Shuffle:
    """The state of a set's random numbers: its generator, and the shuffled pairs still to come."""

    generator: torch.Generator
    pairs: int
    queue: list[int] = field(default_factory=list)

    def next(self, count: int) -> Tensor:
        """The numbers of the next `count` pairs; each shuffled round goes through all pairs."""
        while len(self.queue) < count:
            self.queue += torch.randperm(self.pairs, generator=self.generator).tolist()
        taken, self.queue = self.queue[:count], self.queue[count:]
        return torch.tensor(taken)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to continue from here, for `restore`."""
        return {"generator": self.generator.get_state(), "queue": torch.tensor(self.queue, dtype=torch.long)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state; a ValueError if its pairs don't belong to this set."""
        queue = state["queue"]
        if queue.dtype != torch.long or queue.ndim != 1 or not bool(((queue >= 0) & (queue < self.pairs)).all()):
            raise ValueError(f"the pairs to come aren't numbers of {self.pairs}")
        self.generator.set_state(state["generator"])
        self.queue = queue.tolist()


@dataclass(frozen=True)
class TrainingSet:
    """Pairs of latents and a prompt.

    Attributes:
        latents: all latents; pair p uses number `latent_of[p]`, and prompt `prompt_of[p]` of `given`.
        given: the encoded prompts.
        texts: the same prompts as text.
        concept: for the forget set, which text columns count as the concept, bool [prompts that name it, columns].
        regions: where the concept is in each of the latents' images, [latents, height, width], or None.
        target_of: for each pair the prompt that the frozen model sees instead, if it is another one.
        guide_of: for each pair of the forget set the prompt that the concept gives way to, if the settings name one.
        times: for latents that are already noisy (trajectories), the timestep of each, [latents].
    """

    latents: Latents
    given: Conditions
    texts: tuple[str, ...]
    latent_of: Tensor
    prompt_of: Tensor
    concept: Tensor | None = None
    regions: Tensor | None = None
    target_of: Tensor | None = None
    guide_of: Tensor | None = None
    times: Tensor | None = None

    def batch(self, shuffle: Shuffle, count: int, timesteps: tuple[int, int], density: Tensor | None = None) -> Batch:
        """`count` pairs, noised to timesteps from .. to - 1. Random numbers go first to the pairs, then to
        `noisy_batch`, then, with a density (a weight for each of these timesteps), to timesteps drawn anew."""
        pairs = shuffle.next(count)
        images = self.latent_of[pairs]
        if self.times is not None:
            there = self.latents.mean[images]
            return Batch(pairs, self.prompt_of[pairs], NoisyBatch(there, torch.zeros_like(there), self.times[images]))
        noisy = noisy_batch(self.latents, images, shuffle.generator, timesteps)
        if density is not None:
            times = timesteps[0] + torch.multinomial(density, count, replacement=True, generator=shuffle.generator)
            noisy = replace(noisy, timesteps=times)
        return Batch(pairs, self.prompt_of[pairs], noisy)


def training_sets(task: Task) -> dict[str, TrainingSet]:
    """The "forget" set and, if the settings ask for them, the "retain" set and the "towards" set."""
    sets = {"forget": forget_set(task)}
    if task.settings.retain_weight:
        sets["retain"] = retain_set(task, sets["forget"])
    if task.readings and task.settings.towards_weight:
        sets["towards"] = towards_set(task)
    return sets


# ---- the forget set -------------------------------------------------------------------------------------------------


def forget_set(task: Task) -> TrainingSet:
    """The concepts' references with prompts that name them, and the prompts that anchor them."""
    own = {concept: task.prompts_of(concept) for concept in task.concepts}
    texts = [prompt for prompts in own.values() for prompt in prompts]
    anchors = [anchor for concept, prompts in own.items()
               for anchor in (task.prompts_of_reading(concept) if concept.name in task.readings
                              else [without(prompt, concept) for prompt in prompts])
               ] if task.settings.anchor_weight else []
    guides = [guide for concept in task.concepts for guide in task.guides_of(concept)] if task.settings.guide else []
    given = conditions(task.pipe, [*texts, *anchors, *guides], size=task.settings.size)
    marked, pairs, parts, every_time, first = [], [], [], [], 0
    for concept, prompts in own.items():
        for prompt in prompts:
            marked.append(concept_mask(task.pipe, prompt, concept.phrase, task.settings.positions,
                                       given.rows["encoder_hidden_states"].shape[1]))
            if not marked[-1].any():  # nothing to move attention away from
                raise SettingsError(f"the positions {', '.join(task.settings.positions)} mark nothing in the prompt "
                                    f"'{prompt}'; add 'words' to them, or give prompts that have such positions")
    for concept, prompts in own.items():
        images = sum(len(part) for part in parts)
        if task.settings.noise_on == "trajectories":
            latents, times, matching = _trajectories(task, prompts, given.time_scale)
            every_time.append(times)
        else:
            drawn = task.guides_of(concept) if task.settings.noise_on == "guide" else prompts
            latents, matching = _references(task, concept, drawn, given.latent_shape)
        parts.append(latents)
        pairs += [(images + image, first + prompt) for image, prompt in matching]
        first += len(prompts)
    everything = Latents.joined(parts)
    regions = None
    if task.masks is not None:
        if (grid := latent_grid(given)) is None:
            raise ReferenceImageError(f"{type(task.pipe).__name__} packs its latents, so masks have no place in them: "
                                      "leave masks out")
        height, width = grid
        # Cropped as `encode` crops the images, so that a mask stays where its image is.
        small = [torch.tensor(list(ImageOps.fit(p.convert("L"), (width, height)).tobytes())) for p in task.masks]
        regions = torch.stack(small).reshape(-1, height, width) / 255  # [images, h * w] -> [images, h, w]
    latent_of, prompt_of = torch.tensor(pairs).T  # [pairs, 2] -> two of [pairs]
    return TrainingSet(everything, given, (*texts, *anchors, *guides), latent_of, prompt_of, torch.stack(marked),
                       regions, target_of=prompt_of + len(texts) if anchors else None,
                       guide_of=prompt_of + len(texts) + len(anchors) if guides else None,
                       times=torch.cat(every_time) if every_time else None)


def _references(task: Task, concept: Concept, prompts: list[str],
                shape: tuple[int, ...]) -> tuple[Latents, list[tuple[int, int]]]:
    """One concept's latents, and which (image, prompt) pairs go together, both counted from 0."""
    images, settings = task.references.get(concept.name), task.settings
    if images is not None and settings.noise_on == "images":
        pairs = [(number % len(images), number % len(prompts)) for number in range(max(len(images), len(prompts)))]
        return encode(task.pipe, images, settings.size), pairs
    count, numbers = settings.reference_count, _spread(settings.reference_count, len(prompts))
    latents = (Latents.exact(torch.zeros(count, *shape)) if settings.noise_on == "zeros"
               else task.generated([prompts[number] for number in numbers]))
    return latents, list(enumerate(numbers))


def _trajectories(task: Task, prompts: list[str], time_scale: float
                  ) -> tuple[Latents, Tensor, list[tuple[int, int]]]:
    """Noisy latents on the way to images of the prompts, the timestep of each, and which prompt goes with each.

    `time_scale` is what the pipeline multiplies timesteps by (`Conditions`).

    Raises:
        SettingsError: none of their timesteps is in the part of the schedule that the settings ask for.
    """
    settings, whole = task.settings, float(task.pipe.scheduler.config.num_train_timesteps)
    numbers = _spread(settings.reference_count, len(prompts))
    latents, times = generate_trajectories(
        task.pipe, [prompts[number] for number in numbers], seed=task.seed, steps=settings.reference_steps,
        guidance=settings.guidance, size=settings.size, cache=task.cache)
    times, steps = times / time_scale, len(times) // len(numbers)
    matching = [(place, numbers[place // steps]) for place, time in enumerate(times.tolist())
                if settings.time_from * whole <= time <= settings.time_to * whole or whole < 2]
    if not matching:
        raise SettingsError(f"no step of {steps} has a timestep from {settings.time_from} to {settings.time_to} of the "
                            "schedule: widen time_from and time_to, or raise reference_steps")
    return latents, times, matching


def _spread(count: int, prompts: int) -> list[int]:
    """Numbers of `count` prompts, spread over all of them and always with the plainest."""
    return [number * prompts // count if count < prompts else number % prompts for number in range(count)]


# ---- the other sets -------------------------------------------------------------------------------------------------


def retain_set(task: Task, forget: TrainingSet) -> TrainingSet:
    """Prompts that name none of the concepts, with images of them or with the references' latents.

    A share of the prompts is chosen by likeness to the concepts (`_bank`); the set always includes the empty prompt,
    which guidance uses as its uncond branch.
    """
    texts = retain_prompts(task.pipe, task.concepts, task.retain_prompts, task.readings.values())
    given = with_guidances_empty(task.pipe, conditions(task.pipe, [*texts, ""], size=task.settings.size))
    if not task.settings.retain_count:
        pairs = torch.cartesian_prod(torch.arange(len(forget.latents)), torch.arange(len(texts) + 1))  # [pairs, 2]
        return TrainingSet(forget.latents, given, (*texts, ""), *pairs.T, times=forget.times)
    named = [spoken(concept).prompt for concept in task.concepts]
    order = likeness(task.pipe, named, texts).argsort(descending=True, stable=True)
    chosen = _bank(order, task.settings, seeded(task.seed, Stream.RETAIN_PROMPTS))
    latents = task.generated([texts[number] for number in chosen], SeedOffset.RETAIN_IMAGES)
    empty = torch.arange(0, len(chosen), EMPTY_PROMPT_SHARE)
    latent_of = torch.cat([torch.arange(len(chosen)), empty])
    prompt_of = torch.cat([torch.tensor(chosen), torch.full_like(empty, len(texts))])
    return TrainingSet(latents, given, (*texts, ""), latent_of, prompt_of)


def _bank(order: Tensor, settings: Settings, generator: torch.Generator) -> list[int]:
    """Numbers of the prompts to draw retain images of: some by likeness to the concept, the others at random.

    The similar ones are spread over the whole order, densely at its head and ever more thinly after it: what is most
    like the concept suffers first.
    """
    similar = round(settings.similar_share * settings.retain_count)
    first, last = math.log10(_HEAD), math.log10(_HEAD + len(order) - 1)
    ranks = torch.logspace(first, last, similar).round().long() - _HEAD
    rest = order[torch.randperm(len(order), generator=generator)]
    others = [rest[index % len(rest)] for index in range(settings.retain_count - similar)]
    return [int(number) for number in (*order[ranks.clamp(max=len(order) - 1)], *others)]


def towards_set(task: Task) -> TrainingSet:
    """For concept correction: images of the readings to show, with the concept's prompts and the readings' own.

    There are `reference_count` of them, and at least one for each prompt.
    """
    texts, pairs = [], []
    for concept in task.concepts:
        if concept.name in task.readings:
            own, other, first = task.prompts_of(concept), task.prompts_of_reading(concept), len(texts)
            texts += own + other
            pairs += [(first + number, first + len(own) + number) for number in range(len(own))]
    chosen = [pairs[number % len(pairs)] for number in range(max(task.settings.reference_count, len(pairs)))]
    latents = task.generated([texts[target] for _, target in chosen], SeedOffset.TOWARDS_IMAGES)
    prompt_of, target_of = torch.tensor(chosen).T  # [images, 2] -> two of [images]
    return TrainingSet(latents, conditions(task.pipe, texts, size=task.settings.size), tuple(texts),
                       torch.arange(len(chosen)), prompt_of, target_of=target_of)
