"""Interleaved timing: everything that is compared takes turns, block of steps by block of steps, in one process.

A step has a kind: whether it renews the curvature (factors AND inverses), solves the coarse system, evaluates the loss
for the adaptive damping. The kinds are timed apart, and a cycle average is put together from as many steps of each kind
as a cycle has.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

PLAIN = "plain"
LOSS_EVERY = 5
"""Steps between two evaluations of the loss, once the adaptive damping has settled."""
SETTLED = 20
"""Steps after which it has."""


@dataclass(frozen=True)
class Schedule:
    """Which steps do what.

    Attributes:
        curvature: whether there are steps with new curvature.
        coarse_every: steps between coarse solves; 0: none.
        adaptive: whether the loss is evaluated every five steps.
    """

    curvature: bool = False
    coarse_every: int = 0
    adaptive: bool = False

    @property
    def unit(self) -> int:
        """Steps after which the coarse level does the same again."""
        return math.lcm(max(1, self.coarse_every), LOSS_EVERY if self.adaptive else 1)

    @property
    def block(self) -> int:
        """Steps per turn, the first of which renews the curvature: enough for every kind that a cycle has."""
        return 4 if self.unit == 1 else 2 * self.unit

    @property
    def warm_up(self) -> int:
        """Steps that are not timed, whole blocks."""
        return self.block * math.ceil(SETTLED / self.block) if self.adaptive else self.block

    def kind(self, step: int, every: int, loss: bool | None = None) -> str:
        """The kind of a step when curvature is renewed every so many steps; ``loss``: whether it evaluates the loss."""
        due = {
            "curvature": self.curvature and step % every == 0,
            "coarse": self.coarse_every > 0 and step % self.coarse_every == 0,
            "loss": self.adaptive and step % LOSS_EVERY == 0 if loss is None else loss,
        }
        return ", ".join(name for name, is_due in due.items() if is_due) or PLAIN

    def cycle(self, every: int) -> Mapping[str, float]:
        """Kind -> its share of the steps."""
        length = math.lcm(every, self.unit)
        counts = Counter(self.kind(step, every) for step in range(length))
        return {kind: count / length for kind, count in counts.items()}


class Timed:
    """Something that is timed step by step; this one does nothing.

    Attributes:
        name: of the row.
        schedule: which of its steps do what.
    """

    name: str
    schedule = Schedule()

    def begin(self) -> None:
        """Get ready for a block of steps; not timed."""

    def kind(self) -> str:
        """What the next step is."""
        return PLAIN

    def step(self) -> None:
        """One step."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        low, median, high = statistics.quantiles([*values, *values][: max(2, len(values))], n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Times:
    """Milliseconds, round by round.

    Attributes:
        schedule: of what was timed.
        rounds: for each round, kind -> milliseconds of its steps.
    """

    schedule: Schedule
    rounds: list[dict[str, list[float]]] = field(default_factory=list)

    def of_kind(self, kind: str) -> float:
        """Median over all rounds; where the damping never settled, of the steps that evaluated the loss as well.

        Raises:
            RuntimeError: there was no such step.
        """
        with_loss = "loss" if kind == PLAIN else f"{kind}, loss"
        found = next((ms for name in (kind, with_loss) if (ms := self._all(name))), None)
        if found is None:
            seen = sorted({kind for each in self.rounds for kind in each})
            raise RuntimeError(f"no step of the kind {kind!r} was timed, only {seen}")
        return statistics.median(found)

    def _all(self, kind: str) -> list[float]:
        return [ms for each in self.rounds for ms in each.get(kind, ())]

    def cycles(self, every: int) -> list[float]:
        """The cycle average of every round; a kind that a round lacks counts as it does over all rounds."""
        shares = self.schedule.cycle(every)
        return [
            sum(
                share * (statistics.median(each[kind]) if kind in each else self.of_kind(kind))
                for kind, share in shares.items()
            )
            for each in self.rounds
        ]


def ratio(times: Times, base: Times, every: int) -> Spread:
    """Cycle average over that of ``base``, of the same round: what disturbs the machine disturbs both."""
    return Spread.of([own / other for own, other in zip(times.cycles(every), base.cycles(every), strict=True)])


def measure(timed: Sequence[Timed], rounds: int, ready: Callable[[], object] = lambda: None) -> dict[str, Times]:
    """Name -> its times; ``ready`` is called before every step (a barrier of the ranks)."""
    times = {each.name: Times(each.schedule) for each in timed}
    for each in timed:
        for step in range(each.schedule.warm_up):
            if step % each.schedule.block == 0:
                each.begin()
            each.step()
    for _ in range(rounds):
        for each in timed:
            each.begin()
            found: dict[str, list[float]] = {}
            for _ in range(each.schedule.block):
                kind = each.kind()
                ready()
                start = time.perf_counter()
                each.step()
                found.setdefault(kind, []).append(1e3 * (time.perf_counter() - start))
            times[each.name].rounds.append(found)
    return times
