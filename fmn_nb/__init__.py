"""Forget-Me-Not Notebooks: see how a text-to-image diffusion model knows a concept, and make it forget the concept.

`import fmn_nb as fmn` costs nothing: each public name is imported from its folder when it is first used.
"""

import logging

import lazy_loader

__version__ = "0.1.0"

_FOLDERS = ["attacks", "attention", "concepts", "control", "course", "emoji", "evaluation", "files", "forgetting",
            "inversion", "models", "patches", "plots", "runs", "stats", "widgets"]
__getattr__, _, _reachable = lazy_loader.attach(
    __name__,
    submodules=_FOLDERS,
    submod_attrs={
        "models": ["UnknownModelError", "bundled", "fingerprint", "generate", "load"],
        "concepts": ["Concept", "PhraseNotFoundError"],
        "attention": ["record_attention"],
        "patches": ["LearnedTokens", "Patch", "PatchFileError", "PatchMismatchError", "applied_patches", "combine"],
        "forgetting": ["PRESETS", "SettingsError", "forget"],
        "inversion": ["invert"],
        "evaluation": ["Report", "evaluate"],
        "control": ["Interaction", "draw_interactions"],
        "runs": ["record", "run", "save_image"],
    },
)
__all__ = [name for name in _reachable if name not in _FOLDERS]


def __dir__() -> list[str]:
    """Only the public names: what a notebook's completion offers."""
    return list(__all__)


# Whenever diffusers' pipelines are imported, transformers remarks twice that torchvision is missing. Nothing here needs
# it, and a notebook's first output should not be a warning: this one remark is dropped, all others pass.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda remark: "requires torchvision" not in remark.getMessage())
