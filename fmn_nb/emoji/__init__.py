"""The emoji world: its names, sprites, scenes and judges; `training` makes its models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "finding": ["Found", "cut_out", "find", "seen_in"],
    "judges": ["Judge", "SecondJudge"],
    "organism": ["EmojiWorld", "held_out_scenes"],
    "world": ["AMBIGUOUS", "IDENTITIES", "IMAGE_SIZE", "OBJECTS", "STYLES", "caption"],
})
