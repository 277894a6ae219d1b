"""Maps read from recorded attention: choose a phrase, steps, layers, heads, branch and image.

An attention map here is the *share* of its attention that each pixel gives to some text columns: softmax
probabilities, summed over the columns of the phrase, averaged over everything that wasn't chosen. So values lie in
[0, 1], and the maps of all columns add up to 1 at every pixel (in joint attention: to what the image leaves).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from fmn_nb.attention_data import AttentionData, NotRecordedError
from fmn_nb.attention_layers import choose_layers
from fmn_nb.attention_rows import Row
from fmn_nb.concepts import Concept, PhraseNotFoundError, PromptTokens


@dataclass
class AttentionRecord(AttentionData):
    """Recorded attention. Made by `record_attention` and `AttentionRecord.load`, read by `map`, `select` and `mass`."""

    def map(self, phrase: str | Concept | None = None, *, image: int = 0, branch: str = "cond",
            **choice: Any) -> np.ndarray:
        """The attention map of a phrase: mean over all recorded steps, layers and heads. See `select`."""
        return self.select(phrase, image=image, branch=branch, **choice)

    def select(self, phrase: str | Concept | None = None, *, part: str | None = None,
               columns: Iterable[int] | None = None, occurrence: int | Literal["all"] = "all",
               step: int | Iterable[int] | None = None, layer: str | Sequence[str] | None = None,
               head: int | Iterable[int] | None = None, branch: str = "cond", image: int = 0,
               size: tuple[int, int] | None = None, normalise: Literal["max", "sum"] | None = None) -> np.ndarray:
        """The share of attention each pixel gives to a phrase, float32 [height, width] on the CPU.

        Args:
            phrase: what to look up in the image's prompt; or
            part: "begin", "words", "later", "first_eot" or "padding" ("later": the words after `phrase`); or
            columns: text columns by number. Exactly one of the three, but for "later".
            occurrence: which occurrence of the phrase, from 0; "all" adds them up.
            step: one step, several, or None for the mean over all recorded ones.
            layer: a name, a pattern such as "up_blocks*", several, or None for all.
            head: a head's number, several, or None for the mean over all.
            branch: "cond" or "uncond". In the uncond branch a phrase of the negative prompt is read at its columns; any
                other phrase at the columns it has in the prompt, so that both branches can be compared there.
            image: which image, from 0 (over all prompts, images per prompt and calls while recording).
            size: height and width of the result; that of the finest chosen layer where None.
            normalise: None leaves shares in [0, 1]; "max" divides by the maximum, "sum" by the sum.

        Layers of other sizes are resized bilinearly, then every layer counts the same.

        Raises:
            PhraseNotFoundError: the phrase isn't in the image's prompt.
            NotRecordedError: the step, layer, head, branch, image or column wasn't recorded.
            ValueError: an unknown part or normalisation.
        """
        chosen = self.columns_of(phrase, part=part, columns=columns, occurrence=occurrence, branch=branch, image=image)
        names = choose_layers(self.layers, layer)
        shares = {name: self.values(name, step=step, branch=branch, image=image, columns=chosen) for name in names}
        height, width = size or max((self.grids[name] for name in names), key=lambda grid: grid[0] * grid[1])
        maps = []
        for name, share in shares.items():
            by_head = share.sum(dim=-1)[self._heads(name, head)].mean(dim=0)
            grid = by_head.reshape(1, 1, *self.grids[name])
            same = self.grids[name] == (height, width)
            maps.append(grid if same else F.interpolate(grid, (height, width), mode="bilinear", align_corners=False))
        result = torch.cat(maps).mean(dim=0)[0].numpy()
        return _normalised(result, normalise)

    def mass(self, phrase: str | Concept | None = None, **choice: Any) -> float:
        """How much attention a phrase gets on average over pixels, layers, heads and steps: a fraction in [0, 1].

        Takes the same choices as `select`; nothing is resized.
        """
        layer, head, step = (choice.pop(name, None) for name in ("layer", "head", "step"))
        chosen = self.columns_of(phrase, **choice)
        place = {name: choice[name] for name in ("branch", "image") if name in choice}
        masses = [self.values(name, step=step, columns=chosen, **place).sum(dim=-1)[self._heads(name, head)].mean()
                  for name in choose_layers(self.layers, layer)]
        return float(torch.stack(masses).mean())

    def masses(self, **choice: Any) -> np.ndarray:
        """How much attention each kept column gets on average, float32 [columns]: `mass` of each column at once."""
        layer, head = choice.pop("layer", None), choice.pop("head", None)
        masses = [self.values(name, **choice)[self._heads(name, head)].mean(dim=(0, 1))
                  for name in choose_layers(self.layers, layer)]
        return torch.stack(masses).mean(dim=0).numpy()

    def values(self, layer: str, *, step: int | Iterable[int] | None = None, branch: str = "cond", image: int = 0,
               columns: Sequence[int] | None = None) -> torch.Tensor:
        """One layer's kept probabilities as they are, float32 [heads, pixels, columns], mean over the chosen steps.

        `columns` index the kept columns, which are all of the text unless phrases or columns were selected.

        Raises:
            NotRecordedError: the layer, step, branch or image wasn't recorded.
        """
        if layer not in self.layers:
            raise NotRecordedError(f"layer {layer!r} wasn't recorded; recorded are {', '.join(self.layers) or 'none'}")
        row, steps = Row(branch, image), _as_set(step)
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
            raise NotRecordedError(self._what_is_there(row, sorted(steps - seen) if steps else None))
        return total / count

    def columns_of(self, phrase: str | Concept | None = None, *, part: str | None = None,
                   columns: Iterable[int] | None = None, occurrence: int | Literal["all"] = "all",
                   branch: str = "cond", image: int = 0) -> list[int]:
        """Which kept columns a phrase, a part or column numbers mean; see `select` for the arguments and errors."""
        if isinstance(phrase, Concept):
            phrase = phrase.phrase
        if columns is not None:
            return self._kept([columns] if isinstance(columns, int) else list(columns))
        if phrase is None and part is None:
            raise ValueError("say what to look at: a phrase, a part (begin, words, first_eot, padding) or columns")
        if self.phrases is not None:
            if part is not None or phrase not in self.phrases or occurrence != "all":
                more = f"; all occurrences of each are summed, so occurrence={occurrence} can't be chosen: record " \
                       "without phrases=[...] for that" if occurrence != "all" else ""
                raise NotRecordedError(f"only the phrases {', '.join(map(repr, self.phrases))} were recorded{more}")
            self.text(image).find(phrase)
            return [self.phrases.index(phrase)]
        text = self._text_for(phrase, branch, image)
        if part is None:
            return self._kept(list(text.find(phrase, occurrence).columns))
        return self._kept(list(text.part(part, phrase)))

    def _text_for(self, phrase: str | None, branch: str, image: int) -> PromptTokens:
        """The text to look a phrase up in: the branch's own, or the prompt where the negative prompt lacks it."""
        if branch == "uncond" and 0 <= image < len(self.images) and self.images[image].negative is not None:
            negative = self.images[image].negative
            try:
                if phrase is None or negative.find(phrase):
                    return negative
            except PhraseNotFoundError:
                pass
        return self.text(image)

    def _kept(self, columns: list[int]) -> list[int]:
        """Text columns as indices of the kept ones."""
        if self.phrases is not None:
            raise NotRecordedError(f"only the phrases {', '.join(map(repr, self.phrases))} were recorded, not columns")
        kept = self.chosen_columns
        if kept is None:
            count = next(iter(self.sums.values())).shape[-1] if self.sums else 0
            kept = range(count)
        missing = [column for column in columns if column not in kept]
        if missing:
            raise NotRecordedError(f"text columns {missing} weren't recorded; there are {list(kept)}")
        return [list(kept).index(column) for column in columns]

    def _heads(self, layer: str, head: int | Iterable[int] | None) -> list[int] | slice:
        """Recorded heads as indices of the kept ones."""
        wanted = _as_set(head)
        if wanted is None:
            return slice(None)
        there = self.heads[layer]
        if not wanted <= set(there):
            raise NotRecordedError(f"head {sorted(wanted - set(there))} of {layer} wasn't recorded; "
                                   f"there are {list(there) or 'only the mean over heads'}")
        return [there.index(number) for number in sorted(wanted)]

    def _what_is_there(self, row: Row, steps: list[int] | None) -> str:
        if not self.sums:
            return "nothing was recorded yet: run the pipeline inside the 'with' block"
        if steps:
            return f"steps {steps} weren't recorded; there are {self.steps}"
        return (f"branch {row.branch!r} of image {row.image} wasn't recorded; there are branches "
                f"{', '.join(self.branches)} (uncond only with guidance) and {len(self.images)} image(s)")


def _as_set(value: int | Iterable[int] | None) -> set[int] | None:
    if value is None:
        return None
    return {value} if isinstance(value, int) else set(value)


def _normalised(values: np.ndarray, how: str | None) -> np.ndarray:
    if how is None:
        return values
    if how not in ("max", "sum"):
        raise ValueError(f"normalise={how!r}; choose None, 'max' or 'sum'")
    by = values.max() if how == "max" else values.sum()
    return values / by if by > 0 else values
