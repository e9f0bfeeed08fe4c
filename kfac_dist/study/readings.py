"""Numbers read off the lines of runs: losses at equal epochs and at equal seconds, and the time to a loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from kfac_dist.study.run import Line

Lines = Sequence[Line]
Runs = Sequence[Lines]
"""The lines of one method's runs, one per seed."""


def number(value: float) -> float:
    """Infinity for what is no number: a diverged loss is the worst there is."""
    return value if math.isfinite(value) else math.inf


def evaluated(lines: Lines) -> list[Line]:
    """The lines with losses over the training and the held-out samples."""
    return [line for line in lines if "loss" in line]


def ended_well(lines: Lines) -> bool:
    """Whether the run neither diverged nor failed."""
    return lines[-1].get("end") == "done"


def training_loss(lines: Lines) -> float:
    """The last training loss; infinite where the run diverged or failed."""
    return number(evaluated(lines)[-1]["loss"]) if ended_well(lines) else math.inf


def after_epochs(lines: Lines, epochs: float, key: str = "loss") -> float:
    """The loss at the end of an epoch; infinite where the run did not come so far."""
    found = (line[key] for line in evaluated(lines) if abs(line["epoch"] - epochs) < 1e-9)
    return number(next(found, math.inf))


def after_seconds(lines: Lines, seconds: float, key: str = "loss", clock: str = "seconds") -> float:
    """The loss after seconds of training, between two evaluations on the line between them.

    Args:
        lines: of one run.
        seconds: of training.
        key: "loss" or "val_loss".
        clock: whose seconds: "seconds" (the wall's) or "cpu_seconds".
    """
    for before, after in pairwise(evaluated(lines)):
        if before[clock] <= seconds <= after[clock]:
            low, high = number(before[key]), number(after[key])
            if before[clock] == after[clock] or math.inf in (low, high):
                return high
            return low + (high - low) * (seconds - before[clock]) / (after[clock] - before[clock])
    return math.inf


def seconds_to(lines: Lines, loss: float, clock: str = "seconds") -> float:
    """When the training loss first is ``loss`` or less, between two evaluations on the line between them."""
    for before, after in pairwise(evaluated(lines)):
        if after["loss"] <= loss < before["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before[clock] + share * (after[clock] - before[clock])
    return math.inf


def median(runs: Runs, value: Callable[..., float], *arguments: Any, **keywords: Any) -> float:
    """Of a value over the seeds."""
    return statistics.median(value(lines, *arguments, **keywords) for lines in runs)
