"""Confidence intervals for shares of images, and for figures made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile
DRAWS = 4000  # samples of the shares' posteriors, for the interval of their harmonic mean


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share, within [0, 1] (Wilson 1927).

    Raises ValueError for no trials or an impossible number of successes.
    """
    if count <= 0 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} trials is not a share")
    share, squared = successes / count, Z95**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    half = Z95 / (1 + squared / count) * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return (middle - half if successes else 0.0), (middle + half if successes < count else 1.0)


def harmonic_mean_interval(successes: Sequence[int], totals: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the harmonic mean of shares, from their counts alone; within [0, 1].

    Each share is sampled from its Jeffreys posterior Beta(successes + 1/2, failures + 1/2); the interval is the middle
    95% of the resulting harmonic means (Brown, Cai and DasGupta 2001, "Interval estimation for a binomial proportion").
    Resampling the images instead would give a share of 0 or 1 no width at all. If the figure itself lies outside, as it
    does at 0 and at 1, the interval is extended to it. The same counts and `seed` give the same interval. Simulated
    with 24, 46 and 46 images, it holds the truth in 91 to 98 of 100 cases, in 85 to 90 if all three are .99 or more.

    Raises:
        ValueError: successes and totals differ in number, are none, or are impossible.
    """
    possible = [0 <= hits <= count > 0 for hits, count in zip(successes, totals, strict=False)]
    if not len(successes) == len(totals) == sum(possible) > 0:
        raise ValueError(f"{successes} successes of {totals} trials: give one total for each, from 1 and no smaller")
    hits, counts = np.asarray(successes, float), np.asarray(totals, float)
    drawn = np.random.default_rng(seed).beta(hits + 0.5, counts - hits + 0.5, (DRAWS, len(counts)))
    values = len(counts) / (1 / np.maximum(drawn, np.finfo(float).tiny)).sum(1)
    low, high = np.quantile(values, (0.025, 0.975))
    figure = len(counts) / float((counts / hits).sum()) if hits.all() else 0.0
    return min(float(low), figure), max(float(high), figure)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean of a few independent values.

    Raises:
        ValueError: fewer than two values, which say nothing about their spread.
    """
    from scipy.stats import t  # here alone: importing it takes most of a second

    count = len(values)
    if count < 2:
        raise ValueError(f"{count} value has no spread; an interval needs at least two seeds")
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return mean - half, mean + half


def mean_of_groups_interval(groups: Any, seed: int, samples: int = 1000) -> tuple[float, float]:
    """The 95% percentile-bootstrap interval of the mean of grouped values (a pandas groupby of a Series).

    Whole groups are resampled, for values that are independent only between groups, as maps of different images are.
    """
    sums, counts = groups.sum().to_numpy(), groups.count().to_numpy()
    drawn = np.random.default_rng(seed).integers(0, len(sums), (samples, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


Repetitions = Sequence[tuple[int, int]]  # (successes, images) of each


def difference_interval(one: Repetitions, other: Repetitions, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the difference of two mean shares, one minus the other, each from several repetitions of
    (successes, images): a bootstrap over repetitions and images.

    The repetitions (an attack's seeds) are resampled, and each one's share is sampled from a posterior, since resampled
    images would give a share of 0 or 1 no width at all (`mean_difference_interval`). If the figure itself lies outside,
    the interval is extended to it. A single repetition doesn't tell how seeds scatter.

    Raises:
        ValueError: no repetition, or an impossible number of successes.
    """
    return mean_difference_interval([one], [other], seed)


def mean_difference_interval(ones: Sequence[Repetitions], others: Sequence[Repetitions], seed: int = 0,
                             ) -> tuple[float, float]:
    """The same for the mean over groups (concepts), of which both sides have as many, in the same order: groups, their
    repetitions and their images are all resampled.

    Each share is drawn from Beta(successes + a, failures + a), with 2a = 1 / the number of shares: together they weigh
    as much as Jeffreys' prior on all images. With a = 1/2 for each, many groups of few images would be drawn far from
    the 0 that they counted. Simulated with five groups of 24 images, it holds the truth in 91 cases of 100 or
    more, and in nearly all where shares are next to 0.

    Raises:
        ValueError: no group, a group without repetitions, or an impossible number of successes.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(ones), (DRAWS, len(ones))) if ones else np.empty((DRAWS, 0), int)
    (one, mean), (other, floor) = (_drawn_means(side, chosen, rng) for side in (ones, others))
    low, high = np.quantile(one - other, (0.025, 0.975))
    return min(float(low), mean - floor), max(float(high), mean - floor)


def mean_share_interval(groups: Sequence[Repetitions], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean share over groups (concepts), in the way of `mean_difference_interval`."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(groups), (DRAWS, len(groups))) if groups else np.empty((DRAWS, 0), int)
    drawn, mean = _drawn_means(groups, chosen, rng)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return min(float(low), mean), max(float(high), mean)


def _drawn_means(groups: Sequence[Repetitions], chosen: np.ndarray, rng: np.random.Generator,
                 ) -> tuple[np.ndarray, float]:
    """Means over the groups `chosen` in each draw ([draws, groups]) of shares drawn anew, [draws]; and the mean."""
    if len(groups) != chosen.shape[1] or not len(groups):
        raise ValueError(f"{len(groups)} groups against {chosen.shape[1]}; both sides need the same, and at least one")
    prior, drawn, means = 0.5 / max(1, sum(map(len, groups))), [], []
    for group in groups:
        if not len(group) or any(not 0 <= hits <= count or count < 1 for hits, count in group):
            raise ValueError(f"{list(group)} are not repetitions of (successes, images)")
        hits, counts = np.asarray(group, float).T
        again = rng.integers(0, len(hits), (DRAWS, len(hits)))
        drawn.append(rng.beta(hits[again] + prior, counts[again] - hits[again] + prior).mean(1))
        means.append((hits / counts).mean())
    return np.take_along_axis(np.stack(drawn, axis=1), chosen, axis=1).mean(1), float(np.mean(means))
