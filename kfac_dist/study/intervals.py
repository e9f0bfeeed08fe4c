"""Bootstrap intervals of medians over seeds, and the verdict that the interval of a ratio allows.

Losses may be infinite: a run that diverged is the worst there is, and counts. A ratio against it is 0, its own ratio
is infinite, and where both diverged they tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
MARGIN = 0.05
"""A gain below this share is none that would pay for a coarse level."""
FEWEST_SEEDS = 5
"""With fewer, even the range over the seeds holds the median in less than 93 of 100 cases: no verdict."""

Verdict = Literal["helps", "does not help", "harms", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A median over seeds, and between which values it lies.

    Attributes:
        middle: the median.
        low: lower end; an end is always the median of one of the resamples, never between two of them.
        high: upper end.
        count: of the seeds.
    """

    middle: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> Verdict:
        """What an interval of the ratio (with a coarse level) / (without it) says about the coarse level."""
        if self.count < FEWEST_SEEDS:
            return "undecided"
        if self.low > 1:
            return "harms"
        if self.high < 1:
            return "helps"
        return "does not help" if self.low > 1 - MARGIN else "undecided"


@lru_cache
def resamples(count: int) -> np.ndarray:
    """Which of ``count`` values each resample holds (RESAMPLES, count), the same at every call."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def medians_interval(columns: np.ndarray) -> np.ndarray:
    """Percentile bootstrap of the median over the first axis.

    Args:
        columns: (seeds, points); infinities are allowed.

    Returns:
        Median, lower and upper end (3, points).

    Raises:
        ValueError: no seed at all, or a value that is no number.
    """
    if not len(columns) or np.isnan(columns).any():
        raise ValueError(f"{len(columns)} rows: give at least one, and infinity in place of what is no number")
    columns = np.asarray(columns, dtype=float)
    drawn = resamples(len(columns))
    ends = []
    for column in columns.T:
        found = np.sort(np.median(column[drawn], axis=1))
        below = math.floor((1 - LEVEL) / 2 * (RESAMPLES - 1))
        ends.append((np.median(column), found[below], found[RESAMPLES - 1 - below]))
    return np.array(ends).reshape(-1, 3).T


def median_interval(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the median."""
    middle, low, high = medians_interval(np.asarray(values, dtype=float)[:, None])[:, 0]
    return Interval(float(middle), float(low), float(high), len(values))


def ratio(value: float, other: float) -> float:
    """Value / other; 1 where they are equal, both infinite or both 0 included."""
    if value == other:
        return 1.0
    if math.isinf(value) or other == 0:
        return math.inf
    return value / other


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Percentile bootstrap of the median of ratios, seed by seed."""
    return median_interval([ratio(value, other) for value, other in zip(values, others, strict=True)])


def share_won(values: Sequence[float], others: Sequence[float]) -> float:
    """Of the seeds, the share in which the value is below the other; a tie is half a win."""
    won = [
        1.0 if value < other else 0.5 if value == other else 0.0 for value, other in zip(values, others, strict=True)
    ]
    return sum(won) / len(won)
