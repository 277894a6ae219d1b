"""Recorded attention: the tensors that a recorder kept, the texts they belong to, and maps and tables made of them.

An attention map is a mean over what was recorded: `select` looks up a phrase's columns, takes their share of each
pixel's attention, and averages over steps, heads and layers. Small tables by token, layer, step and head go with the
figures. A record can be saved and read again without a model.
"""

from __future__ import annotations

import base64
import io
import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fmn_nb.attention.batch import ImageText, Row
from fmn_nb.attention.layers import choose_layers, short_name
from fmn_nb.concepts import Concept, PhraseNotFoundError, PromptTokens, find_phrase
from fmn_nb.files import read_json, replacing, write_text
from fmn_nb.models import digest
from fmn_nb.models.arguments import whole_number

FORMAT = 1
MOST_PIXELS = 16384  # along a side of a map


class NotRecordedError(ValueError):
    """What was asked for wasn't recorded; the message says what was."""


class AttentionRecordError(ValueError):
    """A saved record is damaged, of an unknown format, or its files don't belong together."""


class AttentionBudgetError(ValueError):
    """Recording would take more memory than allowed; the message says how to record less."""


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
class AttentionRecord:
    """Recorded attention. Made by `record_attention` and `AttentionRecord.load`, read by `map`, `select` and `mass`.

    Attributes:
        layers: the recorded layers' names, in the order they run.
        grids: layer -> (rows, columns) of its pixels.
        heads: the recorded heads' numbers for each layer; () where heads were averaged while recording.
        images: the texts of each image.
        timesteps: the model's timestep at each step. A step is one evaluation of each branch: a second-order
            scheduler makes two of them per inference step.
        phrases: the phrases, if only their columns were kept (summed), or None.
        chosen_columns: the columns, if only some were kept, or None.
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

    def map(self, phrase: str | Concept | None = None, **choice: Any) -> np.ndarray:
        """The attention map of a phrase: mean over all recorded steps, layers and heads. See `select`."""
        return self.select(phrase, **choice)

    def select(self, phrase: str | Concept | None = None, *, step: int | Iterable[int] | None = None,
               layer: str | Sequence[str] | None = None, head: int | Iterable[int] | None = None,
               size: tuple[int, int] | None = None, normalise: Literal["max", "sum"] | None = None,
               **where: Any) -> np.ndarray:
        """The share of attention each pixel gives to a phrase, float32 [height, width] on the CPU.

        Args:
            phrase: what to look up in the image's prompt; or
            part: "begin", "words", "later", "first_eot" or "padding" ("later": the words after `phrase`); or
            columns: text columns by number. Exactly one of the three, except with "later".
            occurrence: which occurrence of the phrase, from 0; "all" adds them up.
            step: one step, several, or None for the mean over all recorded ones.
            layer: a name, dotted or short ("up 0.1"), a pattern such as "up_blocks*", several, or None for all.
            head: a head's number, several, or None for the mean over all.
            branch: "cond" or "uncond". In the uncond branch, a phrase of the negative prompt is read at its columns,
                any other phrase at its columns in the prompt, so that both branches can be compared there.
            image: which image, from 0 (over all prompts, images per prompt and calls while recording).
            size: height and width of the result; None for those of the finest chosen layer.
            normalise: None leaves shares in [0, 1]; "max" divides by the maximum, "sum" by the sum.

        Layers of other sizes are resized bilinearly; then every layer counts the same.

        Raises:
            PhraseNotFoundError: the phrase isn't in the image's prompt.
            NotRecordedError: the step, layer, head, branch, image or column wasn't recorded.
            ValueError: an unknown part, normalisation or layer, or an invalid size.
        """
        size = size and _checked_size(size)
        shares = self._shares(phrase, step, layer, head, **where)
        height, width = size or max((self.grids[name] for name in shares), key=lambda grid: grid[0] * grid[1])
        maps = []
        for name, by_head in shares.items():
            grid = by_head.mean(dim=0).reshape(1, 1, *self.grids[name])  # [heads, pixels] -> [1, 1, rows, columns]
            same = self.grids[name] == (height, width)
            maps.append(grid if same else F.interpolate(grid, (height, width), mode="bilinear", align_corners=False))
        result = torch.cat(maps).mean(dim=0)[0].numpy()  # [layers, 1, height, width] -> [height, width]
        if normalise is None:
            return result
        if normalise not in ("max", "sum"):
            raise ValueError(f"normalise={normalise!r}; choose None, 'max' or 'sum'")
        by = result.max() if normalise == "max" else result.sum()
        return result / by if by > 0 else result

    def mass(self, phrase: str | Concept | None = None, **choice: Any) -> float:
        """How much attention a phrase gets on average over pixels, layers, heads and steps: a fraction in [0, 1].

        Takes the same choices as `select`; nothing is resized.
        """
        return float(torch.stack([share.mean() for share in self._shares(phrase, **choice).values()]).mean())

    def _shares(self, phrase: str | Concept | None, step: Any = None, layer: Any = None, head: Any = None,
                **where: Any) -> dict[str, torch.Tensor]:
        """Layer -> the share of its attention that each pixel gives to a phrase, [heads, pixels]."""
        chosen = self.columns_of(phrase, **where)
        place = {name: where[name] for name in ("branch", "image") if name in where}
        return {name: self.values(name, step=step, columns=chosen, **place).sum(dim=-1)[self._heads(name, head)]
                for name in choose_layers(self.layers, layer)}

    def masses(self, **choice: Any) -> np.ndarray:
        """How much attention each kept column gets on average, float32 [columns]: `mass` of each column at once."""
        layer, head = choice.pop("layer", None), choice.pop("head", None)
        masses = [self.values(name, **choice)[self._heads(name, head)].mean(dim=(0, 1))
                  for name in choose_layers(self.layers, layer)]
        return torch.stack(masses).mean(dim=0).numpy()

    def values(self, layer: str, *, step: int | Iterable[int] | None = None, branch: str = "cond", image: int = 0,
               columns: Sequence[int] | None = None) -> torch.Tensor:
        """One layer's kept probabilities, float32 [heads, pixels, columns], as a mean over the chosen steps.

        `columns` index the kept columns, which are all text columns unless phrases or columns were selected. Asking for
        what wasn't recorded is a NotRecordedError.
        """
        layer = self._named(layer)
        row, steps = Row(branch, image), _as_set("step", step)
        if steps is not None and any(key[1] is None for key in self.sums):
            raise NotRecordedError("only the mean over steps was kept; record with keep='steps' to choose steps")
        total, count, seen = None, 0, set()
        for key, kept in self.sums.items():
            if key[0] != layer or row not in key[2] or (steps is not None and key[1] not in steps):
                continue
            part = kept[key[2].index(row)]
            part = (part if columns is None else part[..., list(columns)]).float().cpu()
            total = part if total is None else total + part
            count += self.counts[key]
            seen.add(key[1])
        if total is None or (steps is not None and steps - seen):
            raise NotRecordedError(self._what_is_there(layer, row, sorted(steps - seen) if steps else None))
        return total / count

    def columns_of(self, phrase: str | Concept | None = None, *, part: str | None = None,
                   columns: Iterable[int] | None = None, occurrence: int | Literal["all"] = "all",
                   branch: str = "cond", image: int = 0) -> list[int]:
        """Which kept columns a phrase, a part or column numbers mean; see `select` for the arguments and errors."""
        phrase = phrase.phrase if isinstance(phrase, Concept) else phrase
        if phrase is not None and not isinstance(phrase, str):
            raise ValueError(f"a phrase is a text or a Concept, not {phrase!r}; columns by number are columns=[...]")
        if columns is not None:
            return self._kept(as_numbers("columns", columns), branch, image)
        if phrase is None and part is None:
            raise ValueError("say what to look at: a phrase, a part (begin, words, first_eot, padding) or columns")
        if self.phrases is not None:
            same = [part is None and _same_phrase(kept, phrase) for kept in self.phrases]
            number = same.index(True) if True in same else None
            if number is None or occurrence != "all":
                more = f"; all occurrences of each are summed, so occurrence={occurrence} can't be chosen: record " \
                       "without phrases=[...] for that" if occurrence != "all" else ""
                raise NotRecordedError(f"only the phrases {', '.join(map(repr, self.phrases))} were recorded{more}")
            self.text(image).find(phrase)
            return [number]
        text = self._text_for(phrase, branch, image)
        return self._kept(text.find(phrase, occurrence).columns if part is None else text.part(part, phrase),
                          branch, image)

    # ---- what was recorded ------------------------------------------------------------------------------------------

    def text(self, image: int = 0, branch: str = "cond") -> PromptTokens:
        """What each text column of an image is; NotRecordedError if there is no such image, or if nobody knows."""
        if not 0 <= image < len(self.images):
            raise NotRecordedError(f"image {image} wasn't recorded; there are {len(self.images)}, counted from 0")
        texts = self.images[image]
        found = texts.prompt if branch == "cond" else texts.negative
        if found is None and self.sums and not any(Row(branch, image) in key[2] for key in self.sums):
            raise NotRecordedError(f"the branch {branch} of image {image} didn't run, so nothing of it was recorded "
                                   "(without guidance, there is only cond)")
        if found is None:
            raise NotRecordedError("the prompt isn't known (a bare denoiser, embeddings without their text or of more "
                                   "than one encoder's length, a tokenizer whose tokens don't spell the text): "
                                   "give prompts=[...] to record_attention (for a bare denoiser each as "
                                   "read_prompt(tokenizer, text)), or ask for columns=[...] by number")
        return found

    def coverage(self) -> list[LayerCoverage]:
        """Each layer with text attention: recorded, skipped by the selection, missed, or not run at all."""
        return list(self.layer_coverage)

    @property
    def steps(self) -> list[int]:
        """The steps that can be chosen; empty if only the mean was kept."""
        return sorted({key[1] for key in self.sums if key[1] is not None})

    def steps_of(self, image: int, branch: str = "cond") -> list[int]:
        """Those that were recorded of one image and branch: drawings may differ in their number of steps."""
        return sorted({key[1] for key in self.sums if key[1] is not None and Row(branch, image) in key[2]})

    @property
    def branches(self) -> list[str]:
        """The recorded branches, "cond" first."""
        return sorted({row.branch for key in self.sums for row in key[2]})

    @property
    def bytes(self) -> int:
        """Memory the kept tensors take."""
        return sum(kept.numel() * kept.element_size() for kept in self.sums.values())

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write attention.safetensors and attention.json into `folder` (made if needed); returns the folder."""
        folder = Path(folder)
        tensors = {str(number): kept.cpu().contiguous() for number, kept in enumerate(self.sums.values())}
        description = json.dumps({
            "format": FORMAT, "model": self.model, "layers": self.layers, "grids": self.grids, "heads": self.heads,
            "timesteps": self.timesteps, "phrases": self.phrases, "chosen_columns": self.chosen_columns,
            "images": [asdict(image) for image in self.images],
            "coverage": [asdict(entry) for entry in self.coverage()], "sha256": _sum_of(tensors),
            "tensors": [{"layer": layer, "step": step, "rows": rows, "steps_added": self.counts[layer, step, rows]}
                        for layer, step, rows in self.sums]}, indent=1, ensure_ascii=False)
        with replacing(folder / "attention.safetensors") as file:
            save_file(tensors, file, metadata={"description": digest([description.strip()])})
        write_text(folder / "attention.json", description)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no record there.
            AttentionRecordError: the record is damaged, of an unknown format, or made of two records' files.
        """
        folder = Path(folder)
        for name in ("attention.json", "attention.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no attention record in {folder}: {name} is missing")
        try:
            return cls._read(folder)
        except AttentionRecordError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RecursionError,
                SafetensorError) as error:
            what = " ".join(str(error).split())[:200]
            raise AttentionRecordError(f"the attention record in {folder} is damaged ({type(error).__name__}: {what}); "
                                       "record it again") from error

    @classmethod
    def _read(cls, folder: Path) -> Self:
        """`load` without checking that the files are there; a damaged record raises any error."""
        description = read_json(folder / "attention.json")
        if description.get("format") != FORMAT:
            raise AttentionRecordError(f"{folder} holds format {description.get('format')!r}; this version reads "
                                       f"{FORMAT}")
        record = cls(**{name: TypeAdapter(kind).validate_python(description[said])
                        for name, (said, kind) in _DESCRIBED.items()})
        text = (folder / "attention.json").read_text(encoding="utf-8")
        with safe_open(folder / "attention.safetensors", "pt") as opened:
            if (opened.metadata() or {}).get("description") != digest([text.strip()]):
                raise AttentionRecordError(f"the two files in {folder} don't belong to one record; save it again")
            tensors = {str(number): opened.get_tensor(str(number)) for number in range(len(description["tensors"]))}
        if description.get("sha256", _sum_of(tensors)) != _sum_of(tensors):  # records of earlier versions have none
            raise ValueError("attention.safetensors was changed since it was saved")
        for entry, kept in zip(description["tensors"], tensors.values(), strict=True):
            key = entry["layer"], entry["step"], tuple(Row(*row) for row in entry["rows"])
            record.sums[key], record.counts[key] = kept, whole_number("steps_added", entry["steps_added"], 1)
            record._check(key)
        return record

    def _check(self, key: Key) -> None:
        """Raise a ValueError if a kept tensor can't be attention to what the record says."""
        (layer, step, rows), kept, most = key, self.sums[key], self.counts[key] * 1.01  # of half precision's rounding
        heads, (height, width) = len(self.heads[layer]) or 1, self.grids[layer]
        if kept.shape[:-1] != (len(rows), heads, height * width) or kept.ndim != 4 or layer not in self.layers:
            raise ValueError(f"{layer} has values {tuple(kept.shape)} for {len(rows)} rows, {heads} heads, "
                             f"{height} x {width} pixels")
        chosen = self.phrases if self.phrases is not None else self.chosen_columns
        if chosen is not None and kept.shape[-1] != len(chosen):
            raise ValueError(f"{layer} has {kept.shape[-1]} columns for {len(chosen)} that were chosen")
        if step is not None and step not in range(len(self.timesteps)):
            raise ValueError(f"{layer} has step {step!r} of {len(self.timesteps)}")
        for row in rows:
            if row.branch not in ("cond", "uncond") or row.image not in range(len(self.images)):
                raise ValueError(f"{layer} has a row {tuple(row)} of {len(self.images)} images")
        if not kept.is_floating_point() or not bool(((kept >= 0) & (kept <= most)).all()):  # NaN is neither
            raise ValueError(f"{layer} holds values that aren't shares of attention")

    # ---- in a notebook ----------------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        """What was recorded, as a small table, with the maps of the first image's words."""
        said = {"model": self.model.get("name") or self.model.get("pipeline") or self.model.get("denoiser") or "?",
                "images": "; ".join(repr(image.prompt.prompt) if image.prompt else "text unknown"
                                    for image in self.images[:4]) + (" ..." if len(self.images) > 4 else ""),
                "steps": f"{len(self.timesteps)}{'' if self.steps else ', their mean was kept'}",
                "branches": ", ".join(self.branches), "layers": f"{len(self.layers)}",
                "memory": f"{self.bytes / 2**20:.1f} MiB"}
        rows = "".join(f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{escape(value)}</td>"
                       "</tr>" for name, value in said.items())
        maps = ""
        for phrase in self._words_to_show():
            with suppress(ValueError):
                maps += (f"<figure style='display:inline-block;margin:4px;text-align:center'><img alt='attention to "
                         f"{escape(phrase)}' src='{_as_picture(self.map(phrase))}'><figcaption>{escape(phrase)}"
                         "</figcaption></figure>")
        return f"<table><caption>Attention record</caption>{rows}</table>{maps}"

    def _words_to_show(self) -> list[str]:
        """The recorded phrases, or the words of the first image's prompt; at most eight."""
        if self.phrases is not None or self.chosen_columns is not None or not self.images or not self.images[0].prompt:
            return list(self.phrases or ())[:8]
        words = (word.strip(".,;:!?\"()[]{}") for word in self.images[0].prompt.prompt.split())
        return [word for word in dict.fromkeys(words) if word][:8]

    # ---- looked up -------------------------------------------------------------------------------------------------

    def _text_for(self, phrase: str | None, branch: str, image: int) -> PromptTokens:
        """The text to look a phrase up in: the branch's own, or the prompt if the negative prompt lacks it."""
        with suppress(NotRecordedError, PhraseNotFoundError):
            own = self.text(image, branch)
            if phrase is None or own.find(phrase):
                return own
        return self.text(image)

    def _named(self, layer: str) -> str:
        """The recorded layer of this dotted or short name."""
        found = [name for name in self.layers if layer in (name, short_name(name))]
        if not found:
            there = ", ".join(map(short_name, self.layers)) or "none"
            raise NotRecordedError(f"layer {layer!r} wasn't recorded; recorded are {there}")
        return found[0]

    def _kept(self, columns: Sequence[int], branch: str, image: int) -> list[int]:
        """An image's text columns as indices into the kept ones."""
        if self.phrases is not None:
            raise NotRecordedError(f"only the phrases {', '.join(map(repr, self.phrases))} were recorded, not columns")
        kept = self.chosen_columns
        if kept is None:
            row = Row(branch, image)
            kept = list(range(next((some.shape[-1] for key, some in self.sums.items() if row in key[2]), 0)))
        missing = [column for column in columns if column not in kept]
        if missing:
            raise NotRecordedError(f"text columns {missing} weren't recorded; there are {kept}")
        return [kept.index(column) for column in columns]

    def _heads(self, layer: str, head: int | Iterable[int] | None) -> list[int] | slice:
        """Recorded heads as indices into the kept ones."""
        wanted, there = _as_set("head", head), self.heads[layer]
        if wanted is None:
            return slice(None)
        if not wanted <= set(there):
            raise NotRecordedError(f"head {sorted(wanted - set(there))} of {layer} wasn't recorded; "
                                   f"there are {list(there) or 'only the mean over heads'}")
        return [there.index(number) for number in sorted(wanted)]

    def _what_is_there(self, layer: str, row: Row, steps: list[int] | None) -> str:
        if not self.sums:
            return "nothing was recorded yet: run the pipeline inside the 'with' block"
        ran = sorted({key[1] for key in self.sums if key[0] == layer and row in key[2]} - {None})
        if steps and ran and set(steps) <= set(self.steps):  # caches between steps skip layers, guidance may end early
            return (f"branch {row.branch!r} of {short_name(layer)} ran at steps {ran}, not at {steps}: choose from "
                    "these, or leave the layer out with layer=[...]")
        if steps:
            return f"steps {steps} weren't recorded; there are {self.steps}"
        return (f"branch {row.branch!r} of image {row.image} wasn't recorded; there are branches "
                f"{', '.join(self.branches)} (uncond only with guidance) and {len(self.images)} image(s)")


