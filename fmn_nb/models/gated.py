"""A U-Net with gated self-attention to boxes beside its cross-attention, and its two forms on disk.

The layers are diffusers' own (`attention_type="gated"`, from GLIGEN, Li et al., arXiv 2301.07093): a position net turns
phrases and boxes into tokens, and a "fuser" in each block lets the pixels look at them. The gates start at zero, so a
model that gets gates draws what it drew before, bit for bit.

On disk, such a model is either a whole pipeline's folder, or a folder with only the new weights (`GROUNDING`) and a
line that names the pipeline beside it that they belong to (`BESIDE`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fmn_nb.files import GROUNDED as BESIDE
from fmn_nb.files import base_folder, read_json

GROUNDING, WEIGHTS = "grounding.safetensors", "unet/diffusion_pytorch_model.safetensors"


def is_gated(model: nn.Module) -> bool:
    """Whether a denoiser has gated layers that look at boxes."""
    config = getattr(model, "config", None)
    return isinstance(config, Mapping) and str(config.get("attention_type", "")).startswith("gated")


def is_gated_name(name: str) -> bool:
    """Whether a parameter with this name belongs to gated layers or their position net."""
    return name.startswith("position_net.") or ".fuser." in name


def gated_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the gated layers and the position net."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_gated_name(name)}


def with_gates(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor] | None = None) -> UNet2DConditionModel:
    """A copy of a U-Net with gated layers: new layers with gates at zero, or those in `tensors`.

    Raises:
        ValueError: the tensors belong to a U-Net of another shape.
    """
    like = next(unet.parameters())
    gated = UNet2DConditionModel.from_config({**unet.config, "attention_type": "gated"})
    gated.register_to_config(**{key: value for key, value in unet.config.items() if key.startswith("_w")})  # its world
    missing = set(gated.load_state_dict(unet.state_dict(), strict=False).missing_keys)
    if tensors is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in gated.state_dict().items() if is_gated_name(name)}
        if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
            raise ValueError("these gated layers belong to a denoiser of another shape")
        gated.load_state_dict(dict(tensors), strict=False)
    elif not all(is_gated_name(name) for name in missing):
        raise ValueError(f"{type(unet).__name__} lacks weights: {', '.join(sorted(missing)[:3])}")
    if like.dtype != gated.dtype:
        gated = gated.to(like.dtype)
    return gated.to(like.device).train(unet.training)


def base_digest(tensors: Mapping[str, Tensor]) -> str:
    """A sum over the weights that gated layers were trained beside, in half precision as in the folders."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not is_gated_name(name):
            found.update(name.encode())
            found.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return found.hexdigest()


def check_base(folder: Path) -> None:
    """Raise ValueError if the folder's gated layers were trained beside other weights than those of its base."""
    said, base = read_json(folder / BESIDE).get("weights"), base_folder(folder)
    if said is not None and said != base_digest(load_file(base / WEIGHTS)):
        raise ValueError(f"the gated layers in {folder.name} were trained beside another {base.name} than the one that "
                         "is there; train them again: fmn-nb pretrain --organism grounded --restart")


def stored_tensors(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gated layers that a folder keeps beside a pipeline."""
    return {name: tensor.to(dtype) for name, tensor in load_file(folder / GROUNDING).items() if is_gated_name(name)}
