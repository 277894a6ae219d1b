"""Change the weights that see the text by least squares, so that given embeddings give what is asked.

In a U-Net these are `to_k` and `to_v` of its cross-attention. Joint attention (Flux, Stable Diffusion 3) has none that
see the text encoder's output itself: there it is the layer that takes in the text, and the one that takes in its pooled
vector, which bypasses attention.

Every closed form of forgetting asks the same of each of these weights W [out, in]: a change D with D e = y for each
edited embedding e [in] and D e' = 0 for each kept one, as closely as a sum of squares allows:

    edit * sum |D e - y|^2  +  keep * sum |D e'|^2  +  ridge * |D|^2     is smallest for

    D = Y^T F,     F = edit * E (edit * E^T E + keep * K^T K + ridge * I)^-1     Y [n, out], E and F [n, in], K [m, in]

so a change of n embeddings is a LoRA of rank n, exactly: A = F is the same for all layers, since all see the same text,
and B = Y^T. Confined to the null space of what is kept (SPEED, Li et al., arXiv 2503.07392), D = D' Q^T with an
orthonormal Q of directions in which there is nothing to keep, and the same holds for E Q.

`fuse` makes one patch of several in this way (Lu et al., MACE, arXiv 2403.06135): on each patch's own prompts, the
weights should do what they do with that patch alone, and on kept prompts what they did before.
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
COLUMNS, POOLED = "encoder_hidden_states", "pooled_projections"  # the denoiser's arguments that say what the text is
#: where transformers with joint attention take in the text's columns and its pooled vector: argument -> linear layer
JOINT_INPUTS = {COLUMNS: "context_embedder", POOLED: "time_text_embed.text_embedder.linear_1"}


@dataclass(frozen=True)
class TextInput:
    """Linear layers that see the same embeddings of the text.

    Attributes:
        argument: the denoiser's argument that holds these embeddings, `COLUMNS` or `POOLED`.
        weights: module name -> weight [out, in].
    """

    argument: str
    weights: Mapping[str, Tensor]

    def embeddings(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Tensor:
        """What these layers see of the prompts: [prompts, columns, in], float64; a pooled vector is one column."""
        found = conditions(pipe, list(prompts)).rows[self.argument].detach().cpu().double()
        return found[:, None] if self.argument == POOLED else found


def text_inputs(pipe: DiffusionPipeline, projections: Sequence[str] = TEXT_PROJECTIONS) -> list[TextInput]:
    """Every linear layer that sees the text encoder's output itself; in a U-Net, those named in `projections`.

    Raises:
        UnsupportedPipelineError: the denoiser has none.
    """
    model = denoiser(pipe)
    own = {name: parameter.detach() for name, (_, parameter) in own_parameters(model).items()}
    wanted = [name for name in TEXT_PROJECTIONS if name in projections]
    found = {}
    if isinstance(model, UNet2DConditionModel) and not model.config.encoder_hid_dim_type:
        modules = [f"{layer}.{name}" for layer in text_layers(model) for name in wanted]
        found[COLUMNS] = {module: own[f"{module}.weight"] for module in modules if f"{module}.weight" in own}
    elif any(rule.text != "all" for rule in text_layers(model).values()):
        found = {argument: {module: own[f"{module}.weight"]} for argument, module in JOINT_INPUTS.items()
                 if f"{module}.weight" in own}
    if not found.get(COLUMNS):
        raise UnsupportedPipelineError(
            f"a closed form solves for {' and '.join(wanted or TEXT_PROJECTIONS)} of a U-Net's cross-attention or for "
            f"the layer that takes the text into joint attention, and this {type(model).__name__} has none that sees "
            "the text encoder's output itself: take a method that trains")
    return [TextInput(argument, weights) for argument, weights in found.items()]


@dataclass(frozen=True)
class Weighing:
    """How much each sum of squares counts.

    Attributes:
        edit, keep: the weight of an edited and of a kept embedding.
        ridge: the weight of the change itself.
        null_space: confines the change to directions in which the kept embeddings' root mean square is below this
            share of that in their strongest direction; 0 for no confinement.
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


@dataclass(frozen=True)
class Wanted:
    """What the weights that see the same embeddings should do: after the change, each edited embedding says what its
    guide said, W' e = W g, and each kept one says what it said before.

    Attributes:
        weights: module -> W [out, in].
        edited, guides: [n, in]. kept: [m, in].
    """

    weights: Mapping[str, Tensor]
    edited: Tensor
    guides: Tensor
    kept: Tensor


