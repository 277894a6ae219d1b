"""Attention in words and small tables: what stands beside each figure, for whom the figure isn't enough."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fmn_nb.attention import AttentionRecord
from fmn_nb.concepts import Concept

ROWS, COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")


def describe(attention_map: np.ndarray, name: str = "the phrase") -> str:
    """A sentence on a map [height, width]: how much there is, where its peak is, how concentrated it is.

    Raises:
        ValueError: not a two-dimensional map, or 0 everywhere.
    """
    values = np.asarray(attention_map, dtype=float)
    if values.ndim != 2 or values.max() <= 0:
        raise ValueError(f"an attention map is [height, width] and not 0 everywhere; got shape {values.shape}")
    row, column = np.unravel_index(values.argmax(), values.shape)
    top = np.sort(values, axis=None)[::-1][: max(1, round(values.size / 10))]
    peak = place((row + 0.5) / values.shape[0], (column + 0.5) / values.shape[1])
    return (f"{name!r} gets {values.mean():.1%} of the attention on average and {values.max():.1%} at its peak, at the "
            f"{peak}; the tenth of the image that looks at it most holds {top.sum() / values.sum():.0%} of it.")


def describe_tokens(masses: Sequence[tuple[str, float]], words: Collection[str]) -> str:
    """A sentence on how the tokens share the attention: (token, mass) of each, and which of the tokens are words."""
    name, most = max(masses, key=lambda one: one[1])
    own = [one for one in masses if one[0] in words]
    sentence = f"Of {len(masses)} tokens {name!r} gets most attention ({most:.1%})"
    if not own or name in words:
        return sentence + "."
    word, share = max(own, key=lambda one: one[1])
    return f"{sentence}, of the words {word!r} ({share:.1%})."


def describe_rows(rows: Sequence[Sequence[np.ndarray | None]], row_names: Sequence[str],
                  column_names: Sequence[str]) -> str:
    """A clause for each row of a sheet of maps: which column has the largest mean, and which the smallest."""
    clauses = []
    for name, row in zip(row_names, rows, strict=True):
        means = {column: float(values.mean()) for column, values in zip(column_names, row, strict=False)
                 if values is not None}
        most, least = max(means, key=means.get), min(means, key=means.get)
        rest = f", least at {least} ({means[least]:.1%})" if least != most else ""
        clauses.append(f"{name}: most at {most} ({means[most]:.1%}){rest}")
    return "Mean attention by row. " + "; ".join(clauses) + "."


def describe_pair(first: np.ndarray, second: np.ndarray, names: tuple[str, str]) -> str:
    """A sentence on two maps of one shape: their means, and where they differ most."""
    difference = np.asarray(first, dtype=float) - second
    row, column = np.unravel_index(np.abs(difference).argmax(), difference.shape)
    where = place((row + 0.5) / difference.shape[0], (column + 0.5) / difference.shape[1])
    return (f"On average {first.mean():.1%} {names[0]} and {second.mean():.1%} {names[1]}; the largest difference is "
            f"{difference[row, column]:+.1%}, at the {where}.")


def describe_qkv(shares: np.ndarray, tokens: Sequence[str]) -> str:
    """A sentence on one head's attention [pixels, tokens]: who is looked at most, and by how many pixels."""
    mass, winners = shares.mean(axis=0), shares.argmax(axis=1)
    most, often = int(mass.argmax()), int(np.bincount(winners, minlength=len(tokens)).argmax())
    return (f"Of {len(tokens)} tokens {tokens[most]!r} gets most attention ({mass[most]:.0%} on average); for "
            f"{(winners == often).sum()} of the {len(shares)} pixels shown {tokens[often]!r} has the largest share. "
            "Each row of A sums to 1.")


def place(down: float, right: float) -> str:
    """A position, given as fractions of height and width, in words: "upper left", "centre"."""
    row, column = ROWS[min(int(down * 3), 2)], COLUMNS[min(int(right * 3), 2)]
    return "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"


def token_table(attention: AttentionRecord, *, image: int = 0, branch: str = "cond", **choice: Any) -> pd.DataFrame:
    """How much attention each text column gets: column, token, part, mass (a fraction; they add up to 1 in
    cross-attention). All padding is one row, with its first column.

    `choice` may name step, layer and head, as for `AttentionRecord.mass`.
    """
    text = attention.text(image, branch)
    attention.columns_of(columns=range(len(text.tokens)))  # an error where only some were recorded
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
    """The attention a phrase gets at each recorded step: step, timestep, mass (a fraction)."""
    return pd.DataFrame([{"step": step, "timestep": attention.timesteps[step],
                          "mass": attention.mass(phrase, step=step, **choice)} for step in attention.steps])


def head_table(attention: AttentionRecord, phrase: str | Concept, layer: str, **choice: Any) -> pd.DataFrame:
    """The attention a phrase gets from each head of a layer: head, mass (a fraction)."""
    return pd.DataFrame([{"head": head, "mass": attention.mass(phrase, layer=layer, head=head, **choice)}
                         for head in attention.heads[layer]])


def comparison(maps: Sequence[np.ndarray], names: Sequence[str]) -> pd.DataFrame:
    """Maps beside each other: mean, peak, where the peak is, and the correlation with the first map, in [-1, 1].

    Raises:
        ValueError: maps of different shapes, or not one name for each.
    """
    if len({np.shape(m) for m in maps}) != 1 or len(maps) != len(names):
        raise ValueError(f"{[np.shape(m) for m in maps]} and {len(names)} names: give maps of one shape, each a name")
    rows = []
    for values, name in zip(maps, names, strict=True):
        row, column = np.unravel_index(np.argmax(values), values.shape)
        varied = np.ptp(values) > 0 and np.ptp(maps[0]) > 0
        rows.append({"map": name, "mean": float(values.mean()), "peak": float(values.max()),
                     "where": place((row + 0.5) / values.shape[0], (column + 0.5) / values.shape[1]),
                     "correlation": float(np.corrcoef(maps[0].ravel(), values.ravel())[0, 1]) if varied else None})
    return pd.DataFrame(rows)
