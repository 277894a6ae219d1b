"""Confidence intervals for shares of images, and for figures made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share, within [0, 1] (Wilson 1927).

    Raises ValueError for no trials or an impossible number of successes.
    """
    if count <= 0 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} trials is no share")
    share, squared = successes / count, Z95**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    half = Z95 / (1 + squared / count) * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return (middle - half if successes else 0.0), (middle + half if successes < count else 1.0)


def bootstrap(groups: Sequence[np.ndarray], figure: Callable[..., float], seed: int = 0,
              samples: int = 1000) -> tuple[float, float]:
    """The 95% percentile-bootstrap interval of `figure(*means)`, each group of outcomes resampled on its own.

    `groups` are arrays of 0 and 1 (or any values); `figure` takes the mean of each.
    """
    rng = np.random.default_rng(seed)
    means = [group[rng.integers(0, len(group), (samples, len(group)))].mean(1) for group in map(np.asarray, groups)]
    values = [figure(*row) for row in zip(*means, strict=True)]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
