"""What the last step did: numbers that are computed on the device and read only when somebody asks.

Keys are slash-separated, such as "ms/precondition" or "bytes/factors".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MetricValue = float | Tensor | Callable[[], float]
"""A number, one that lives on a device, or one that is computed when it is read."""


class PhaseTimer:
    """Milliseconds per named phase of one step, without synchronising a CUDA device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, ...]]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body of a ``with`` statement under ``phase``; repeated phases add up."""
        start = self._now()
        try:
            yield
        finally:
            self._spans.setdefault(phase, []).append((start, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Phase -> milliseconds; waits for the device where it has one."""
        if self._cuda:
            torch.cuda.synchronize()
            return {phase: sum(a.elapsed_time(b) for a, b in spans) for phase, spans in self._spans.items()}
        return {phase: sum(b - a for a, b in spans) * 1e3 for phase, spans in self._spans.items()}


class Metrics(Mapping[str, float]):
    """Name -> number of the last step. Reading a value that lives on a device synchronises with it."""

    def __init__(self) -> None:
        self._values: dict[str, MetricValue] = {}
        self._timer: PhaseTimer | None = None

    def replace(self, values: Mapping[str, MetricValue], timer: PhaseTimer) -> None:
        """Set the numbers of a new step."""
        self._values = dict(values)
        self._timer = timer

    @property
    def timer(self) -> PhaseTimer | None:
        """The phases of the last step, for whoever adds up many steps and reads them at once."""
        return self._timer

    def ready(self) -> dict[str, float]:
        """The numbers that are on the host already: reading them computes nothing and waits for nothing."""
        return {name: float(value) for name, value in self._values.items() if isinstance(value, (int, float))}

    def _milliseconds(self) -> dict[str, float]:
        spans = self._timer.milliseconds() if self._timer else {}
        return {f"ms/{phase}": value for phase, value in spans.items()}

    def __getitem__(self, name: str) -> float:
        if name in self._values:
            value = self._values[name]
            return float(value() if callable(value) else value)
        return self._milliseconds()[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        yield from self._milliseconds()

    def __len__(self) -> int:
        return len(self._values) + len(self._milliseconds())

    def __repr__(self) -> str:
        return f"Metrics({dict(self)!r})"
