"""Unified Concept Editing: a concept's keys and values become those of its guide, in one solve (Gandikota, Orgad,
Belinkov, Materzynska, Bau, arXiv 2308.14761).

A U-Net's cross-attention sees the prompt only through `to_k` and `to_v`, W c for each column c of the text encoder's
output. For every such W, with e the edited columns (the concept's), g their guide's, e' the kept ones,

    W' = (ridge W + erase sum W g e^T + preserve sum W e' e'^T) (ridge I + erase sum e e^T + preserve sum e' e'^T)^-1

No image is drawn and nothing is trained. Taking W out of the bracket leaves W' - W = erase sum W (g - e) e^T (...)^-1:
the kept columns occur only in the inverse, and n edited columns make a LoRA of rank n, exactly.

What is kept. The solve weighs sums of squares, so kept columns move a little; the greater `preserve_scale`, the less.
They stay exactly as they are only with `null_space` (SPEED, Li et al., arXiv 2503.07392), if there are directions left
in which they have nothing.

Published: the last token of the concept in six prompts, guide the empty prompt (objects) or "art" (styles), erase and
preserve 1, ridge .5. Here the prompts are the fine-tune's (`wording`), columns are paired from the end of the text (a
prompt's last word with its guide's, begin with begin if the guide is empty), and kept columns come from the retain
prompts: the last word of each if `tokens` is "last", every column if it is "later".

W doesn't see a pooled text embedding beside the columns (Stable Diffusion XL), which stays as it is. A transformer with
joint attention has no keys that see the text encoder's output: there W is the layer that takes in the columns, and,
with the pooled vectors of the same prompts in the place of columns, the one that takes in the pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fmn_nb.attention import architecture_of, read_columns, text_parts
from fmn_nb.concepts import PromptTokens
from fmn_nb.forgetting.methods import Edit
from fmn_nb.forgetting.prompts import retain_prompts
from fmn_nb.models import denoiser, unwrapped
from fmn_nb.patches import Patch
from fmn_nb.patches.least_squares import POOLED, Wanted, Weighing, solved, text_inputs

if TYPE_CHECKING:
    from fmn_nb.forgetting.data import Task
    from fmn_nb.forgetting.settings import Settings


def edit(task: Task) -> Edit:
    """The edit of all the task's concepts at once."""
    return solved_for(task, task.settings.tokens, every=task.settings.tokens == "later")


def weighing_of(settings: Settings) -> Weighing:
    """The weights of the sums from the settings."""
    return Weighing(settings.erase_scale, settings.preserve_scale, settings.ridge, settings.null_space)


def solved_for(task: Task, columns: str, every: bool) -> Edit:
    """The closed form for the concept's `columns` (`paired`), with every kept column or each prompt's last word."""
    texts = [*retain_prompts(task.pipe, task.concepts, task.retain_prompts, task.readings.values()), ""]
    texts = texts if task.settings.retains else []
    pairs = [pair for concept in task.concepts
             for pair in zip(task.prompts_of(concept), task.guides_of(concept), strict=True)]
    unique = list(dict.fromkeys([*texts, *(text for concept in task.concepts
                                           for text in (*task.prompts_of(concept), *task.guides_of(concept)))]))
    wanted = []
    for seen in text_inputs(task.pipe, task.settings.projections):
        said = dict(zip(unique, seen.embeddings(task.pipe, unique), strict=True))
        if seen.argument == POOLED:
            edited, guides = (torch.cat([said[pair[side]] for pair in pairs]) for side in (0, 1))
        else:
            edited, guides = paired(task, columns, said)
        kept = edited[:0]
        if texts:
            kept = kept_columns(task.pipe, [(text, said[text]) for text in texts], every or seen.argument == POOLED)
        wanted.append(Wanted(seen.weights, edited, guides, kept))
    kind, tensors = solved(wanted, weighing_of(task.settings))
    return Edit(kind, tensors, *_missed(wanted, kind, tensors))


def paired(task: Task, columns: str, said: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(edited, guides), both [n, in]: columns of the prompts that name the concept, and of those that they give way to.

    Each text encoder's columns (Stable Diffusion 3 has CLIP's, then T5's) are paired among themselves.

    Args:
        columns: "last", the concept's own last token; "later", that one and all after it, also padding; "others", all
            but the concept's own; of these, the columns before it are paired with themselves where a causal text
            encoder knows nothing of it there, and else (T5) with the guide's at the same place.
        said: prompt -> its embeddings [columns, in].
    """
    edited, guides = [], []
    for concept in task.concepts:
        for prompt, guide in zip(task.prompts_of(concept), task.guides_of(concept), strict=True):
            own, other, length = said[prompt], said[guide], len(said[prompt])
            read, to = (read_columns(task.pipe, text, length) for text in (prompt, guide))
            named = read.find(concept.phrase).columns
            for part, causal in zip(text_parts(task.pipe, length), _causal(task), strict=True):
                places, shift = [column for column in named if column in part], _end(read, part) - _end(to, part)
                if not places:  # the encoder isn't loaded, or its limit cut the concept off
                    continue
                wanted = {"last": [places[-1]], "later": range(places[-1], part.stop),
                          "others": [column for column in part if column not in places]}[columns]
                for column in wanted:
                    edited.append(own[column])
                    before = columns == "others" and column < places[0]
                    alike = own if causal else other  # before the concept, both prompts have the same words
                    guides.append(alike[column] if before else other[min(max(column - shift, part.start), part[-1])])
    return torch.stack(edited), torch.stack(guides)


def _causal(task: Task) -> list[bool]:
    """For each tokenizer's columns, whether their encoder reads from left to right (all but the T5s do)."""
    names = architecture_of(denoiser(task.pipe)).tokenizers
    encoders = (getattr(task.pipe, name.replace("tokenizer", "text_encoder"), None) for name in names)
    return ["T5" not in type(unwrapped(encoder)).__name__ for encoder in encoders]


def _end(read: PromptTokens, part: range) -> int:
    """The column of a prompt's end-of-text token among an encoder's; if it was cut off, the one after the last."""
    return next((column for column in read.first_eot if column in part), part.stop)


def kept_columns(pipe: DiffusionPipeline, kept: Sequence[tuple[str, Tensor]], every: bool) -> Tensor:
    """Columns [m, in] of kept prompts and their embeddings: every one, or the begin token and each one's last word, of
    every tokenizer."""
    if every:
        return torch.cat([own for _, own in kept])
    last = []
    for text, own in kept:
        words = read_columns(pipe, text, len(own)).words
        of_parts = ([column for column in words if column in part] for part in text_parts(pipe, len(own)))
        last += [own[columns[-1]] for columns in of_parts if columns]
    return torch.stack([kept[0][1][0], *last])


def _missed(asked: Sequence[Wanted], kind: str, tensors: dict[str, Tensor]) -> tuple[float, float]:
    """Mean of |W' e - W g|^2 / |W e - W g|^2 over the edited columns and the weights, before and after: (1, rest)."""
    wanted = missed = 0.0
    changes = dict(Patch(kind, tensors).differences())
    for one in asked:
        for module, weight in one.weights.items():
            move = (one.guides - one.edited) @ weight.cpu().double().T  # [n, out]
            wanted += float(move.square().sum())
            missed += float((one.edited @ changes[f"{module}.weight"].double().T - move).square().sum())
    return (1.0, missed / wanted) if wanted else (0.0, 0.0)
