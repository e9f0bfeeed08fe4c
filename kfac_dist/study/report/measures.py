"""What the runs hold beyond their losses: errors of directions, the coarse level's gain and cost, the interactions.

Their lines: ``measures`` (errors of a step against the dense natural gradient), ``coarse`` (what the coarse level says
of itself) and ``interactions`` with ``layers``. Methods and problems without them are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kfac_dist.study.methods import method
from kfac_dist.study.readings import Lines
from kfac_dist.study.report.collect import Results, Seeds
from kfac_dist.study.report.words import NEVER, table

Series = list[tuple[float, float]]
"""(epoch, median over the seeds)."""


def reading(group: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Reads ``line[group][key]``; None where it is not there or no number."""

    def read(line: Mapping[str, Any]) -> float | None:
        value = line.get(group, {}).get(key)
        return value if value is not None and math.isfinite(value) else None

    return read


def points(lines: Lines, read: Callable[[Mapping[str, Any]], float | None]) -> dict[int, tuple[float, float]]:
    """Step -> epoch and value, where there is one."""
    values = [(line["step"], line["epoch"], read(line)) for line in lines if "step" in line]
    return {step: (epoch, value) for step, epoch, value in values if value is not None}


def series(runs: Seeds, group: str, key: str) -> Series:
    """The median over the seeds at the steps at which all of them have the value."""
    each = [points(lines, reading(group, key)) for lines in runs.values()]
    steps = sorted(set.intersection(*(set(found) for found in each))) if each else []
    return [(each[0][s][0], statistics.median(found[s][1] for found in each)) for s in steps]


def middle(runs: Seeds, group: str, key: str) -> str:
    """The median over all steps and seeds, for a table."""
    values = [value for lines in runs.values() for _, value in points(lines, reading(group, key)).values()]
    return f"{statistics.median(values):.3g}" if values else NEVER


COLUMNS = (
    ("error", "measures", "error"),
    ("one level's", "measures", "error_one_level"),
    ("step-size-free", "measures", "error_free"),
    ("one level's", "measures", "error_free_one_level"),
    ("step-size-free, exact", "exact", "error_free"),
    ("one level's", "exact", "error_free_one_level"),
    ("decrease", "measures", "decrease"),
    ("coarse gain", "coarse", "decrease_ratio"),
    ("coarse share of the time", "coarse", "share"),
)
WORDS = (
    "Medians over all measured steps and seeds. Error: ‖d - d*‖ of the step's direction in the norm of the damped "
    "Fisher matrix, in units of ‖d*‖, d* being the dense natural gradient; beside it the one-level direction's at the "
    "same gradient; step-size-free: the least over all multiples of the direction. With the Fisher matrix of one draw "
    "per sample most of the gradient lies outside its range, where no direction comes near d*; exact: with the "
    "expectation over all targets, where the network has few enough outputs. Decrease: what the coarse level "
    "takes off the squared error, by the dense matrix. Coarse gain: the same as the coarse level computes it for its "
    "own Fisher samples and damping, in units of the one-level direction's squared norm. Share: of a step's time."
)


def measures_table(results: Results) -> list[str]:
    """The measures of every method that has some."""
    rows = [
        [method(name).title, *(middle(found.finals, group, key) for _, group, key in COLUMNS)]
        for name, found in results.ran.items()
    ]
    rows = [row for row in rows if set(row[1:]) != {NEVER}]
    return [*table(("method", *(words for words, _, _ in COLUMNS)), rows), WORDS, ""] if rows else []


def interactions(runs: Seeds) -> tuple[list[str], np.ndarray] | None:
    """The layers' names and E_ij / sqrt(E_ii E_jj) of the first run that has them."""
    for lines in runs.values():
        for line in reversed(lines):
            if "interactions" in line:
                return list(line["layers"]), np.asarray(line["interactions"], dtype=float)
    return None
