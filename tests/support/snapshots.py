"""What must not change: a pipeline's tensors, modules, modes and scheduler, remembered and compared bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.models.pipelines import denoiser

#: our own record of applied patches (compared by the parameters), and what diffusers adds at a model's first use
_NOT_COUNTED = {"_fmn_applied", "_fmn_originals", "_diffusers_hook"}


def snapshot(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything that a fine-tune could change by mistake."""
    kept: dict[str, Any] = {"global generator": torch.get_rng_state(), "scheduler": id(pipe.scheduler),
                            "timesteps": pipe.scheduler.timesteps.clone(),
                            "steps": getattr(pipe.scheduler, "num_inference_steps", None),
                            "tokenizer": (id(pipe.tokenizer), len(pipe.tokenizer)),
                            "bar": dict(pipe._progress_bar_config)}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            kept |= {f"{name} {key}": value.clone() for key, value in part.state_dict().items()}
            kept[f"{name} modules"] = {key: (id(m), m.training, *_hooks(m)) for key, m in part.named_modules()}
            kept[f"{name} parameters"] = {key: (id(p), p.requires_grad, p.grad is None)
                                          for key, p in part.named_parameters()}
    kept["attributes"] = sorted(set(vars(denoiser(pipe))) - _NOT_COUNTED)
    return kept


def assert_unchanged(pipe: DiffusionPipeline, before: dict[str, Any]) -> None:
    """Fail with the names of whatever is not as it was."""
    after = snapshot(pipe)
    assert after.keys() == before.keys()
    different = [name for name, value in before.items() if not _same(value, after[name])]
    assert not different, f"changed: {different}"


def _hooks(module: torch.nn.Module) -> tuple[int, int]:
    """How many hooks a module has. transformers gives its layers hooks of its own at their first use: not counted."""
    if type(module).__module__.startswith("transformers."):
        return 0, 0
    return len(module._forward_pre_hooks), len(module._forward_hooks)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def noise_images(count: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    """Random RGB pictures."""
    drawn = np.random.default_rng(seed).integers(0, 255, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in drawn]


def draw(pipe: DiffusionPipeline, prompt: str = "a photo of a cat", steps: int = 3) -> torch.Tensor:
    """One image's latents from a fixed seed."""
    return pipe(prompt, num_inference_steps=steps, output_type="latent",
                generator=torch.Generator().manual_seed(0)).images