# a field of a record -> its name in attention.json, and its type
_DESCRIBED = {
    "layers": ("layers", list[str]), "timesteps": ("timesteps", list[float]), "phrases": ("phrases", list[str] | None),
    "chosen_columns": ("chosen_columns", list[int] | None), "model": ("model", dict[str, str]),
    "grids": ("grids", dict[str, tuple[int, int]]), "heads": ("heads", dict[str, tuple[int, ...]]),
    "images": ("images", list[ImageText]), "layer_coverage": ("coverage", list[LayerCoverage])}


def as_numbers(name: str, value: int | Iterable[int]) -> tuple[int, ...]:
    """One or several numbers, from Python's, numpy's or torch's; a ValueError for none and for what is no number."""
    several = [value] if hasattr(value, "__index__") and not getattr(value, "shape", ()) else value
    try:
        numbers = tuple(operator.index(number) for number in several)
    except TypeError:
        raise ValueError(f"{name} are whole numbers, not {value!r}") from None
    if not numbers:
        raise ValueError(f"{name} is empty, so nothing is chosen; leave it out for all")
    return numbers


def _as_set(name: str, value: int | Iterable[int] | None) -> set[int] | None:
    return None if value is None else set(as_numbers(name, value))


def _same_phrase(kept: str, phrase: str) -> bool:
    """Whether two phrases are the same to `find_phrase`: case and kind of apostrophe don't matter."""
    return (0, len(kept)) in find_phrase(kept, phrase)


