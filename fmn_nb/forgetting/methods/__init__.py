"""Methods of forgetting, one file each. Every method returns a `Patch`.

A method's file holds one of these, or both:

    def objective(seen: Seen, settings: Settings) -> Tensor     # a scalar with its graph
    def edit(task: Task) -> Edit                                # a closed form: nothing is trained

The shared fine-tune (`fmn_nb.forgetting.finetune`) calls the objective with what one step sees of the concept. A file
whose objective needs no gradient through the step's own run of the denoiser says `THROUGH_THE_RUN = False`, which saves
that graph. The fine-tune does everything else: reference images, steps, what is trained, anchors and the retain term.
With both functions, each concept is trained alone on the model that carries its edit, and the concepts' patches are
fused into one (`fmn_nb.patches.fuse`). In `fmn_nb.forgetting.settings`, `METHODS` names the methods, `FACTS` says what
each needs, and a preset names a method and its settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from fmn_nb.forgetting.settings import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from fmn_nb.forgetting.weights import Trainable


@dataclass(frozen=True)
class Seen:
    """What the model does on noised references, with prompts that name the concept.

    Other predictions on the same noised references are computed when an objective asks for them: for the `prompt`
    "concept" (the same prompts) or "guide" (what they give way to, by the setting `guide`).

    Attributes:
        attention: layer -> probabilities [batch, heads, pixels, columns] with their graph.
        predicted: the prediction [batch, ...], from the same graph.
        concept: which text columns count as the concept in each row, bool [batch, columns].
        region: where in the image the concept is, [batch, height, width] in [0, 1]; None for everywhere.
        frozen: frozen(prompt): the prediction of the model as it was before, float32, without a graph.
        present: present(prompt): the prediction of the model as it is in this step, float32, with its graph.
        target: what a perfect model predicts from the noised references (the noise, say), float32; None if they aren't
            noised images but trajectories.
        weights: what is trained, and in which model.
    """

    attention: Mapping[str, Tensor]
    predicted: Tensor
    concept: Tensor
    region: Tensor | None
    frozen: Callable[[str], Tensor] | None = None
    present: Callable[[str], Tensor] | None = None
    target: Tensor | None = None
    weights: Trainable | None = None


@dataclass(frozen=True)
class Edit:
    """What a closed form returns: a patch's kind and tensors, and how well it does what was asked.

    Attributes:
        before, after: mean over edited embeddings and weights of |W' e - W g|^2 / |W g - W e|^2: 1 before, by
            definition; 0 if each of them says what its guide says.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    before: float
    after: float


def method_of(name: str) -> ModuleType:
    """The module that holds a method."""
    return importlib.import_module(METHODS[name])
