"""The tokens that tell a gated model who does what, where.

Each interaction has three: subject, object, action. A token is the text encoder's pooled output for the word, plus
learned vectors for its role and for the number of its interaction, plus its box, which the model's position net reads;
the action's box is the one *between* the two (Hoe et al., InteractDiffusion, arXiv 2312.05849, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from fmn_nb.concepts import with_article, world_of
from fmn_nb.control.interaction import Interaction, InteractionError, laid_out
from fmn_nb.control.relations import ACTIONS
from fmn_nb.files import replacing_folder, write_tensors
from fmn_nb.models import denoiser
from fmn_nb.models.gated import GROUNDING, gated_tensors, is_gated, with_gates

ROLES = ("subject", "object", "action")
ROOM = 3  # interactions that fit
PHRASE = "a photo of {}"  # a word is encoded in it: a word alone is not a caption that the text encoder learned
ABLATIONS = ("between", "role", "action")


class Grounding(nn.Module):
    """What was learned beside the layers: a vector for each role, [roles, width], and each interaction, [ROOM, width].
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.role = nn.Parameter(0.5 * torch.randn(len(ROLES), width, generator=rng))
        self.instance = nn.Parameter(0.5 * torch.randn(ROOM, width, generator=rng))

    def forward(self, embeddings: Tensor, without_role: bool = False) -> Tensor:
        """Words' embeddings [..., ROOM * roles, width] with role and instance added, interaction after interaction."""
        beside = self.instance[:, None] + (0 if without_role else self.role[None])  # [ROOM, roles, width]
        return embeddings + beside.expand(ROOM, len(ROLES), -1).flatten(0, 1)

    def save(self, folder: Path) -> Path:
        """Write the file beside a whole pipeline by which `grounding_of` finds the vectors again."""
        return write_tensors(folder / GROUNDING, {n: t.detach().contiguous() for n, t in self.state_dict().items()}, {})


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch of images: boxes [batch, N, 4], embeddings [batch, N, width], masks [batch, N] of 0 and 1,
    with N = ROOM * 3, in the order subject, object, action of each interaction."""

    boxes: Tensor
    embeddings: Tensor
    masks: Tensor

    def arguments(self, guided: bool) -> dict[str, Any]:
        """The tokens as the denoiser's `cross_attention_kwargs` take them; if guided, after as many empty rows."""
        parts = {"boxes": self.boxes, "positive_embeddings": self.embeddings, "masks": self.masks}
        if guided:
            parts = {name: torch.cat([torch.zeros_like(part), part]) for name, part in parts.items()}
        return {"gligen": parts}

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.boxes[rows], self.embeddings[rows], self.masks[rows])


def require_gated(pipe: DiffusionPipeline) -> None:
    """Raise InteractionError for a model without gated layers."""
    if not is_gated(denoiser(pipe)):
        raise InteractionError(f"this {type(denoiser(pipe)).__name__} has no gated layers, so it can't be told where "
                               "things are: take fmn.load('emoji-grounded')")