def _checked_size(size: Any) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size is (height, width) in pixels, not {size!r}")
    height, width = (whole_number("a side of a map", side, 1, MOST_PIXELS) for side in size)
    return height, width


def _sum_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """A sum over named tensors with their types and shapes."""
    return digest(part for name, kept in tensors.items() for part in (f"{name} {kept.dtype} {tuple(kept.shape)}", kept))


def _as_picture(values: np.ndarray, side: int = 96) -> str:
    """A map as an inline picture, white where attention is highest."""
    grey = Image.fromarray((values / max(float(values.max()), 1e-12) * 255).astype(np.uint8))
    scale = side / max(values.shape)
    buffer = io.BytesIO()
    grey.resize((max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale))),
                Image.Resampling.NEAREST).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- as tables -------------------------------------------------------------------------------------------------------


def token_table(attention: AttentionRecord, *, image: int = 0, branch: str = "cond", **choice: Any) -> pd.DataFrame:
    """How much attention each text column gets: column, token, part, mass (a fraction; they add up to 1 in
    cross-attention). All padding is one row, with its first column.

    `choice` may name step, layer and head, as for `AttentionRecord.mass`.
    """
    text = attention.text(image, branch)
    attention.columns_of(columns=range(len(text.tokens)), image=image, branch=branch)  # an error if some are missing
    parts = {column: part for part in ("begin", "words", "first_eot") for column in getattr(text, part)}
    masses = attention.masses(image=image, branch=branch, **choice)
    rows = [{"column": c, "token": text.label(c), "part": parts[c], "mass": float(masses[c])} for c in sorted(parts)]
    if text.padding:
        rows.append({"column": text.padding[0], "token": f"padding ({len(text.padding)} columns)", "part": "padding",
                     "mass": float(masses[list(text.padding)].sum())})
    return pd.DataFrame(rows)


