"""Notebooks in batches: runs, sweeps, their folders, metrics and pages, and the check of this machine."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "bench": ["lesson"],
    "benchmark": ["read_overrides", "settings_of"],
    "check": ["all_checks"],
    "folder": ["read_sweep", "record", "save_image"],
    "notebook": ["RunError"],
    "plan": ["plan_run"],
    "report": ["write_report"],
    "runner": ["run"],
    "spec": ["plan_sweep"],
    "sweep": ["run_sweep"],
})
