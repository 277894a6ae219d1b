"""From the denoiser's calls to steps, images and branches: what each call computes, found out before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fmn_nb.attention_data import ImageText
from fmn_nb.attention_layers import architecture_of, latent_size
from fmn_nb.attention_rows import Generation, PromptWatch, Row, prompt_columns
from fmn_nb.prompt_tokens import PromptTokens


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: its step, what each row is, how many text columns, the latents' size, and gradients."""

    step: int
    rows: tuple[Row | None, ...]
    text_length: int | None
    latents: tuple[int, int] | None
    with_graph: bool


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
        self.denoiser, self.pipe, self.given_prompts = denoiser, pipe, given_prompts
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
        return Call(self._step, tuple(rows), columns, latent_size(self.denoiser, arguments), torch.is_grad_enabled())

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
                    text.negative = self._columns(generation.negative_prompts, {}, number, columns)
            if generation.seeds:
                text.seed = generation.seeds[min(number, len(generation.seeds) - 1)]
            self.images.append(text)

    def _prompt(self, number: int, columns: int) -> PromptTokens | None:
        """What the text columns of an image are: as the user says, or else as the pipeline was told."""
        if self.given_prompts is None:
            return self._columns(self.generation.prompts, self.generation.further_prompts, number, columns)
        given = self.given_prompts[len(self.images) % len(self.given_prompts)]
        return given if isinstance(given, PromptTokens) else self._columns([given], {}, 0, columns)

    def _columns(self, texts: list[str] | None, further: dict[str, list[str]], number: int,
                 columns: int) -> PromptTokens | None:
        """The tokens of the text that belongs to image `number` of the generation."""
        if not texts or self.pipe is None:
            return None
        place = number * len(texts) // max(self.generation.images, len(texts))
        names = architecture_of(self.denoiser).tokenizers
        by_tokenizer = [further.get(name.replace("tokenizer", "prompt"), texts)[place] for name in names]
        return prompt_columns(self.pipe, names, by_tokenizer, columns)
