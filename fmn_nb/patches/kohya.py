"""A LoRA in the layout of kohya's scripts, which AUTOMATIC1111, ComfyUI and others read; diffusers does too.

Such names have underscores for dots, so the way back needs the modules' names, which are in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor

_LETTERS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def to_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`MODULE.lora_A.weight` -> `lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight`, and alphas (the rank).

    Raises:
        ValueError: there are biases, for which the layout has no name.
    """
    if bias := [name for name in tensors if name.endswith(".bias")]:
        raise ValueError(f"kohya's layout has no place for {bias[0]}: make the patch with low_rank(rank, biases=False)")
    converted = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in tensors.items()})
    alphas = {f"{name.removesuffix('.lora_down.weight')}.alpha": torch.tensor(float(len(tensor)))
              for name, tensor in converted.items() if name.endswith(".lora_down.weight")}
    return {name: tensor.contiguous() for name, tensor in {**converted, **alphas}.items()}


def from_kohya(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that `to_kohya` was given, for these modules; KeyError if one is missing."""
    return {f"{module}.{ours}.weight": tensors[f"lora_unet_{module.replace('.', '_')}.{theirs}.weight"]
            for module in modules for ours, theirs in _LETTERS.items()}
