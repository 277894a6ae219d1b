"""Where and how a fine-tune computes: device, precision and processes (accelerate), the model's modes, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from fmn_nb.forgetting_settings import Settings, SettingsError

_HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def precision_for(settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    """The precision to train in, for a pipeline whose weights have this dtype: "no", "bf16" or "fp16".

    Raises:
        SettingsError: half precision where it can't be trained, or whole weights of a pipeline that isn't float32
            without it. (A LoRA goes beside weights of any dtype.)
    """
    auto = _HALVES.get(dtype, "no")
    precision = auto if settings.precision == "auto" else settings.precision
    if precision == "fp16" and device.type == "cpu":
        raise SettingsError("float16 can't be trained on a CPU; load the pipeline with dtype='float32'")
    if settings.train != "lora" and dtype != torch.float32 and (precision == "no" or dtype not in _HALVES):
        # Their copies are float32, and only autocast lets them work beside weights in half precision.
        works = dtype in _HALVES and not (auto == "fp16" and device.type == "cpu")
        otherwise = f", or leave precision at 'auto', here '{auto}'" if works else ""
        raise SettingsError(
            f"train='{settings.train}' with precision='{settings.precision}' needs a float32 pipeline, and this one is "
            f"{dtype}: load it with dtype='float32'{otherwise}")
    return precision


def accelerator_for(settings: Settings, device: torch.device, dtype: torch.dtype) -> Accelerator:
    """An accelerator for the device where the pipeline is.

    Raises:
        SettingsError: as `precision_for`; a tracker that isn't installed; or the pipeline is on another device than the
            process that was launched for it.
    """
    precision = precision_for(settings, device, dtype)
    # accelerate passes over a tracker that it can't import without a word.
    if settings.tracker and settings.tracker not in {str(tracker) for tracker in get_available_trackers()}:
        raise SettingsError(f"the tracker {settings.tracker} isn't installed: pip install {settings.tracker}")
    if PartialState._shared_state and PartialState().num_processes == 1:
        # An accelerator made earlier in this process fixes device and precision; this fine-tune has its own.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu",
                              log_with=settings.tracker or None, project_dir=settings.tracker_folder or None)
    here = accelerator.device
    if accelerator.num_processes > 1 and (here.type != device.type or (here.type != "cpu" and here != device)):
        raise SettingsError(f"this process works on {here}; load the pipeline there, not on {device}")
    return accelerator


def averaged(accelerator: Accelerator, measured: Mapping[str, float]) -> dict[str, float]:
    """The mean of each number over all processes, so that all of them go on, stop or fail together."""
    if accelerator.num_processes == 1:
        return dict(measured)
    numbers = torch.tensor(list(measured.values()), device=accelerator.device)
    return dict(zip(measured, accelerator.reduce(numbers, "mean").tolist(), strict=True))


def agreed(accelerator: Accelerator, said: str) -> str:
    """What the main process says, in every process."""
    if accelerator.num_processes == 1:
        return said
    return broadcast_object_list([said])[0]


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The Frobenius norm of all gradients there are, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Memory:
    """The most memory seen: of the device's tensors on a GPU, else of the process, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self._process = device, 0, psutil.Process()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def note(self) -> None:
        """Look now."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = max(self.peak, self._process.memory_info().rss)


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


@contextmanager
def tracking(accelerator: Accelerator, settings: Settings) -> Iterator[None]:
    """The trackers that were asked for, opened and closed; wandb stays offline."""
    if not settings.tracker:
        yield
        return
    config = {name: value for name, value in settings.to_dict().items() if not isinstance(value, list)}
    accelerator.init_trackers("forget-me-not", config, {"wandb": {"mode": "offline"}})
    try:
        yield
    finally:
        accelerator.end_training()
