from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.balance import ENOUGH, TOLERANCE, Phase, balance, longest_first, makespan_lower_bound

costs = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=6)
# Convolutions of a ResNet in turn: short and wide ones, which one phase finds dear and the other cheap.
PAIRS = [(d_in * d_out * (d_in + d_out), d_in**3 + d_out**3) for d_in, d_out in [(576, 64), (64, 256), (256, 64)] * 9]
PAIRS += [(d_in * d_out * (d_in + d_out), d_in**3 + d_out**3) for d_in, d_out in [(1152, 128), (512, 128)] * 3]


def spans(phases: list[Phase], places: list[int], workers: int) -> list[float]:
    return [
        max(sum(job for job, at in zip(phase.jobs, places, strict=True) if at == w) for w in range(workers))
        for phase in phases
    ]


def value(phases: list[Phase], places: list[int], workers: int) -> tuple[float, float]:
    found = spans(phases, places, workers)
    bounds = [makespan_lower_bound(phase.jobs, workers) for phase in phases]
    worst = max(span / bound for span, bound in zip(found, bounds, strict=True))
    time = sum(phase.weight * span for phase, span in zip(phases, found, strict=True))
    return max(0.0, worst - 1 - TOLERANCE), time


def phases_of(pairs: list[tuple[int, int]], weight: float) -> list[Phase]:
    first, second = zip(*pairs, strict=True)
    return [Phase(first, weight), Phase(second)]


def test_lower_bound_by_hand():
    assert makespan_lower_bound([], 3) == 0
    assert makespan_lower_bound([9, 1, 1], 2) == 9
    assert makespan_lower_bound([2, 2, 2, 2], 2) == 4
    assert makespan_lower_bound([5, 5, 5], 2) == 10  # total / 2 is only 7.5: one rank takes two of the three
    assert makespan_lower_bound([4, 4, 4, 4, 4], 2) == 12  # k = 2: three of the five longest


def test_no_worker_has_no_bound():
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        makespan_lower_bound([1.0], 0)


@given(costs, st.integers(1, 3), st.sampled_from([1.0, 10.0]))
def test_no_schedule_that_one_exchange_gives_is_better(pairs, workers, weight):
    phases = phases_of(pairs, weight)
    places = balance(phases, workers)
    found = spans(phases, places, workers)
    bounds = [makespan_lower_bound(phase.jobs, workers) for phase in phases]
    if all(span <= (1 + ENOUGH) * bound for span, bound in zip(found, bounds, strict=True)):
        return
    excess, time = value(phases, places, workers)
    for first, second in itertools.combinations(range(len(pairs)), 2):
        swapped = list(places)
        swapped[first], swapped[second] = places[second], places[first]
        moved = [[*places[:first], worker, *places[first + 1 :]] for worker in range(workers)]
        for other in (swapped, *moved):
            other_excess, other_time = value(phases, other, workers)
            assert other_excess >= excess - 1e-8
            assert other_excess > excess + 1e-8 or other_time >= time * (1 - 1e-8)


@pytest.mark.parametrize("workers", [2, 3, 4, 5])
@pytest.mark.parametrize("weight", [1, 10, 100])
def test_both_phases_are_near_their_bounds_where_a_sum_of_costs_misses_one(workers, weight):
    phases = phases_of(PAIRS, weight)
    bounds = [makespan_lower_bound(phase.jobs, workers) for phase in phases]
    found = spans(phases, balance(phases, workers), workers)
    assert all(span <= (1 + TOLERANCE) * bound for span, bound in zip(found, bounds, strict=True))


def test_longest_first_by_the_sum_does_miss_one():
    phases = phases_of(PAIRS, 100)
    places = longest_first([100 * first + second for first, second in PAIRS], 4)
    bounds = [makespan_lower_bound(phase.jobs, 4) for phase in phases]
    assert any(span > (1 + TOLERANCE) * bound for span, bound in zip(spans(phases, places, 4), bounds, strict=True))


def test_within_the_tolerance_the_weight_decides():
    pairs = [(22, 36), (32, 34), (10, 33), (34, 10)]
    often, rarely = (phases_of(pairs, weight) for weight in (100, 0.01))
    assert spans(often, balance(often, 2), 2) == [54, 70]
    assert spans(rarely, balance(rarely, 2), 2) == [56, 67]


@given(costs, st.integers(1, 3))
def test_every_job_has_one_worker_and_the_answer_is_the_same_again(pairs, workers):
    phases = phases_of(pairs, 3)
    places = balance(phases, workers)
    assert len(places) == len(pairs)
    assert set(places) <= set(range(workers))
    assert balance(phases, workers) == places
