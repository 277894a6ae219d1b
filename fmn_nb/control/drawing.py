"""Draw with interactions: tokens beside the prompt for the first part of the steps, the plain model for the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.control.grounding import Tokens, tokens_of
from fmn_nb.control.interaction import Interaction, InteractionError, parse_interactions
from fmn_nb.models import STEPS, generate
from fmn_nb.models.arguments import finite_number, whole_number

STRENGTH = 0.8  # share of the steps in which the boxes count
#: less than without boxes: more of it blurs what stands in them (the card of emoji-grounded has the figures)
GUIDANCE = 2.5
AT_ONCE = 24


@dataclass(frozen=True)
class How:
    """How grounded images are drawn: the share of steps with grounding, steps, guidance, images in one call of the
    pipeline, and what `tokens_of` takes."""

    strength: float = STRENGTH
    steps: int = STEPS
    guidance: float = GUIDANCE
    batch: int = AT_ONCE
    without: Collection[str] = ()
    said: dict[str, str] = field(default_factory=dict)


def draw_interactions(pipe: DiffusionPipeline, prompt: str, interactions: Sequence[Interaction] | Interaction | str,
                      seeds: Sequence[int] = (0,), strength: float = STRENGTH, *, steps: int = STEPS,
                      guidance: float = GUIDANCE) -> list[Image.Image]:
    """Draw a prompt with things where the interactions say; one image for each seed.

    Args:
        pipe: a gated model, such as `fmn.load("emoji-grounded")`.
        prompt: says the rest (style, background), and may also name the things; may be "".
        interactions: one or several, or their text form ("cat=chasing=frog; dog=above=key"). Missing boxes are laid
            out as the actions say (`laid_out`).
        strength: the share of the steps, from the first, in which the boxes count: with 0 the plain model draws, with
            1 the boxes count to the end.

    Raises:
        InteractionError: a model without gated layers, a word that it doesn't know, too many interactions, no place.
        ValueError: an invalid number, or a strength outside [0, 1].
    """
    if isinstance(interactions, str):
        interactions = parse_interactions(interactions)
    elif isinstance(interactions, Interaction):
        interactions = [interactions]
    seeds = list(seeds)
    return draw_grounded(pipe, [prompt] * len(seeds), [list(interactions)] * len(seeds), seeds,
                         How(strength, steps, guidance))


def draw_grounded(pipe: DiffusionPipeline, prompts: Sequence[str], interactions: Sequence[Sequence[Interaction]],
                  seeds: Sequence[int], how: How | None = None, **options: Any) -> list[Image.Image]:
    """One image for each prompt, its interactions and its seed; `options` go to `generate`.

    Raises:
        What `draw_interactions` raises, and ValueError for lists of different lengths.
    """
    how = how or How()
    strength = finite_number("strength", how.strength, 0)
    if strength > 1:
        raise ValueError(f"strength must be a share of the steps from 0 to 1, not {strength:g}")
    whole_number("batch", how.batch, 1)
    if not len(prompts) == len(interactions) == len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(interactions)} lists of interactions, {len(seeds)} seeds: give "
                         "as many of each")
    for each in interactions:
        if not all(isinstance(one, Interaction) for one in each):
            raise InteractionError(f"give interactions, not {each!r}: fmn.Interaction('cat', 'chasing', 'frog')")
    tokens = tokens_of(pipe, interactions, how.without, how.said) if len(prompts) else None
    images = []
    for start in range(0, len(prompts), how.batch):
        part = slice(start, start + how.batch)
        given = scheduled(tokens[part], strength, how, options)
        images += generate(pipe, prompts[part], seeds[part], steps=how.steps, guidance=how.guidance, batch=how.batch,
                           **given)
    return images


def scheduled(tokens: Tokens, strength: float, how: How, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The pipeline's arguments that ground the first `strength` of the steps and leave the rest to the plain model,
    with `options`: what they have for attention stands beside the tokens, and their callback is called, too."""
    options = dict(options or {})
    if not round(strength * how.steps):
        return options
    arguments = {**(options.get("cross_attention_kwargs") or {}), **tokens.arguments(guided=how.guidance > 1)}
    theirs = options.get("callback_on_step_end")

    def end_of_step(pipe: DiffusionPipeline, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step + 1 >= round(strength * pipe.num_timesteps):  # a sampler of second order has almost twice as many
            arguments.pop("gligen", None)  # the pipeline passes this very dict on in each step
        return kept if theirs is None else theirs(pipe, step, time, kept)

    if hasattr(theirs, "tensor_inputs"):  # one of diffusers' own callbacks, which says what it needs
        options["callback_on_step_end_tensor_inputs"] = theirs.tensor_inputs
    return options | {"cross_attention_kwargs": arguments, "callback_on_step_end": end_of_step}
