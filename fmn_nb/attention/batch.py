"""Which prompt, image, branch and step each row of a denoiser's batch belongs to.

A generation shows this in three events, and this file follows their order:

1. The pipeline's `encode_prompt` turns prompts into embeddings. `PromptWatch` notes both, as the `Texts` of the two
   branches of the next `Generation`.
2. The pipeline's `prepare_latents` takes the noise from generators. `PromptWatch` adds their seeds.
3. The denoiser is called: with guidance in one batch (uncond first) or in two calls, and with each prompt several times
   if several images of it are asked for. The first call starts the generation. From each call's embeddings, the
   generation recognises the rows; `CallLog` counts the steps and notes the text columns of each new image.

A bare denoiser has only the third event: all its calls are one generation, whose rows are images, all "cond".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch

from fmn_nb.attention.columns import as_encoded, read_columns
from fmn_nb.attention.layers import Arguments, architecture_of
from fmn_nb.concepts.tokens import PromptTokens, UnreadablePromptError
from fmn_nb.models import UnsupportedPipelineError


class Row(NamedTuple):
    """What one row of the denoiser's batch is: the branch ("cond" or "uncond") of an image, counted from 0."""

    branch: str
    image: int


@dataclass
class ImageText:
    """The texts that one image was made from, None if they are unknown; and the timesteps of its steps, None in records
    of earlier versions."""

    prompt: PromptTokens | None = None
    negative: PromptTokens | None = None
    seed: int | None = None
    timesteps: list[float] | None = None


# ---- 1 and 2: prompts are encoded, noise is prepared ----------------------------------------------------------------


@dataclass
class Texts:
    """What the images of one branch are made from.

    Attributes:
        prompts: the texts; None if only embeddings were given.
        further: tokenizer's name ("tokenizer_2") -> prompts that were given for that encoder instead.
        embeddings: what the pipeline made of them, [prompts, tokens, width]; None for a bare denoiser.
    """

    prompts: list[str] | None = None
    further: dict[str, list[str]] = field(default_factory=dict)
    embeddings: torch.Tensor | None = None


