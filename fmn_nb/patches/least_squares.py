"""Keys and values by least squares: a change of a U-Net's `to_k` and `to_v` that does given things to given embeddings.

Every closed form of forgetting asks the same of each of these weights W [out, in]: a change D with D e = y for each
edited embedding e [in] and D e' = 0 for each kept one, as nearly as a sum of squares allows:

    edit * sum |D e - y|^2  +  keep * sum |D e'|^2  +  ridge * |D|^2     is smallest for

    D = Y^T F,     F = edit * E (edit * E^T E + keep * K^T K + ridge * I)^-1     Y [n, out], E and F [n, in], K [m, in]

so a change of n embeddings is a LoRA of rank n, exactly: A = F is the same for all layers, since all see the same text,
and B = Y^T. Confined to the null space of what is kept (SPEED, Li et al., arXiv 2503.07392), D = D' Q^T with an
orthonormal Q of directions in which there is nothing to keep, and the same holds for E Q.

`fuse` makes one patch of several in this way (Lu et al., MACE, arXiv 2403.06135): on each patch's own prompts the
weights are to do what that patch alone makes of them, and on kept prompts what they did without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from fmn_nb.attention import text_layers
from fmn_nb.models import UnsupportedPipelineError, conditions, denoiser, own_parameters
from fmn_nb.patches.patch import LORA_A, LORA_B, Patch, combine

TEXT_PROJECTIONS = ("to_k", "to_v")
_TEXT = "encoder_hidden_states"


def text_weights(pipe: DiffusionPipeline, projections: Sequence[str] = TEXT_PROJECTIONS) -> dict[str, Tensor]:
    """Module name -> weight [out, in] of every key and value projection that sees the text encoder's output itself.

    Raises:
        UnsupportedPipelineError: the denoiser is no U-Net with such layers.
    """
    model = denoiser(pipe)
    own = {name: parameter for name, (_, parameter) in own_parameters(model).items()}
    wanted = [name for name in TEXT_PROJECTIONS if name in projections]
    found = {}
    if isinstance(model, UNet2DConditionModel) and not model.config.encoder_hid_dim_type:
        found = {module: own[f"{module}.weight"].detach() for layer in text_layers(model)
                 for module in (f"{layer}.{name}" for name in wanted) if f"{module}.weight" in own}
    if not found:
        raise UnsupportedPipelineError(
            f"a closed form solves for {' and '.join(wanted or TEXT_PROJECTIONS)} of a U-Net's cross-attention, and "
            f"this {type(model).__name__} has none that sees the text encoder's output itself: take a method that "
            "trains")
    return found


def embeddings(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """What the text encoder says of the prompts, as keys and values see it: [prompts, columns, in], float64."""
    return conditions(pipe, list(prompts)).rows[_TEXT].detach().cpu().double()


@dataclass(frozen=True)
class Weighing:
    """How much each sum of squares counts.

    Attributes:
        edit, keep: of an edited and of a kept embedding.
        ridge: of the change itself.
        null_space: confines the change to directions in which the kept embeddings' root mean square is below this
            share of that in their strongest one; 0 for no confinement.
    """

    edit: float = 1.0
    keep: float = 1.0
    ridge: float = 0.5
    null_space: float = 0.0


def free_directions(kept: Tensor, share: float) -> Tensor:
    """Q [in, free]: an orthonormal basis of the directions in which there is next to nothing to keep.

    Raises:
        ValueError: there is no such direction.
    """
    triangle = torch.linalg.qr(kept, mode="r").R  # [min(m, in), in]: the same singular values, and small
    _, sizes, directions = torch.linalg.svd(triangle, full_matrices=True)  # [min(m, in)], rows of [in, in]
    strong = int((sizes >= share * sizes[0]).sum())
    if strong == kept.shape[1]:
        raise ValueError(f"the kept embeddings reach every one of {strong} directions with at least null_space={share} "
                         "of the strongest: raise null_space, or keep fewer prompts")
    return directions[strong:].T


def factors(edited: Tensor, kept: Tensor, weighing: Weighing) -> Tensor:
    """F [n, in], float64, of the change D = Y^T F that takes the edited embeddings [n, in] to Y; `kept` is [m, in]."""
    basis = torch.eye(edited.shape[1], dtype=torch.float64)
    if weighing.null_space:
        basis = free_directions(kept, weighing.null_space)
    e, k = edited @ basis, kept @ basis
    gram = weighing.edit * e.T @ e + weighing.keep * k.T @ k + weighing.ridge * torch.eye(e.shape[1]).double()
    return weighing.edit * e @ torch.linalg.pinv(gram, hermitian=True) @ basis.T


def solved(weights: Mapping[str, Tensor], edited: Tensor, guides: Tensor, kept: Tensor,
           weighing: Weighing) -> tuple[str, dict[str, Tensor]]:
    """(kind, tensors) of the patch after which each edited embedding says what its guide said: W' e = W g.

    Args:
        weights: module -> W [out, in].
        edited, guides: [n, in]; kept: [m, in].

    A LoRA of rank n, exactly, where no layer is narrower than that; else differences of whole weights.
    """
    down, moved = factors(edited, kept, weighing), guides - edited  # both [n, in]
    if len(edited) <= min(min(weight.shape) for weight in weights.values()):
        tensors = {}
        for module, weight in weights.items():
            tensors[module + LORA_A] = down.float()
            tensors[module + LORA_B] = (weight.cpu().double() @ moved.T).float()  # [out, n]
        return "lora", tensors
    change = moved.T @ down  # [in, in]: D = W (G - E)^T F
    return "weights", {f"{module}.weight": (weight.cpu().double() @ change).float()
                       for module, weight in weights.items()}


@dataclass(frozen=True)
class Fusion:
    """How several patches become one; the prompts are encoded when this is made.

    Attributes:
        weights: the names of the weights that are solved for.
        own: for each patch sum e e^T [in, in] over all columns of its prompts.
        kept: the same of the kept prompts.
    """

    weights: frozenset[str]
    own: tuple[Tensor, ...]
    kept: Tensor
    weighing: Weighing

    @classmethod
    def of(cls, pipe: DiffusionPipeline, prompts: Sequence[Sequence[str]], kept: Sequence[str],
           weighing: Weighing) -> Fusion:
        """For patches whose concepts are named by `prompts`, a list for each patch.

        Raises:
            UnsupportedPipelineError: the denoiser is no U-Net with keys and values of the text.
        """
        names = frozenset(f"{module}.weight" for module in text_weights(pipe))
        grams = [_gram(embeddings(pipe, texts)) for texts in prompts]
        others = _gram(embeddings(pipe, kept)) if kept else torch.zeros_like(grams[0])
        return cls(names, tuple(grams), others, weighing)

    def __call__(self, patches: Sequence[Patch]) -> Patch:
        """One patch of the first so many. What they change beside keys and values of the text is added up.

        Raises:
            PatchMismatchError: they are for different base models.
        """
        total, weighing = combine(patches), self.weighing
        own = self.own[:len(patches)]
        ones = torch.eye(len(self.kept), dtype=torch.float64)
        gram = weighing.edit * sum(own) + weighing.keep * self.kept + weighing.ridge * ones
        inverse = torch.linalg.pinv(gram, hermitian=True)
        tensors = dict(total.differences())
        each = [dict(patch.differences()) for patch in patches]
        for name in self.weights & tensors.keys():
            wanted = sum(changes[name].double() @ mine for changes, mine in zip(each, own, strict=True)
                         if name in changes)  # sum of D_i E_i^T E_i, [out, in]
            tensors[name] = (weighing.edit * wanted @ inverse).float()
        return Patch("weights", tensors, total.info)


def fuse(pipe: DiffusionPipeline, patches: Sequence[Patch], prompts: Sequence[Sequence[str]],
         kept: Sequence[str] = (), weighing: Weighing | None = None) -> Patch:
    """One patch of several: on each patch's prompts keys and values do what it makes of them, on the kept ones nothing.

    Args:
        prompts: for each patch, prompts that name what it forgets.
        kept: prompts that are to stay as they are.

    Raises:
        ValueError: not a list of prompts for each patch.
    """
    if len(prompts) != len(patches) or not all(prompts):
        raise ValueError(f"fuse needs prompts for each of {len(patches)} patches, and has {len(prompts)} lists of them")
    return Fusion.of(pipe, prompts, kept, weighing or Weighing())(patches)


def _gram(found: Tensor) -> Tensor:
    """Sum e e^T over all columns of [prompts, columns, in]: [in, in]."""
    flat = found.flatten(0, 1)
    return flat.T @ flat
