"""Relearning: how few steps on a handful of images does it take the model to draw the concept again?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.concepts import Concept, spoken
from fmn_nb.evaluation import MeasurementError, Session, drawings, evenly, share_of
from fmn_nb.forgetting import Settings, trainable
from fmn_nb.models import (
    Images,
    Latents,
    MixedPrecision,
    Noising,
    SeedOffset,
    Stream,
    conditions,
    denoiser,
    denoising_loss,
    encode,
    noisy_batch,
    seeded,
)
from fmn_nb.patches import Patch


@dataclass(frozen=True)
class RelearningBudget:
    """What relearning may spend.

    Attributes:
        at: the numbers of steps after which to judge.
        rank, learning_rate, batch_size: those of the LoRA on the cross-attention's projections, with AdamW.
        references: how many images of the concept to learn from.
        images: how many to draw each time, on the same seeds, to see whether it worked.
    """

    at: tuple[int, ...] = (0, 2, 5, 10, 20)
    rank: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 4
    references: int = 6
    images: int = 24


def relearn(pipe: DiffusionPipeline | Session, concept: Concept, patch: Patch | None, *,
            references: Images | None = None, budget: RelearningBudget | None = None, seed: int = 0) -> pd.DataFrame:
    """Train a small LoRA on the forgetting model with the ordinary denoising loss, and judge on the way.

    Unlike an embedding, this attack changes weights, and given enough steps it can teach anything. So the speed counts:
    a concept that was hidden comes back in a few steps, one that was removed takes as long as a new one.

    Args:
        references: images of the concept; None for real ones of the model's world.

    Returns:
        A row per entry of the budget's `at`: steps, successes, images, share with its 95% interval (low, high), loss
        (mean since the row before), seconds of training so far.

    Raises:
        MeasurementError: there is no judge, there are too few references, or there is nothing to judge at.
    """
    budget, session = budget or RelearningBudget(), Session.of(pipe)
    if not budget.at or min(budget.at) < 0:
        raise MeasurementError(f"at lists numbers of steps from 0, not {list(budget.at)}")
    Noising(session.pipe)  # before anything is drawn
    asked = session.fresh_drawings(concept, budget.images, seed)
    shown = [d.prompt for d in session.fresh_drawings(concept, budget.references, seed)]
    pictures = session.references(concept, references, budget.references, seed)
    prompts = shown if references is None else [spoken(concept).prompt]  # own images come without a style that is known
    latents, generator = encode(session.pipe, pictures), seeded(seed, Stream.RELEARNING)
    rows, losses, spent = [], [], 0.0
    with session.patched(patch), _tuning(session, latents, prompts, budget, generator) as step:
        for done in range(max(budget.at) + 1):
            if done in budget.at:
                share = share_of(session.seen(concept, asked))
                rows.append({"steps": done, "successes": round(share.value * share.images), "images": share.images,
                             "share": share.value, "low": share.low, "high": share.high,
                             "loss": sum(losses) / len(losses) if losses else None, "seconds": spent})
                losses = []
            if done < max(budget.at):
                started = perf_counter()
                losses.append(step())
                spent += perf_counter() - started
    return pd.DataFrame(rows)


@contextmanager
def harmless_tuning(session: Session, concept: Concept, budget: RelearningBudget, seed: int) -> Iterator[int]:
    """Context with the session's model as it is now, fine-tuned on real images of everything but the concept; yields
    the number of steps, the budget's largest.

    Raises:
        NotThereError: the model's world has no real images.
    """
    retain = [d for d in drawings(concept, session.vocabulary, seed + SeedOffset.ATTACK_IMAGES) if d.role == "retain"]
    shown = evenly(retain, budget.references)
    pictures = [Image.fromarray(np.asarray(image)) for image in session.world.real_images(shown)]
    latents, generator = encode(session.pipe, pictures), seeded(seed, Stream.RELEARNING)
    with _tuning(session, latents, [d.prompt for d in shown], budget, generator) as step:
        for _ in range(max(budget.at)):
            step()
        yield max(budget.at)


@contextmanager
def _tuning(session: Session, latents: Latents, prompts: Sequence[str], budget: RelearningBudget,
            generator: torch.Generator) -> Iterator[Callable[[], float]]:
    """Context with a small LoRA in the session's model, and a function that trains it for one step: its loss."""
    model, lora, noising = denoiser(session.pipe), Settings(train="lora", rank=budget.rank), Noising(session.pipe)
    with trainable(model, lora, generator) as weights:
        parameters, given = list(weights.parameters.values()), conditions(session.pipe, prompts)
        optimizer = torch.optim.AdamW(parameters, lr=budget.learning_rate, weight_decay=0.0)
        precision = MixedPrecision.of(model)

        def step() -> float:
            index = torch.randint(len(latents), (budget.batch_size,), generator=generator)
            batch = noisy_batch(latents, index, generator, (0, noising.steps))
            with torch.enable_grad():
                loss = denoising_loss(model, noising, batch, given, index % len(prompts))
                precision.backward(loss)
            precision.clip(optimizer, parameters, 1.0)
            precision.step(optimizer)
            return float(loss.detach())

        yield step


def steps_until(table: pd.DataFrame, share: float = 0.5) -> int | None:
    """The fewest steps in the table after which at least this share of images shows the concept, or None."""
    reached = table.loc[table["successes"] >= share * table["images"], "steps"]  # a mean of shares rounds
    return int(reached.min()) if len(reached) else None
