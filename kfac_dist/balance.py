"""Jobs to workers: longest first, then moves and swaps until none of them helps.

A job has one cost per phase, and a phase takes as long as its most loaded worker; jobs that are short in one phase may
be long in another, so that a sum of costs would balance neither. Pure Python; the same answer for the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

TOLERANCE = 0.1
"""A phase may take this much longer than its lower bound where that makes the phases together faster."""

ENOUGH = 0.01
"""Schedules whose phases are all this near their lower bounds are left as they are."""

LOOKS = 50_000
"""How many exchanges are looked at, at most: about a second."""


def longest_first(jobs: Sequence[float], workers: int, before: Sequence[float] = ()) -> list[int]:
    """The worker of each job: longest job first, to the least loaded worker (Graham 1969).

    Ties go to the worker with the least load from ``before``, then by index.
    """
    loads, chosen = [0.0] * workers, [0] * len(jobs)
    before = before or [0.0] * workers
    for job in sorted(range(len(jobs)), key=lambda i: (-jobs[i], i)):
        chosen[job] = min(range(workers), key=lambda w: (loads[w], before[w], w))
        loads[chosen[job]] += jobs[job]
    return chosen


def makespan_lower_bound(jobs: Sequence[float], workers: int) -> float:
    """No schedule of ``jobs`` on ``workers`` identical ranks can end before this.

    The largest of: total / P; the longest job; and for k = 1, 2, ..: the sum of the k+1 smallest among the kP+1
    longest jobs, since some rank must take k+1 of those.

    Raises:
        ValueError: ``workers`` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    ordered = sorted(jobs, reverse=True)
    bounds = [sum(ordered) / workers, *ordered[:1]]
    for k in range(1, (len(ordered) - 1) // workers + 1):
        bounds.append(sum(ordered[: k * workers + 1][-(k + 1) :]))
    return max(bounds)


@dataclass(frozen=True)
class Phase:
    """One phase in which every worker does its share.

    Attributes:
        jobs: the cost of every job in it.
        weight: how often it happens.
    """

    jobs: Sequence[float]
    weight: float = 1.0


def balance(phases: Sequence[Phase], workers: int) -> list[int]:
    """The worker of each job, such that the phases take little time together and none of them far above its bound.

    That is: first the excess of the worst phase over ``1 + TOLERANCE`` times its lower bound, then the weighted sum of
    all makespans. From two schedules, longest first by the weighted and by the relative costs, single jobs are moved
    and pairs are swapped between a most loaded worker and the others until that helps no more.
    """
    bounds = [makespan_lower_bound(phase.jobs, workers) or 1.0 for phase in phases]
    number = len(phases[0].jobs)
    starts = [
        [sum(weight * phase.jobs[job] for weight, phase in zip(weights, phases, strict=True)) for job in range(number)]
        for weights in ([phase.weight for phase in phases], [1.0 / bound for bound in bounds])
    ]
    schedules = [_Schedule(phases, bounds, workers, longest_first(costs, workers)) for costs in starts]
    for schedule in schedules:
        schedule.improve()
    return min(schedules, key=_Schedule.value).place


Value = tuple[float, float]


class _Schedule:
    """Jobs on workers, and the loads that follow from it."""

    def __init__(self, phases: Sequence[Phase], bounds: Sequence[float], workers: int, place: list[int]) -> None:
        self.place = place
        self._phases, self._bounds = phases, bounds
        self._loads = [[0.0] * workers for _ in phases]
        self._held: list[list[int]] = [[] for _ in range(workers)]
        for job, worker in enumerate(place):
            self._put(job, worker)

    def improve(self) -> None:
        """Make the best exchange until none helps, or as many have been looked at as may be."""
        looks = LOOKS
        while looks > 0 and self._worst(self._makespans()) > 1.0 + ENOUGH:
            excess, time = self.value()
            found = list(islice(self._exchanges(), looks))
            looks -= len(found)
            best, exchange = min(found, default=((excess, time), ()))
            if best[0] >= excess and (best[0] > excess or best[1] >= time * (1 - 1e-9)):
                return
            giver, taker, job, other = exchange
            self._move(job, taker)
            if other >= 0:
                self._move(other, giver)

    def value(self) -> Value:
        """What is to be small: the excess of the worst phase, then the weighted time."""
        return self._value_of(self._makespans())

    def _makespans(self) -> list[float]:
        return [max(loads) for loads in self._loads]

    def _worst(self, makespans: Sequence[float]) -> float:
        return max(span / bound for span, bound in zip(makespans, self._bounds, strict=True))

    def _value_of(self, makespans: Sequence[float]) -> Value:
        time = sum(phase.weight * span for phase, span in zip(self._phases, makespans, strict=True))
        # Rounded: loads that are added up in another order are the same.
        return round(max(self._worst(makespans) - 1.0 - TOLERANCE, 0.0), 9), time

    def _exchanges(self) -> Iterator[tuple[Value, tuple[int, ...]]]:
        """(value afterwards, (giver, taker, job, job in return or -1)) for every move and swap of a busiest worker."""
        workers = range(len(self._held))
        leading = [sorted(workers, key=lambda w, loads=loads: -loads[w])[:3] for loads in self._loads]  # type: ignore[misc]
        for giver in dict.fromkeys(most[0] for most in leading):
            for taker in workers:
                if taker == giver:
                    continue
                others = [
                    next((loads[w] for w in most if w not in (giver, taker)), 0.0)
                    for loads, most in zip(self._loads, leading, strict=True)
                ]
                for job in self._distinct(giver):
                    for other in (-1, *self._distinct(taker)):
                        yield self._value_of(self._after(giver, taker, job, other, others)), (giver, taker, job, other)

    def _distinct(self, worker: int) -> list[int]:
        """One of the worker's jobs for every set of costs: networks repeat their layers."""
        return list({tuple(phase.jobs[job] for phase in self._phases): job for job in self._held[worker]}.values())

    def _after(self, giver: int, taker: int, job: int, other: int, rest: Iterable[float]) -> list[float]:
        """The makespans after an exchange; ``rest`` are those of all other workers."""
        spans = []
        for phase, loads, third in zip(self._phases, self._loads, rest, strict=True):
            moved = phase.jobs[job] - (phase.jobs[other] if other >= 0 else 0.0)
            spans.append(max(third, loads[giver] - moved, loads[taker] + moved))
        return spans

    def _move(self, job: int, worker: int) -> None:
        before = self.place[job]
        self._held[before].remove(job)
        for phase, loads in zip(self._phases, self._loads, strict=True):
            loads[before] -= phase.jobs[job]
        self.place[job] = worker
        self._put(job, worker)

    def _put(self, job: int, worker: int) -> None:
        self._held[worker].append(job)
        for phase, loads in zip(self._phases, self._loads, strict=True):
            loads[worker] += phase.jobs[job]