def solved(wanted: Sequence[Wanted], weighing: Weighing) -> tuple[str, dict[str, Tensor]]:
    """(kind, tensors) of the patch that does this.

    It is exactly a LoRA whose rank is the number of edited embeddings if no layer is narrower than that; otherwise it
    is differences of whole weights.
    """
    is_lora = all(len(one.edited) <= min(min(weight.shape) for weight in one.weights.values()) for one in wanted)
    tensors = {}
    for one in wanted:
        down, moved = factors(one.edited, one.kept, weighing), one.guides - one.edited  # both [n, in]
        change = None if is_lora else moved.T @ down  # [in, in]: D = W (G - E)^T F
        for module, weight in one.weights.items():
            if is_lora:
                tensors[module + LORA_A] = down.float()
                tensors[module + LORA_B] = (weight.cpu().double() @ moved.T).float()  # [out, n]
            else:
                tensors[f"{module}.weight"] = (weight.cpu().double() @ change).float()
    return "lora" if is_lora else "weights", tensors


@dataclass(frozen=True)
class _Grams:
    """Sums e e^T [in, in] over all columns of prompts, as the named weights see them: for each patch over its own
    prompts, and over the kept prompts."""

    weights: frozenset[str]
    own: tuple[Tensor, ...]
    kept: Tensor


@dataclass(frozen=True)
class Fusion:
    """How several patches become one; the prompts are encoded when this is made."""

    seen: tuple[_Grams, ...]
    weighing: Weighing

    @classmethod
    def of(cls, pipe: DiffusionPipeline, prompts: Sequence[Sequence[str]], kept: Sequence[str],
           weighing: Weighing) -> Fusion:
        """For patches whose concepts are named by `prompts`, a list for each patch.

        Raises:
            UnsupportedPipelineError: the denoiser has no layer that sees the text encoder's output itself.
        """
        seen = []
        for one in text_inputs(pipe):
            own = tuple(_gram(one.embeddings(pipe, texts)) for texts in prompts)
            others = _gram(one.embeddings(pipe, kept)) if kept else torch.zeros_like(own[0])
            seen.append(_Grams(frozenset(f"{module}.weight" for module in one.weights), own, others))
        return cls(tuple(seen), weighing)

    def __call__(self, patches: Sequence[Patch]) -> Patch:
        """One patch of as many patches as are given, in the order of the prompts. Changes to other weights add up.

        Raises:
            PatchMismatchError: they are for different base models.
        """
        total, weighing = combine(patches), self.weighing
        tensors = dict(total.differences())
        each = [dict(patch.differences()) for patch in patches]
        for seen in self.seen:
            own = seen.own[:len(patches)]
            ones = torch.eye(len(seen.kept), dtype=torch.float64)
            gram = weighing.edit * sum(own) + weighing.keep * seen.kept + weighing.ridge * ones
            inverse = torch.linalg.pinv(gram, hermitian=True)
            for name in seen.weights & tensors.keys():
                wanted = sum(changes[name].double() @ mine for changes, mine in zip(each, own, strict=True)
                             if name in changes)  # sum of D_i E_i^T E_i, [out, in]
                tensors[name] = (weighing.edit * wanted @ inverse).float()
        return Patch("weights", tensors, total.info)


def fuse(pipe: DiffusionPipeline, patches: Sequence[Patch], prompts: Sequence[Sequence[str]],
         kept: Sequence[str] = (), weighing: Weighing | None = None) -> Patch:
    """One patch of several: the weights that see the text do on each patch's prompts what they do with that patch, and
    on kept prompts what they did before.

    Args:
        prompts: for each patch, prompts that name what it forgets.
        kept: prompts whose images should stay as they are.

    Raises:
        ValueError: no list of patches, or not a list of prompts for each.
    """
    if isinstance(patches, Patch) or not patches:
        raise ValueError("fuse makes one patch of several: give a list of patches")
    if any(isinstance(some, str) for some in (prompts, kept, *prompts)):
        raise ValueError("fuse takes lists of prompts, not a text: [['a photo of a cat'], ['a photo of a dog']], and "
                         "kept=['a photo of a frog']")
    if len(prompts) != len(patches) or not all(prompts):
        raise ValueError(f"fuse needs prompts for each of {len(patches)} patches, and has {len(prompts)} lists of them")
    return Fusion.of(pipe, prompts, kept, weighing or Weighing())(patches)


def _gram(found: Tensor) -> Tensor:
    """Sum e e^T over all columns of [prompts, columns, in]: [in, in]."""
    flat = found.flatten(0, 1)
    return flat.T @ flat
