"""Numbers that users give, checked before anything is drawn or trained: one clear line instead of a library's."""

from __future__ import annotations

import math
import numbers
from typing import Any

SEED_LIMIT = 2**63


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int; numpy's and torch's whole numbers count, too.

    Raises:
        ValueError: it isn't one (neither is True or a text), or lies outside [least, most]; the message names it.
    """
    value = _plain(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if least <= int(value) and (most is None or int(value) <= most):
            return int(value)
    upper = "" if most is None else f" to {most}"
    raise ValueError(f"{name} must be a whole number from {least}{upper}, not {value!r}")


def _plain(value: Any) -> Any:
    """A numpy or torch scalar as a Python number; everything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def finite_number(name: str, value: Any, least: float = -math.inf) -> float:
    """`value` as a finite float.

    Raises:
        ValueError: it isn't a number (True and texts aren't), is NaN, infinite or below `least`; the message names it.
    """
    value = _plain(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value >= least:
        return float(value)
    lower = "" if least == -math.inf else f" from {least:g}"
    raise ValueError(f"{name} must be a finite number{lower}, not {value!r}")


def checked_seed(value: Any, name: str = "a seed") -> int:
    """A seed, from 0 to 2**63 - 1; ValueError otherwise."""
    return whole_number(name, value, 0, SEED_LIMIT - 1)
