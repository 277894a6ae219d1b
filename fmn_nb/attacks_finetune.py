"""Fine-tuning back: how few steps on a handful of images does it take until the model draws the concept again?"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch.nn import functional as F

from fmn_nb.attacks import AttackError, asked_for, forgetting, judge_of, references_of, seen
from fmn_nb.concepts import Concept
from fmn_nb.denoising import Noising, conditions, predict, seeded
from fmn_nb.evaluation_measures import JudgeLike
from fmn_nb.evaluation_probes import share_of
from fmn_nb.forgetting_settings import Settings
from fmn_nb.forgetting_weights import trainable
from fmn_nb.generation import STEPS
from fmn_nb.models import denoiser
from fmn_nb.patches import Patch
from fmn_nb.protocol import EMOJI, Vocabulary
from fmn_nb.references import Images, encode


def fine_tuned_back(pipe: DiffusionPipeline, concept: Concept, patch: Patch | None, *,
                    references: Images | None = None, at: Sequence[int] = (0, 2, 5, 10, 20), rank: int = 4,
                    learning_rate: float = 1e-3, batch_size: int = 4, count: int = 6, images: int = 24, seed: int = 0,
                    judge: JudgeLike | None = None, steps: int = STEPS, vocabulary: Vocabulary = EMOJI) -> pd.DataFrame:
    """Train a small LoRA on the forgetting model with the ordinary denoising loss, and judge on the way.

    Unlike an embedding this attack changes weights, and given enough steps it can teach anything. What tells is the
    speed: a concept that was hidden comes back in a few steps, one that was removed takes as long as a new one.

    Args:
        references: images of the concept; real scenes where None, which only the emoji world has.
        at: after which numbers of steps to judge. `count` references, `images` judged each time on the same seeds.
        rank, learning_rate, batch_size: of the LoRA on the cross-attention's projections, AdamW.

    Returns:
        A row per entry of `at`: steps, successes, images, share with its 95% interval (low, high), loss (mean since
        the row before), seconds of training so far.

    Raises:
        AttackError: no judge, fewer than `count` references, or nothing to judge at.
    """
    if not at or min(at) < 0:
        raise AttackError(f"at lists numbers of steps from 0, not {list(at)}")
    judge = judge_of(pipe, judge)
    asked = asked_for(concept, images, seed, vocabulary)
    shown = [d.prompt for d in asked_for(concept, count, seed, vocabulary)]
    pictures = references_of(pipe, concept, references, count, seed, vocabulary)
    prompts = shown if references is None else [concept.prompt]  # own images come without a style that is known
    latents, generator = encode(pipe, pictures), seeded(seed, 31)
    rows, losses, spent = [], [], 0.0
    with forgetting(pipe, patch), trainable(denoiser(pipe), Settings(train="lora", rank=rank), generator) as weights:
        step = _step_of(pipe, latents, prompts, list(weights.parameters.values()), learning_rate, batch_size, generator)
        for done in range(max(at) + 1):
            if done in at:
                share = share_of(seen(pipe, judge, concept, asked, steps=steps, vocabulary=vocabulary))
                rows.append({"steps": done, "successes": round(share.value * share.images), "images": share.images,
                             "share": share.value, "low": share.low, "high": share.high,
                             "loss": sum(losses) / len(losses) if losses else None, "seconds": spent})
                losses = []
            if done < max(at):
                started = perf_counter()
                losses.append(step())
                spent += perf_counter() - started
    return pd.DataFrame(rows)


def _step_of(pipe, latents, prompts, parameters, learning_rate, batch_size, generator):
    """A function that does one step of denoising training and returns its loss."""
    model, noising, given = denoiser(pipe), Noising(pipe), conditions(pipe, prompts)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    shape = (batch_size, *latents.mean.shape[1:])

    def step() -> float:
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        clean = latents.sample(index, torch.randn(shape, generator=generator))
        noise = torch.randn(shape, generator=generator)
        times = torch.randint(noising.steps, (batch_size,), generator=generator)
        with torch.enable_grad():
            noisy = noising.noisy(clean, noise, times).to(model.device)
            predicted = predict(model, noisy, times, given, index % len(prompts))
            loss = F.mse_loss(predicted.float(), noising.target(clean, noise, times).to(model.device))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def steps_until(table: pd.DataFrame, share: float = 0.5) -> int | None:
    """The fewest steps in the table after which at least this share of images shows the concept; None for never."""
    reached = table.loc[table["share"] >= share, "steps"]
    return int(reached.min()) if len(reached) else None
