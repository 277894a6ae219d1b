"""What a recorder is asked to keep: layers, steps, heads, branch, and which of the text's columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from fmn_nb.concepts import Concept

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Selection:
    """What to keep; see `fmn_nb.attention.record_attention` for the meaning of each. None means all."""

    layers: str | Sequence[str] | None = None
    steps: frozenset[int] | None = None
    heads: tuple[int, ...] | Literal["mean"] | None = None
    branch: Literal["cond", "uncond"] | None = None
    phrases: tuple[str, ...] | None = None
    columns: Any = None
    keep: Literal["auto", "mean", "steps"] = "auto"
    differentiable: bool = False
    dtype: torch.dtype = torch.float32
    max_bytes: int = 1024 * MEBIBYTE

    def __post_init__(self) -> None:
        _one_of("keep", self.keep, ("auto", "mean", "steps"))
        _one_of("branch", self.branch, (None, "cond", "uncond"))
        _one_of("dtype", self.dtype, (torch.float32, torch.float16, torch.bfloat16))
        if self.phrases is not None and self.columns is not None:
            raise ValueError("select phrases or columns, not both")
        if self.differentiable:
            self._check_differentiable()
        elif self.columns is not None:
            object.__setattr__(self, "columns", _plain_numbers(self.columns))
        for name in ("steps", "heads", "phrases"):
            value = getattr(self, name)
            if value is not None and not value:
                raise ValueError(f"{name} is empty, so nothing would be kept; leave it out to keep all")
        for name in ("steps", "heads"):
            value = getattr(self, name)
            if value not in (None, "mean") and min(value) < 0:
                raise ValueError(f"{name} count from 0; got {sorted(value)}")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes} keeps nothing; give a number of bytes above 0")

    def _check_differentiable(self) -> None:
        """Nothing is kept but the last run's graph, so what says what to keep would be ignored."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        ignored = [name for name in ("phrases", "branch", "steps", "keep", "dtype", "max_bytes")
                   if getattr(self, name) != defaults[name]]
        if ignored:
            raise ValueError(f"{', '.join(ignored)} can't be selected with differentiable=True, which keeps the whole "
                             "batch of the last run: choose layers, heads and columns there (columns of a phrase: "
                             "fmn_nb.concepts.positions)")


def as_phrases(phrases: str | Concept | Iterable[str | Concept] | None) -> tuple[str, ...] | None:
    """One or several phrases or concepts as the phrases to look for, each once."""
    if phrases is None:
        return None
    several = [phrases] if isinstance(phrases, str | Concept) else phrases
    return tuple(dict.fromkeys(p.phrase if isinstance(p, Concept) else p for p in several))


def as_numbers(numbers: int | Iterable[int] | Literal["mean"] | None) -> tuple[int, ...] | Literal["mean"] | None:
    """One or several numbers in ascending order, each once."""
    if numbers is None or numbers == "mean":
        return numbers
    return tuple(sorted({int(n) for n in ([numbers] if isinstance(numbers, int) else numbers)}))


def column_table(columns: Any, rows: int, count: int,
                 device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen columns of each row of a batch, as one rectangle.

    Args:
        columns: numbers for all rows alike, one list or tensor of numbers for each row (of any lengths), or a boolean
            mask [rows, count].
        rows: rows in the batch.
        count: columns there are.

    Returns:
        The column numbers [rows, chosen], filled up with 0, and which of them count, 1.0 or 0.0, [rows, chosen].

    Raises:
        ValueError: not one list for each row, or a number that is no column.
    """
    if isinstance(columns, torch.Tensor) and columns.dtype == torch.bool:
        if columns.shape[-1] != count:
            raise ValueError(f"the mask has {columns.shape[-1]} columns; the text has {count}")
        columns = [row.nonzero().flatten() for row in columns.reshape(-1, count)]
        columns = columns * rows if len(columns) == 1 else columns
    elif len(columns) == 0 or torch.as_tensor(columns[0]).ndim == 0:
        columns = [columns] * rows
    lists = [torch.as_tensor(row, dtype=torch.long).flatten().cpu() for row in columns]
    if len(lists) != rows:
        raise ValueError(f"columns were given for {len(lists)} rows; the batch has {rows}")
    if any(row.numel() and (row.min() < 0 or row.max() >= count) for row in lists):
        raise ValueError(f"text columns go from 0 to {count - 1}; got {[row.tolist() for row in lists]}")
    width = max(len(row) for row in lists)
    table, there = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width)
    for index, row in enumerate(lists):
        table[index, : len(row)], there[index, : len(row)] = row, 1
    return table.to(device), there.to(device)


def _plain_numbers(columns: Any) -> tuple[int, ...]:
    """Column numbers that hold for all rows.

    Raises:
        ValueError: a list for each row, a mask, or nothing.
    """
    numbers = columns.tolist() if isinstance(columns, torch.Tensor) else list(columns)
    if not numbers:
        raise ValueError("columns is empty, so nothing would be kept; leave it out to keep all")
    if any(isinstance(number, bool | list | tuple) or torch.as_tensor(number).ndim for number in numbers):
        raise ValueError("columns must be plain numbers here; lists for each row and masks need differentiable=True")
    return tuple(int(number) for number in numbers)


def _one_of(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(map(repr, choices))}")