def grounding_of(pipe: DiffusionPipeline) -> Grounding:
    """The role and instance vectors of a gated pipeline: those attached to it as `grounding`, or those of its folder.

    Raises:
        InteractionError: the model has no gated layers, or its folder holds no vectors.
    """
    require_gated(pipe)
    if isinstance(attached := getattr(pipe, "grounding", None), Grounding):
        return attached
    file = Path(str(pipe.config.get("_name_or_path", ""))) / GROUNDING
    if not file.is_file():
        raise InteractionError(f"the model's folder holds no {GROUNDING}, so its roles are unknown: copy that file "
                               "from where the model was trained, or take fmn.load('emoji-grounded')")
    return _read(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(file: Path, _changed: int) -> Grounding:
    tensors = {name: tensor.float() for name, tensor in load_file(file).items() if name in ("role", "instance")}
    grounding = Grounding(tensors["role"].shape[1])
    grounding.load_state_dict(tensors)
    return grounding.eval()


def with_grounding(pipe: DiffusionPipeline, like: DiffusionPipeline) -> DiffusionPipeline:
    """A model with the gated layers and vectors of another one, such as an oracle with the grounded model's head.

    The other parts are shared with `pipe`, which stays as it is.

    Raises:
        InteractionError: `like` has none. ValueError: the models have different shapes.
    """
    grounding = grounding_of(like)
    unet = with_gates(denoiser(pipe), gated_tensors(denoiser(like)))
    gated = type(pipe)(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    gated.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    gated.grounding = grounding
    return gated


def save_pipeline(pipe: DiffusionPipeline, folder: str | Path) -> Path:
    """Write a gated pipeline as a whole folder, which a plain `StableDiffusionPipeline` loads, and its vectors in it.

    Raises:
        InteractionError: the model has no gated layers, or no vectors are known.
    """
    grounding = grounding_of(pipe)
    with replacing_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
        grounding.save(temporary)
    return Path(folder)


# ---- words and tokens ------------------------------------------------------------------------------------------------


@torch.no_grad()
def phrase_embeddings(pipe: DiffusionPipeline, words: Sequence[str]) -> Tensor:
    """The text encoder's pooled output for each word in a short caption, [words, width]."""
    world = world_of(pipe)
    bare = {*ACTIONS, *(world.vocabulary.names if world else ())}  # take no article
    captions = [PHRASE.format(word if word in bare else with_article(word)) for word in words]
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt",
                            max_length=pipe.tokenizer.model_max_length).input_ids
    return pipe.text_encoder(tokens.to(pipe.text_encoder.device)).pooler_output.float()


def check_words(pipe: DiffusionPipeline, interactions: Sequence[Interaction]) -> None:
    """Raise InteractionError for a word that a model of a known world never learned, or too many interactions."""
    if not interactions:
        raise InteractionError("there is no interaction to draw; give at least one, or draw with the pipeline itself")
    if len(interactions) > ROOM:
        raise InteractionError(f"{len(interactions)} interactions, but there is room for {ROOM}: leave some out")
    world = world_of(pipe)
    if world is None:
        return
    kinds = world.vocabulary.concepts()
    known = [name for name, kind in kinds.items() if kind != "style"]
    for one in interactions:
        for word in filter(None, (one.subject, one.object)):
            if word not in known:
                raise InteractionError(f"the model doesn't know '{word}'; it knows {', '.join(known)}")
        if one.action and one.action not in ACTIONS:
            raise InteractionError(f"the model doesn't know the action '{one.action}'; it knows {', '.join(ACTIONS)}")


def tokens_of(pipe: DiffusionPipeline, images: Sequence[Sequence[Interaction]], without: Collection[str] = (),
              said: dict[str, str] | None = None) -> Tokens:
    """The tokens of each image's interactions, on the pipeline's device.

    Args:
        without: what to leave out, of `ABLATIONS`: the action's "between" box (it gets the whole image), the "role"
            vectors, the "action" token.
        said: word -> other words whose embedding takes its place, unchecked.

    Raises:
        InteractionError: a word the model doesn't know, too many interactions, no place for one.
        ValueError: an unknown ablation.
    """
    if unknown := set(without) - set(ABLATIONS):
        raise ValueError(f"there is no ablation {', '.join(sorted(unknown))}; choose from {', '.join(ABLATIONS)}")
    grounding = grounding_of(pipe)
    for one in images:
        check_words(pipe, one)
    placed = [laid_out(one) for one in images]
    words = sorted({w for one in placed for i in one for w in (i.subject, i.object, i.action) if w})
    vectors = phrase_embeddings(pipe, [(said or {}).get(word, word) for word in words])
    number = {word: index for index, word in enumerate(words)}
    boxes, masks = torch.zeros(len(images), ROOM * 3, 4), torch.zeros(len(images), ROOM * 3)
    embeddings = torch.zeros(len(images), ROOM * 3, vectors.shape[1], device=vectors.device)
    for row, interactions in enumerate(placed):
        for instance, one in enumerate(interactions):
            between = (0.0, 0.0, 1.0, 1.0) if "between" in without else one.between
            for role, (word, box) in enumerate(((one.subject, one.subject_box), (one.object, one.object_box),
                                                ("" if "action" in without else one.action, between))):
                if word:
                    place = 3 * instance + role
                    boxes[row, place], masks[row, place] = torch.tensor(box), 1.0
                    embeddings[row, place] = vectors[number[word]]
    like = next(denoiser(pipe).parameters())
    with torch.no_grad():
        embeddings = grounding.to(vectors.device)(embeddings, without_role="role" in without)
    return Tokens(*(part.to(like.device, like.dtype) for part in (boxes, embeddings, masks)))
