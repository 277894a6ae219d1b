"""What forgetting produces: patches and learned tokens, which a pipeline can carry and drop again exactly."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "files": ["PatchFileError"],
    "foreign": ["read_patch"],
    "learned_tokens": ["InversionError", "LearnedTokens", "with_tokens"],
    "least_squares": ["Weighing", "fuse"],
    "standing": ["ChangedWeightsError", "is_fused"],
    "patch": ["LORA_A", "LORA_B", "Patch", "PatchMismatchError", "applied_patches", "combine", "set_parameter"],
})
