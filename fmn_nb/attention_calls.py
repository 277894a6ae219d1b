"""From the denoiser's calls to steps, images and branches: what each call computes, found out before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fmn_nb.attention_data import ImageText
from fmn_nb.attention_layers import architecture_of, latent_size
from fmn_nb.attention_rows import Generation, PromptWatch, Row, prompt_columns
from fmn_nb.prompt_tokens import PromptTokens


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    Attributes:
        step: counted from 0 in each generation.
        rows: what each row of the batch is.
        text_length: how many text columns there are.
        latents: their height and width.
        with_graph: whether gradients are on.
        first: whether a generation begins with it.
        text_lengths: how many of the columns are text in each row, where the denoiser was told so by a mask.
    """

    step: int
    rows: tuple[Row | None, ...]
    text_length: int | None
    latents: tuple[int, int] | None
    with_graph: bool
    first: bool = False
    text_lengths: torch.Tensor | None = None


class CallLog:
    """Follows a denoiser's calls.

    A step is one evaluation of each branch. It ends when the timestep changes, or when a branch comes again (from a
    scheduler that evaluates a timestep twice). A generation, with images of its own and steps from 0, begins with the
    first call after prompts were encoded; a bare denoiser's calls are all one generation, each row an image.

    Attributes:
        images: the texts of all images so far.
        timesteps: the timestep of each step.
        branches: the branches seen so far.
    """

    def __init__(self, denoiser: torch.nn.Module, pipe: Any | None,
                 given_prompts: Sequence[str | PromptTokens] | None) -> None:
        self.denoiser, self.pipe = denoiser, pipe
        self.given_prompts = None if given_prompts is None else _readable(given_prompts, denoiser, pipe)
        self.signature = inspect.signature(denoiser.forward)
        self.watch: PromptWatch | None = None
        self.generation: Generation | None = None
        self.images: list[ImageText] = []
        self.timesteps: list[float] = []
        self.branches: set[str] = set()
        self._step, self._timestep = 0, 0.0
        self._branches_of_step: set[str] = set()

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """Understand a call that is about to run from its arguments."""
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        latents = arguments.get("sample", arguments.get("hidden_states"))
        text = arguments.get("encoder_hidden_states")
        text = text if isinstance(text, torch.Tensor) else None
        timestep = arguments.get("timestep")
        timestep = 0.0 if timestep is None else float(torch.as_tensor(timestep).flatten()[0])
        if arguments.get("skip_layers") and self.generation is not None:  # skip-layer guidance: no branch of its own
            return Call(self._step, (None,) * len(latents), None, latent_size(self.denoiser, arguments), False)
        fresh = self._begin_generation()
        again = not fresh and timestep == self._timestep
        rows = self.generation.rows_of(text, len(latents), self._branches_of_step if again else set())
        self._advance({row.branch for row in rows if row is not None}, timestep, fresh, again)
        columns = None if text is None else text.shape[1]
        self._note_images(columns)
        mask = arguments.get("encoder_attention_mask")
        return Call(self._step, tuple(rows), columns, latent_size(self.denoiser, arguments), torch.is_grad_enabled(),
                    fresh, mask.sum(dim=1) if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None)

    def expected_steps(self) -> int | None:
        """How many steps the running pipeline will make; None where that isn't known."""
        steps = getattr(self.pipe, "_num_timesteps", None)
        return steps if self.generation is not None and self.generation.by_pipeline else None

    def _begin_generation(self) -> bool:
        """Take up the generation whose prompts were encoded since the last call, if there is one."""
        ready = self.watch.next_generation() if self.watch is not None else None
        if ready is None and self.generation is not None:
            return False
        self.generation = ready or Generation()
        self.generation.first_image = len(self.images)
        return True

    def _advance(self, branches: set[str], timestep: float, fresh: bool, again: bool) -> None:
        """Count the steps."""
        if not again or branches & self._branches_of_step:
            self._step = 0 if fresh else self._step + 1
            self._branches_of_step, self._timestep = set(), timestep
            if self._step == len(self.timesteps):
                self.timesteps.append(timestep)
        self._branches_of_step |= branches
        self.branches |= branches

    def _note_images(self, columns: int | None) -> None:
        """Note the texts of the generation's images that aren't noted yet."""
        generation = self.generation
        for number in range(len(self.images) - generation.first_image, generation.images):
            text = ImageText()
            if columns is not None:
                text.prompt = self._prompt(number, columns)
                if generation.uncond is not None:
                    text.negative = self._columns(generation.negative_prompts, generation.further_negatives, number,
                                                  columns)
            if generation.seeds:
                text.seed = generation.seeds[min(number, len(generation.seeds) - 1)]
            self.images.append(text)

    def _prompt(self, number: int, columns: int) -> PromptTokens | None:
        """What the text columns of an image are: as the user says, or else as the pipeline was told."""
        if self.given_prompts is None:
            return self._columns(self.generation.prompts, self.generation.further_prompts, number, columns)
        given = self.given_prompts[self._place_of_given(number)]
        return given if isinstance(given, PromptTokens) else self._columns([given], {}, 0, columns)

    def _place_of_given(self, number: int) -> int:
        """Which of the given prompts belongs to image `number` of the generation.

        A generation of as many images, or of a multiple, takes all of them, each for several images in a row, as
        pipelines order them; one of fewer images takes the next ones.

        Raises:
            ValueError: the images can't be shared out among the prompts.
        """
        images, given = self.generation.images, len(self.given_prompts)
        if images % given == 0:
            return number * given // images
        next_one = self.generation.first_image % given
        if next_one + images > given:
            raise ValueError(f"{given} prompts were given for a generation of {images} images: give prompts=[...] one "
                             "text for each image, or one for each prompt whose images they are")
        return next_one + number

    def _columns(self, texts: list[str] | None, further: dict[str, list[str]], number: int,
                 columns: int) -> PromptTokens | None:
        """The tokens of the text that belongs to image `number` of the generation."""
        if not texts or self.pipe is None:
            return None
        place = number * len(texts) // max(self.generation.images, len(texts))
        architecture = architecture_of(self.denoiser)
        names, told = architecture.tokenizers, {name.replace("prompt", "tokenizer"): own[place]
                                                for name, own in further.items() if len(own) == len(texts)}
        read = prompt_columns(self.pipe, names, [told.get(name, texts[place]) for name in names], columns)
        other = architecture.beside
        if read is None or told.get(other, texts[place]) == texts[place] or getattr(self.pipe, other, None) is None:
            return read
        length = min(columns, getattr(self.pipe, other).model_max_length)
        return replace(read, beside=prompt_columns(self.pipe, (other,), [told[other]], length))


def _readable(prompts: Sequence[str | PromptTokens] | str | PromptTokens, denoiser: torch.nn.Module,
              pipe: Any | None) -> list[str | PromptTokens]:
    """The given prompts as a list.

    Raises:
        ValueError: none, or texts whose tokens can't be known here.
    """
    given = [prompts] if isinstance(prompts, str | PromptTokens) else list(prompts)
    if not given:
        raise ValueError("prompts is empty; leave it out, or give one text for each image")
    tokenizers = architecture_of(denoiser).tokenizers
    if any(isinstance(prompt, str) for prompt in given) and (pipe is None or not tokenizers):
        why = "a denoiser alone has no tokenizer" if pipe is None else f"the pipeline of {type(denoiser).__name__} " \
              "wraps prompts in a template of its own"
        raise ValueError(f"{why}, so it isn't known which columns the words of prompts=[...] are: give each as "
                         "fmn_nb.concepts.read_prompt(tokenizer, text), or ask for columns=[...] by number")
    return given
