"""Methods of forgetting, a file each. What a method gives is always a `Patch`.

A method is an objective for the shared fine-tune (`fmn_nb.forgetting.finetune`): its file holds

    def objective(seen: Seen, settings: Settings) -> Tensor     # a scalar with its graph

for what one step sees of the concept. Everything around it is the fine-tune's: reference images, steps, what is
trained, anchors and the retain term. `METHODS` (in `fmn_nb.forgetting.settings`) names the methods; a preset there
names a method and its settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmn_nb.forgetting.settings import METHODS, Settings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What the model does on noised references, with prompts that name the concept.

    Attributes:
        attention: layer -> probabilities [batch, heads, pixels, columns] with their graph.
        predicted: the prediction [batch, ...], of the same graph.
        concept: which text columns count as the concept in each row, bool [batch, columns].
        region: where in the image the concept is, [batch, height, width] in [0, 1]; None for everywhere.
    """

    attention: Mapping[str, Tensor]
    predicted: Tensor
    concept: Tensor
    region: Tensor | None


def objective_of(method: str) -> Callable[[Seen, Settings], Tensor]:
    """A method's objective."""
    return importlib.import_module(METHODS[method]).objective