def layer_table(attention: AttentionRecord, phrase: str | Concept, **choice: Any) -> pd.DataFrame:
    """The attention a phrase gets in each layer: layer, rows and columns of its grid, heads, mass (a fraction)."""
    return pd.DataFrame([{"layer": name, "rows": attention.grids[name][0], "columns": attention.grids[name][1],
                          "heads": len(attention.heads[name]) or "mean",
                          "mass": attention.mass(phrase, layer=name, **choice)} for name in attention.layers])


def step_table(attention: AttentionRecord, phrase: str | Concept, **choice: Any) -> pd.DataFrame:
    """The attention a phrase gets at each recorded step: step, timestep, mass (a fraction).

    Raises:
        NotRecordedError: only the mean over steps was kept.
    """
    image = choice.get("image", 0)
    if not attention.steps:
        raise NotRecordedError("only the mean over steps was kept; record with keep='steps' to see steps")
    timesteps = attention.images[image].timesteps if image < len(attention.images) else None
    steps = attention.steps_of(image, choice.get("branch", "cond")) or attention.steps
    return pd.DataFrame([{"step": step, "timestep": (timesteps or attention.timesteps)[step],
                          "mass": attention.mass(phrase, step=step, **choice)} for step in steps])


def head_table(attention: AttentionRecord, phrase: str | Concept, layer: str, **choice: Any) -> pd.DataFrame:
    """The attention a phrase gets from each head of a layer: head, mass (a fraction).

    Raises:
        NotRecordedError: heads were averaged while recording.
    """
    if not attention.heads[attention._named(layer)]:
        raise NotRecordedError("only the mean over heads was kept; record without heads='mean' to see heads")
    return pd.DataFrame([{"head": head, "mass": attention.mass(phrase, layer=layer, head=head, **choice)}
                         for head in attention.heads[attention._named(layer)]])
