"""Where losses are compared: after a number of epochs, and after a number of seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfac_dist.study.protocol import Protocol
from kfac_dist.study.readings import Lines, after_epochs, after_seconds, evaluated, number

CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
SECONDS = {"seconds": "s", "cpu_seconds": "CPU s"}
WORDS = {"seconds": "seconds", "cpu_seconds": "CPU seconds"}


@dataclass(frozen=True)
class Budget:
    """The end of one of a protocol's two budgets.

    Attributes:
        amount: of epochs or seconds.
        clock: whose seconds ("seconds" or "cpu_seconds"); None: epochs.
    """

    amount: float
    clock: str | None = None

    @property
    def words(self) -> str:
        """For tables."""
        return f"{self.amount:g} {SECONDS[self.clock] if self.clock else 'epochs'}"

    def loss(self, lines: Lines, key: str = "loss") -> float:
        """The loss then; infinite where the run did not come so far, or was above its initial training loss."""
        training = self.reading(lines, "loss")
        if math.isinf(training) or training > number(evaluated(lines)[0]["loss"]):
            return math.inf
        return training if key == "loss" else self.reading(lines, key)

    def reading(self, lines: Lines, key: str = "loss") -> float:
        """The loss then, even above the initial one; infinite where the run did not come so far."""
        if self.clock is None:
            return after_epochs(lines, self.amount, key)
        return after_seconds(lines, self.amount, key, self.clock)


def budgets(protocol: Protocol) -> list[Budget]:
    """Those that the protocol gives: epochs, then seconds."""
    found = [Budget(protocol.epochs)] if protocol.epochs else []
    return found + ([Budget(protocol.seconds, CLOCKS[protocol.clock])] if protocol.seconds else [])


def step_milliseconds(lines: Lines, protocol: Protocol) -> float:
    """What a step took on average, updates of the curvature included."""
    return 1e3 * lines[-1][CLOCKS[protocol.clock]] / max(1, lines[-1]["step"])
