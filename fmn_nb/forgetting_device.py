"""Where and how a fine-tune computes: device, precision and processes (accelerate), the model's modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from fmn_nb.forgetting_settings import Settings, SettingsError


def accelerator_for(settings: Settings, device: torch.device, dtype: torch.dtype) -> Accelerator:
    """An accelerator for the device where the pipeline is.

    Raises:
        SettingsError: half precision where it can't be trained, or the pipeline is on another device than the
            process that was launched for it.
    """
    auto = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")
    precision = auto if settings.precision == "auto" else settings.precision
    if precision == "fp16" and device.type == "cpu":
        raise SettingsError("float16 can't be trained on a CPU; load the pipeline with dtype='float32'")
    if PartialState._shared_state and PartialState().num_processes == 1:
        # An accelerator made earlier in this process fixes device and precision; this fine-tune has its own.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu",
                              log_with=settings.tracker or None, project_dir=settings.tracker_folder or None)
    if accelerator.num_processes > 1 and accelerator.device != device:
        raise SettingsError(f"this process works on {accelerator.device}; load the pipeline there, not on {device}")
    return accelerator


@contextmanager
def training_modes(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode (no dropout: attention is to be measured as it is used), gradient checkpointing if wanted."""
    training = {module: module.training for module in model.modules()}
    switch = checkpointing and not model.is_gradient_checkpointing
    try:
        model.eval()
        if switch:
            model.enable_gradient_checkpointing()
        yield
    finally:
        if switch:
            model.disable_gradient_checkpointing()
        for module, flag in training.items():
            module.training = flag
