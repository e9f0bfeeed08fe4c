"""What the steps of a run cost, added up without waiting for a device before somebody asks."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from kfac_dist.metrics import Metrics, PhaseTimer

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Costs:
    """Sums over some steps.

    Attributes:
        steps: optimizer steps.
        milliseconds: of the training steps, from batch start to batch end; all micro-batches count.
        phases: phase of K-FAC -> milliseconds.
        payload_bytes: phase -> bytes that this rank handed to collectives.
    """

    steps: int = 0
    milliseconds: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)
    payload_bytes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.steps + other.steps,
            self.milliseconds + other.milliseconds,
            Counter({name: self.phases[name] + other.phases[name] for name in {**self.phases, **other.phases}}),
            self.payload_bytes + other.payload_bytes,
        )

    @property
    def shares(self) -> dict[str, float]:
        """Phase -> its share of the milliseconds."""
        return {phase: value / self.milliseconds for phase, value in self.phases.items()} if self.milliseconds else {}

    @property
    def share(self) -> float:
        """K-FAC's share of the milliseconds."""
        return sum(self.shares.values())

    def per_step(self) -> dict[str, float]:
        """Means, under the names that loggers see."""
        if not self.steps:
            return {}
        values = {f"ms_per_step/{phase}": value / self.steps for phase, value in self.phases.items()}
        values |= {f"bytes_per_step/{phase}": value / self.steps for phase, value in self.payload_bytes.items()}
        return values | {"ms_per_step/all": self.milliseconds / self.steps, "time_share": self.share}


class Measures:
    """A window of steps that has not been read yet, and the sum of all windows before it.

    Args:
        device: where the training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = Costs()
        self._device = device
        self._span: AbstractContextManager[None] | None = None
        self._open()

    def _open(self) -> None:
        self._clock = PhaseTimer(self._device)
        self._timers: list[PhaseTimer] = []
        self._bytes: Counter[str] = Counter()

    def begin(self) -> None:
        """A batch begins."""
        self._span = self._clock("")
        self._span.__enter__()

    def end(self) -> None:
        """A batch ended."""
        span, self._span = self._span, None
        if span is not None:
            span.__exit__(None, None, None)

    def add(self, metrics: Metrics) -> None:
        """K-FAC made a step."""
        if metrics.timer is not None:
            self._timers.append(metrics.timer)
        for name, value in metrics.ready().items():
            if name.startswith("bytes/"):
                self._bytes[name.removeprefix("bytes/")] += int(value)

    def read(self) -> Costs:
        """The costs since the last reading; waits for the device where it has a clock of its own."""
        phases: Counter[str] = Counter()
        for timer in self._timers:
            phases.update(timer.milliseconds())
        costs = Costs(len(self._timers), self._clock.milliseconds().get("", 0.0), phases, self._bytes)
        self.total = self.total + costs
        self._open()
        return costs


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the device's peak, or the process's on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
