"""Forgetting: methods on one shared fine-tune; each returns a `Patch`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "finetune": ["ForgettingError", "Progress", "forget", "periodic_judge"],
    "methods": ["Seen", "method_of"],
    "methods.fmn": ["resteering_loss"],
    "prompts": ["forget_prompts", "neighbours_of", "stand_in_for"],
    "reuse": ["forget_several", "patch_for", "saved_patch", "suited"],
    "settings": ["FACTS", "METHODS", "PRESETS", "Settings", "SettingsError", "settings_for"],
    "state": ["CheckpointError"],
    "weights": ["trainable"],
})
