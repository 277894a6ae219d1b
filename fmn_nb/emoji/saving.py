"""Models saved whole: a kill at any moment leaves the old one or the new one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fmn_nb.files import read_json, replacing_folder, write_json


def save_whole(model: torch.nn.Module | StableDiffusionPipeline, folder: Path) -> None:
    """Save beside `folder`, then swap, so that a kill leaves a whole model; the card of an older one goes."""
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for config in temporary.rglob("config.json"):
            # Transformers loads in the dtype named here, diffusers in float32: a pipeline needs one and the same.
            settings = _without_paths(read_json(config))
            write_json(config, settings | ({"dtype": "float32"} if "dtype" in settings else {}))


def _without_paths(settings: dict) -> dict:
    """A config without `_name_or_path`, at any depth: where a part was loaded from is of one machine."""
    return {key: _without_paths(value) if isinstance(value, dict) else value
            for key, value in settings.items() if key != "_name_or_path"}
