"""Forget-Me-Not Notebooks: see how a text-to-image diffusion model knows a concept, and make it forget it.

`import fmn_nb as fmn` costs nothing: each public name is imported from its module when it is first used.
"""

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "models",
    "bundled": "models",
    "fingerprint": "models",
    "UnknownModelError": "models",
    "Concept": "concepts",
    "PhraseNotFoundError": "concepts",
    "record_attention": "attention",
    "Patch": "patches",
    "PatchMismatchError": "patches",
    "combine": "patches",
    "applied_patches": "patches",
    "PatchFileError": "patch_files",
    "forget": "forgetting",
    "PRESETS": "forgetting",
    "SettingsError": "forgetting",
    "invert": "inversion",
    "LearnedTokens": "inversion",
    "generate": "generation",
    "evaluate": "evaluation",
    "Report": "evaluation",
    "record": "results",
    "save_image": "results",
    "run": "runs",
}
_MODULES = (
    "attention concepts denoising emoji evaluation files forgetting generation grounding inversion models "
    "parameters patches paths plots references report results runs sweeps widgets"
).split()

__all__ = ["__version__", *_HOME]


# Whenever diffusers' pipelines are imported, transformers remarks twice that torchvision is missing. Nothing here needs
# it, and a notebook's first output should not be a warning: this one remark is dropped, all others pass.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda remark: "requires torchvision" not in remark.getMessage())


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name (or is that name) at its first use (PEP 562)."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it offers: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
