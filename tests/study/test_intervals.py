from __future__ import annotations

import math
from itertools import product
from statistics import median

import numpy as np
import pytest

from kfac_dist.study.intervals import (
    Interval,
    median_interval,
    medians_interval,
    ratio,
    ratio_interval,
    share_won,
)


def exact_ends(values: list[float]) -> tuple[float, float]:
    """2.5 and 97.5 per cent points of the median over all resamples there are, each once."""
    found = sorted(median(drawn) for drawn in product(values, repeat=len(values)))
    return found[math.ceil(0.025 * len(found)) - 1], found[math.ceil(0.975 * len(found)) - 1]


@pytest.mark.parametrize(
    "values",
    [
        [3.0],
        [3.0, 1.0],
        [5.0, 1.0, 2.0],
        [5.0, 1.0, 2.0, 9.0, 4.0],
        [5.0, 1.0, 2.0, 9.0, 4.0, 7.0, 8.0],
        [5.0, 1.0, math.inf, 9.0, 4.0, 7.0, math.inf],
    ],
)
def test_the_interval_is_that_of_all_resamples(values: list[float]) -> None:
    found = median_interval(values)
    assert (found.low, found.high) == exact_ends(values)
    assert (found.middle, found.count) == (median(values), len(values))


def test_with_five_seeds_it_is_their_range() -> None:
    assert median_interval([0.3, 0.1, 0.2, 0.5, 0.4]) == Interval(0.3, 0.1, 0.5, 5)


def test_many_points_are_as_each_by_itself() -> None:
    columns = np.random.default_rng(1).random((6, 4))
    found = medians_interval(columns)
    for column, (middle, low, high) in zip(columns.T, found.T, strict=True):
        assert median_interval(list(column)) == Interval(middle, low, high, 6)


# In 600 samples of a known median; the exact coverage of the range of five is 1 - 2 / 2**5 = 0.9375.
@pytest.mark.parametrize(("count", "expected"), [(5, 0.9375), (3, 0.75), (11, 0.95)])
def test_it_covers_the_median_as_often_as_it_says(count: int, expected: float) -> None:
    samples = np.exp(np.random.default_rng(7).normal(size=(count, 600)))  # the median is 1
    _, low, high = medians_interval(samples)
    assert np.mean((low <= 1) & (high >= 1)) == pytest.approx(expected, abs=0.03)


def test_a_diverged_run_is_the_worst_and_counts() -> None:
    inf = math.inf
    assert [ratio(1, inf), ratio(inf, 1), ratio(inf, inf), ratio(0, 0), ratio(1, 0)] == [0, inf, 1, 1, inf]
    assert ratio_interval([1.0, 1.0, inf], [2.0, inf, 1.0]) == Interval(0.5, 0.0, inf, 3)
    assert share_won([1.0, inf, inf, 2.0], [inf, 1.0, inf, 3.0]) == 0.625  # two won, one lost, one tie
    with pytest.raises(ValueError, match="infinity in place of what is no number"):
        median_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="0 rows"):
        median_interval([])


@pytest.mark.parametrize(
    ("low", "high", "count", "verdict"),
    [
        (0.7, 0.9, 5, "helps"),
        (0.96, 0.99, 5, "helps"),
        (0.0, 0.5, 5, "helps"),
        (0.7, 1.0, 5, "undecided"),
        (0.94, 1.2, 5, "undecided"),
        (0.96, 1.2, 5, "does not help"),
        (1.0, 1.0, 5, "does not help"),
        (1.01, 1.2, 5, "harms"),
        (1.01, math.inf, 5, "harms"),
        (0.7, 0.9, 4, "undecided"),
        (1.1, 1.2, 1, "undecided"),
    ],
)
def test_the_verdict_follows_from_the_interval(low: float, high: float, count: int, verdict: str) -> None:
    assert Interval((low + high) / 2, low, high, count).verdict == verdict
