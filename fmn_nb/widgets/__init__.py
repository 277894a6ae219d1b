"""Explorers for notebooks: thin shells of ipywidgets, each with a static figure beside it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "composer": ["Composer"],
    "explorers": ["AttentionExplorer", "PatchScale", "SweepExplorer"],
})