class PromptWatch:
    """What a pipeline's `encode_prompt` and `prepare_latents` were called with since the last generation began.

    Embeddings that the user made, to draw with them repeatedly, are remembered as long as this object lives, and
    recognised by their tensors.
    """

    def __init__(self, pipe: Any | None) -> None:
        self.pipe = pipe
        self.pending: Generation | None = None
        self._by_user: list[Texts] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every prompt that the pipeline encodes while this is open; it is put back as it was on exit."""
        if not hasattr(self.pipe, "encode_prompt"):
            part = "unet" if hasattr(self.pipe, "unet") else "transformer"
            raise ValueError(f"{type(self.pipe).__name__} has no encode_prompt, so nobody knows which image and "
                             "branch a row of its batches belongs to: record its denoiser alone, "
                             f"record_attention(pipe.{part}), where each row counts as an image")
        with ExitStack() as stack:
            stack.enter_context(_watched(self.pipe, "encode_prompt", self._encoded))
            if hasattr(self.pipe, "prepare_latents"):
                stack.enter_context(_watched(self.pipe, "prepare_latents", self._latents_prepared))
            yield

    def _encoded(self, arguments: dict[str, Any], result: Any) -> None:
        embeddings = [t for t in (result if isinstance(result, tuple | list) else (result,))
                      if isinstance(t, torch.Tensor) and t.ndim == 3]
        if not embeddings:
            return
        inside, prompts = self._running_call(), _as_list(arguments.get("prompt"))
        earlier = self.pending if self.pending is not None and self.pending.inside is inside else None
        if earlier is not None and earlier.uncond is None and len(embeddings) == 1:
            earlier.uncond = self._texts(arguments, "prompt", embeddings[0])  # Flux, Qwen: a second call for uncond
            self._remember(inside, earlier.uncond)
            return
        if earlier is not None and prompts is not None and prompts == earlier.cond.prompts:
            return  # Hunyuan: the same prompts for a second encoder
        uncond = None if len(embeddings) == 1 else self._texts(arguments, "negative_prompt", embeddings[1])
        if uncond is not None and arguments.get("negative_prompt_embeds") is None:
            uncond.prompts = uncond.prompts or [""]
        self.pending = Generation(self._texts(arguments, "prompt", embeddings[0]), uncond, inside=inside)
        self._remember(inside, self.pending.cond, uncond)

    def _remember(self, inside: FrameType | None, *branches: Texts | None) -> None:
        self._by_user += [texts for texts in branches if inside is None and texts is not None and texts.prompts]

    def _running_call(self) -> FrameType | None:
        """The call of the pipeline that encodes, in a generation; None if the user does, before one."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is self.pipe:
                return frame
            frame = frame.f_back
        return None

    def _texts(self, arguments: dict[str, Any], name: str, embeddings: torch.Tensor) -> Texts:
        """The prompts (or negative prompts) of a call, as the pipeline itself cleans them before encoding (as PixArt
        does): words are looked up in what is encoded."""
        def given(name: str) -> list[str] | None:
            texts = _as_list(arguments.get(name))
            return texts and [as_encoded(self.pipe, text, arguments.get("clean_caption")) for text in texts]

        further = {f"tokenizer_{n}": given(f"{name}_{n}") for n in (2, 3) if arguments.get(f"{name}_{n}")}
        texts = given(name)
        return (self._recognised(embeddings) if texts is None else None) or Texts(texts, further, embeddings)

    def _recognised(self, embeddings: torch.Tensor) -> Texts | None:
        """The texts of embeddings that the user encoded earlier, row by row; None if any row is not one of them."""
        rows = []
        for row in embeddings:
            found = next(((texts, place) for texts in self._by_user
                          for place, same in enumerate(_equal(row, texts.embeddings)) if same), None)
            if found is None:
                return None
            rows.append((found[0], found[1] * len(found[0].prompts) // len(found[0].embeddings)))
        names = set.intersection(*(set(texts.further) for texts, _ in rows)) if rows else set()
        return Texts([texts.prompts[place] for texts, place in rows],
                     {name: [texts.further[name][place] for texts, place in rows] for name in names}, embeddings)

    def _latents_prepared(self, arguments: dict[str, Any], _result: Any) -> None:
        generators = _as_list(arguments.get("generator")) or []
        if self.pending is not None:
            self.pending.by_pipeline = True
            self.pending.seeds = [g.initial_seed() for g in generators if isinstance(g, torch.Generator)]


@contextmanager
def _watched(owner: Any, name: str, seen: Callable[[dict[str, Any], Any], None]) -> Iterator[None]:
    """Call `seen(arguments, result)` after each call of a method; an attribute of the instance shadows the method.

    Several may watch, and end in any order; the last one restores the method.
    """
    if (watchers := getattr(vars(owner).get(name), "watchers", None)) is None:
        watchers = _put_in_front(owner, name)
    watchers.append(seen)
    try:
        yield
    finally:
        watchers.remove(seen)
        now = vars(owner).get(name)
        if not watchers and getattr(now, "watchers", None) is watchers:
            object.__delattr__(owner, name)
            if now.shadowed is not None:
                object.__setattr__(owner, name, now.shadowed)


def _put_in_front(owner: Any, name: str) -> list[Callable[[dict[str, Any], Any], None]]:
    """Shadow a method by one that reports its calls to everyone in the returned list, which starts empty."""
    method, watchers = getattr(owner, name), []
    signature = inspect.signature(method)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for seen in list(watchers):
            seen(dict(bound.arguments), result)
        return result

    watched.watchers, watched.shadowed = watchers, vars(owner).get(name)
    object.__setattr__(owner, name, watched)
    return watchers


def _as_list(value: Any) -> list | None:
    if value is None:
        return None
    return list(value) if isinstance(value, list | tuple) else [value]


# ---- 3: the denoiser is called --------------------------------------------------------------------------------------


@dataclass
class Generation:
    """One call of a pipeline (or all calls of a bare denoiser): its texts and its images.

    Attributes:
        cond, uncond: the texts of both branches; `uncond` is missing without guidance, or before it starts.
        first_image: the number of its first image among all recorded images.
        images: how many images have appeared so far.
        by_pipeline: whether a pipeline prepared it, rather than someone who only encodes prompts with it.
        inside: the call of the pipeline that encodes its prompts, until the denoiser is called. If it fails before, no
            other call's texts may join its own.
        timesteps: those of its steps so far.
    """

    cond: Texts = field(default_factory=Texts)
    uncond: Texts | None = None
    seeds: list[int] = field(default_factory=list)
    first_image: int = 0
    images: int = 0
    by_pipeline: bool = False
    inside: FrameType | None = None
    timesteps: list[float] = field(default_factory=list)
    _last: tuple[torch.Tensor, tuple[str, ...]] | None = None

    def rows_of(self, text: torch.Tensor | None, batch: int, seen: set[str]) -> list[Row | None]:
        """What each of `batch` rows is, given the embeddings [batch, tokens, width] that the denoiser was called with;
        None for a row that repeats an image's branch (perturbed-attention guidance adds such rows).

        `seen` are the branches that already ran at this step; they decide for pipelines that call the branches one
        after another with the same text in both.
        """
        counts = {"cond": 0, "uncond": 0}
        rows: list[Row | None] = []
        known = self.cond.embeddings
        for branch in self._branches(text, batch, seen):
            repeated = known is not None and counts[branch] >= len(known)
            rows.append(None if repeated else Row(branch, self.first_image + counts[branch]))
            counts[branch] += 1
        self.images = max(self.images, *(row.image - self.first_image + 1 for row in rows if row is not None), 0)
        return rows

    def _branches(self, text: torch.Tensor | None, batch: int, seen: set[str]) -> tuple[str, ...]:
        if self.cond.embeddings is None:
            return ("cond",) * batch
        if self._last is not None and self._last[0] is text:
            return self._last[1]
        cond, uncond = (_matches(text, side and side.embeddings) for side in (self.cond, self.uncond))
        images, by_order = len(self.cond.embeddings), []
        for row in range(batch):  # diffusers' order: uncond before cond in one batch, cond first in two calls
            in_one_batch = batch >= 2 * images
            first_half = row < images if in_one_batch else ("cond" in seen and "uncond" not in seen)
            by_order.append("uncond" if first_half and self.uncond is not None else "cond")
        branches = tuple(
            order if is_cond == is_uncond else ("cond" if is_cond else "uncond")
            for order, is_cond, is_uncond in zip(by_order, cond or [False] * batch, uncond or [False] * batch,
                                                 strict=True))
        if text is not None and cond != uncond:
            self._last = (text, branches)
        return branches


def _matches(text: torch.Tensor | None, known: torch.Tensor | None) -> list[bool] | None:
    """For each row of `text`, whether it is one of the `known` embeddings; None if that can't be decided."""
    if text is None or known is None or text.shape[1:] != known.shape[1:]:
        return None
    return [any(_equal(row, known)) for row in text]


def _equal(row: torch.Tensor, known: torch.Tensor) -> Iterator[bool]:
    """For each row of the `known` embeddings, whether it is this one, in any precision and on any device."""
    return (row.shape == other.shape and torch.equal(row, other.to(row)) for other in known)


class Call(NamedTuple):
    """One call of the denoiser: its step, from 0 in each generation; what each row is; whether a generation begins."""

    step: int
    rows: tuple[Row | None, ...]
    first: bool = False


class CallLog:
    """Follows a denoiser's calls.

    A step is one evaluation of each branch. It ends when the timestep changes, or when a branch comes again (from a
    scheduler that evaluates a timestep twice). A generation, with images of its own and steps from 0, begins with the
    first call after prompts were encoded; a bare denoiser's calls are all one generation, and each row is an image.

    Attributes:
        watch: what the pipeline reports; nothing for a bare denoiser.
        images, timesteps, branches: the texts of all images, the timestep of each step and the branches so far.
    """

    def __init__(self, denoiser: torch.nn.Module, pipe: Any | None,
                 given_prompts: Sequence[str | PromptTokens] | None) -> None:
        self.pipe = pipe
        self.given_prompts = None if given_prompts is None else _readable(given_prompts, denoiser, pipe)
        self.watch = PromptWatch(pipe)
        self.generation: Generation | None = None
        self.images: list[ImageText] = []
        self.timesteps: list[float] = []
        self.branches: set[str] = set()
        self._step, self._timestep = 0, 0.0
        self._branches_of_step: set[str] = set()

    def begin(self, arguments: Arguments) -> Call:
        """Understand a call that is about to run from its arguments."""
        if arguments.skips_layers and self.generation is not None:  # skip-layer guidance: no branch of its own
            return Call(self._step, (None,) * arguments.batch)
        ready, self.watch.pending = self.watch.pending, None
        fresh = ready is not None or self.generation is None
        if fresh:
            self.generation = ready or Generation()
            self.generation.first_image, self.generation.inside = len(self.images), None
        again = not fresh and arguments.timestep == self._timestep
        rows = self.generation.rows_of(arguments.text, arguments.batch, self._branches_of_step if again else set())
        branches = {row.branch for row in rows if row is not None}
        if not again or branches & self._branches_of_step:
            self._step = 0 if fresh else self._step + 1
            self._branches_of_step, self._timestep = set(), arguments.timestep
            for timesteps in (self.timesteps, self.generation.timesteps):
                if self._step == len(timesteps):
                    timesteps.append(arguments.timestep)
        self._branches_of_step |= branches
        self.branches |= branches
        self._note_images(arguments, rows)
        return Call(self._step, tuple(rows), fresh)

    def _note_images(self, arguments: Arguments, rows: Sequence[Row | None]) -> None:
        """Note the texts of the generation's new images: those that the user gave, or else those that the pipeline
        got."""
        generation = self.generation
        for number in range(len(self.images) - generation.first_image, generation.images):
            text = ImageText(timesteps=generation.timesteps)
            if arguments.columns is not None:
                seen = {row.branch: arguments.text[place] for place, row in enumerate(rows)
                        if row is not None and row.image == generation.first_image + number}
                if self.given_prompts is None:
                    text.prompt = self._read(generation.cond, number, arguments.columns, seen.get("cond"))
                else:
                    text.prompt = self._read_given(number, arguments.columns, seen.get("cond"))
                if generation.uncond is not None:
                    text.negative = self._read(generation.uncond, number, arguments.columns, seen.get("uncond"))
            if generation.seeds:
                text.seed = generation.seeds[min(number, len(generation.seeds) - 1)]
            self.images.append(text)

    def _place_of_given(self, number: int) -> int:
        """Which of the given prompts belongs to image `number` of the generation.

        A generation of as many images, or of a multiple, takes all of them, each for several successive images, as
        pipelines order them; a generation of fewer images takes the next ones.
        """
        images, given = self.generation.images, len(self.given_prompts)
        if images % given == 0:
            return number * given // images
        next_one = self.generation.first_image % given
        if next_one + images > given:
            raise ValueError(f"{given} prompts were given for a generation of {images} images: give prompts=[...] one "
                             "text for each image, or one for each prompt whose images they are")
        return next_one + number

    def _read_given(self, number: int, columns: int, seen: torch.Tensor | None) -> PromptTokens | None:
        """The columns of the text that the user gave for image `number`; an error if they can't belong to it."""
        given = self.given_prompts[self._place_of_given(number)]
        if isinstance(given, PromptTokens):
            return given
        seen = self._embeddings(self.generation.cond, number) if seen is None else seen
        with suppress(UnsupportedPipelineError):
            return read_columns(self.pipe, given, columns, embeddings=seen)
        return None

    def _read(self, texts: Texts, number: int, columns: int, seen: torch.Tensor | None) -> PromptTokens | None:
        """The columns of the text that belongs to image `number` of the generation; None if they are unknown.

        `seen` are its embeddings [columns, width] in this call of the denoiser, if the call holds its branch.
        """
        prompts = texts.prompts
        if not prompts or self.pipe is None:
            return None
        place = number * len(prompts) // max(self.generation.images, len(prompts))
        others = {name: own[place] for name, own in texts.further.items() if len(own) == len(prompts)}
        seen = self._embeddings(texts, number) if seen is None else seen
        with suppress(UnsupportedPipelineError, UnreadablePromptError):
            return read_columns(self.pipe, prompts[place], columns, others, seen, cleaned=True)
        return None

    def _embeddings(self, texts: Texts, number: int) -> torch.Tensor | None:
        """What the pipeline made of the text of image `number`, [columns, width]."""
        known = texts.embeddings
        return None if known is None else known[number * len(known) // max(self.generation.images, len(known))]


def _readable(prompts: Sequence[str | PromptTokens] | str | PromptTokens, denoiser: torch.nn.Module,
              pipe: Any | None) -> list[str | PromptTokens]:
    """The given prompts as a list; a ValueError if there is none, or if their tokens can't be known here."""
    given = [prompts] if isinstance(prompts, str | PromptTokens) else list(prompts)
    if not given:
        raise ValueError("prompts is empty; leave it out, or give one text for each image")
    if any(isinstance(prompt, str) for prompt in given) and (pipe is None or not architecture_of(denoiser).tokenizers):
        why = "a denoiser alone has no tokenizer" if pipe is None else f"the pipeline of {type(denoiser).__name__} " \
              "wraps prompts in a template of its own"
        raise ValueError(f"{why}, so nobody knows which columns hold the words of prompts=[...]: give each as "
                         "fmn_nb.concepts.tokens.read_prompt(tokenizer, text), or ask for columns=[...] by number")
    return given
