"""The course for others: what is generated from the kit for teachers and readers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "demo": ["demo_patch", "find_runtime", "write_demo"],
})
