"""What a recorder keeps: tensors, the texts they belong to, which layers they came from; and how that is saved."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fmn_nb.attention_rows import Row
from fmn_nb.files import read_json, replacing, write_text
from fmn_nb.prompt_tokens import PromptTokens

FORMAT = 1


class NotRecordedError(ValueError):
    """What was asked for wasn't recorded; the text says what was."""


class AttentionBudgetError(ValueError):
    """Recording would take more memory than allowed; the text says how to record less."""


@dataclass
class ImageText:
    """The texts one image was made from; None where they aren't known."""

    prompt: PromptTokens | None = None
    negative: PromptTokens | None = None
    seed: int | None = None


@dataclass(frozen=True)
class LayerCoverage:
    """What became of one layer with text attention: "recorded", "skipped" (not selected), "missed" or "not run"."""

    layer: str
    state: Literal["recorded", "skipped", "missed", "not run"]
    runs: int
    heads: int | None
    grid: tuple[int, int] | None


# layer, step (None: a mean over steps), what each row of the tensor is
Key = tuple[str, int | None, tuple[Row, ...]]



@dataclass
class AttentionData:
    """Kept attention probabilities.

    Attributes:
        layers: the recorded layers' names, in the order they run.
        grids: layer -> (rows, columns) of its pixels.
        heads: the recorded heads' numbers for each layer; () where heads were averaged while recording.
        images: the texts of each image.
        timesteps: the model's timestep at each step. A step is one evaluation of each branch: a second-order
            scheduler makes two of them per inference step.
        phrases: the phrases whose columns alone were kept (summed), or None.
        chosen_columns: the columns that alone were kept, or None.
        sums, counts: the kept tensors [rows, heads, pixels, columns], and how many steps each adds up.
    """

    layers: list[str] = field(default_factory=list)
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    images: list[ImageText] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    phrases: list[str] | None = None
    chosen_columns: list[int] | None = None
    model: dict[str, str] = field(default_factory=dict)
    layer_coverage: list[LayerCoverage] = field(default_factory=list)
    sums: dict[Key, torch.Tensor] = field(default_factory=dict, repr=False)
    counts: dict[Key, int] = field(default_factory=dict, repr=False)

    def text(self, image: int = 0, branch: str = "cond") -> PromptTokens:
        """What each text column of an image is.

        Raises:
            NotRecordedError: no such image, or its prompt isn't known.
        """
        if not 0 <= image < len(self.images):
            raise NotRecordedError(f"image {image} wasn't recorded; there are {len(self.images)}, counted from 0")
        texts = self.images[image]
        found = texts.prompt if branch == "cond" else texts.negative
        if found is None:
            raise NotRecordedError("the prompt isn't known (a bare denoiser, or embeddings without their text): "
                                   "give prompts=[...] to record_attention (for a bare denoiser each as "
                                   "read_prompt(tokenizer, text)), or ask for columns=[...] by number")
        return found

    def coverage(self) -> list[LayerCoverage]:
        """Each layer with text attention: recorded, skipped by the selection, missed, or not run at all."""
        return list(self.layer_coverage)

    @property
    def steps(self) -> list[int]:
        """The steps that can be chosen; empty where only the mean was kept."""
        return sorted({key[1] for key in self.sums if key[1] is not None})

    @property
    def branches(self) -> list[str]:
        """The recorded branches, "cond" first."""
        return sorted({row.branch for key in self.sums for row in key[2]})

    @property
    def bytes(self) -> int:
        """Memory the kept tensors take."""
        return sum(kept.numel() * kept.element_size() for kept in self.sums.values())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write attention.safetensors and attention.json into `folder` (made if needed); returns the folder."""
        folder = Path(folder)
        description = json.dumps(self._description(), indent=1, ensure_ascii=False)
        tensors = {str(number): kept.cpu().contiguous() for number, kept in enumerate(self.sums.values())}
        with replacing(folder / "attention.safetensors") as file:
            save_file(tensors, file, metadata={"description": _digest(description)})
        write_text(folder / "attention.json", description)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no record there.
            ValueError: a record of an unknown format, or two files that don't belong together.
        """
        folder = Path(folder)
        for name in ("attention.json", "attention.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no attention record in {folder}: {name} is missing")
        description = read_json(folder / "attention.json")
        if description.get("format") != FORMAT:
            raise ValueError(f"{folder} holds format {description.get('format')!r}; this version reads {FORMAT}")
        record = cls(**_from_description(description))
        with safe_open(folder / "attention.safetensors", "pt") as tensors:
            text = (folder / "attention.json").read_text(encoding="utf-8")
            if (tensors.metadata() or {}).get("description") != _digest(text):
                raise ValueError(f"the two files in {folder} are not of one record; save it again")
            for number, entry in enumerate(description["tensors"]):
                key = entry["layer"], entry["step"], tuple(Row(*row) for row in entry["rows"])
                record.sums[key] = tensors.get_tensor(str(number))
                record.counts[key] = entry["steps_added"]
        return record

    def _description(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        images = [{"prompt": image.prompt and image.prompt.to_dict(),
                   "negative": image.negative and image.negative.to_dict(), "seed": image.seed}
                  for image in self.images]
        tensors = [{"layer": layer, "step": step, "rows": rows, "steps_added": self.counts[layer, step, rows]}
                   for layer, step, rows in self.sums]
        return {"format": FORMAT, "model": self.model, "layers": self.layers, "grids": self.grids,
                "heads": self.heads, "timesteps": self.timesteps, "phrases": self.phrases,
                "chosen_columns": self.chosen_columns, "images": images,
                "coverage": [vars(entry) for entry in self.coverage()], "tensors": tensors}


def _from_description(values: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `_description`, as arguments."""
    plain = {name: values[name] for name in ("layers", "timesteps", "phrases", "chosen_columns", "model")}
    images = [ImageText(*(entry[name] and PromptTokens.from_dict(entry[name]) for name in ("prompt", "negative")),
                        entry["seed"]) for entry in values["images"]]
    coverage = [LayerCoverage(**{**entry, "grid": entry["grid"] and tuple(entry["grid"])})
                for entry in values["coverage"]]
    return {**plain, "images": images, "layer_coverage": coverage,
            "grids": {layer: tuple(grid) for layer, grid in values["grids"].items()},
            "heads": {layer: tuple(heads) for layer, heads in values["heads"].items()}}


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()
