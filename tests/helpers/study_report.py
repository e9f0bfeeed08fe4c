"""A study of runs that never ran, and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kfac_dist.study.protocol import Protocol
from kfac_dist.study.report import Study
from kfac_dist.study.report.collect import Results, collect
from tests.helpers.study_lines import made, store, store_method

TWO, ONE, SCALAR = "layer_step_momentum", "kfac", "scalar_momentum"
PROTOCOL = Protocol(problem="tiny", trials=2, tuning_epochs=10, epochs=10, seconds=60.0)

Rates = Mapping[str, Sequence[float] | float]


def study(*methods: str, protocol: Protocol = PROTOCOL, **changes) -> Study:
    settings = {"name": "made", "title": "A study", "command": "kfac-dist study made"} | changes
    return Study(protocols={"tiny": protocol}, methods={"tiny": methods}, **settings)


def told(folder: Path, rates: Rates, twins: Rates | None = None, protocol: Protocol = PROTOCOL, **changes) -> Study:
    """A study whose runs' losses fall at these rates, one per seed or the same for all.

    Args:
        folder: of the runs' files.
        rates: of every method's final runs; their trials are like the first.
        twins: two-level method -> of its one-level form at its settings.
        protocol: of the study.
        **changes: see :class:`Study`.
    """
    for name, rate in rates.items():
        store_method(protocol, name, [made(each) for each in per_seed(rate, protocol)], folder)
    chosen = {name: protocol.chosen(name, folder) or {} for name in rates}
    for name, rate in (twins or {}).items():
        for run, each in zip(protocol.twin(name, chosen), per_seed(rate, protocol), strict=False):
            store(run, made(each), folder)
    return study(*rates, protocol=protocol, **changes)


def per_seed(rate: Sequence[float] | float, protocol: Protocol) -> Sequence[float]:
    return [rate] * len(protocol.seeds) if isinstance(rate, float) else rate


def collected(folder: Path, *methods: str, **changes) -> Results:
    """The only problem of a study whose runs are in the folder already."""
    return collect(study(*methods, **changes), folder)["tiny"]


def results(folder: Path, rates: Rates, twins: Rates | None = None, **changes) -> Results:
    """The only problem of such a study."""
    return collect(told(folder, rates, twins, **changes), folder)["tiny"]


def cells(lines: Sequence[str], first: str) -> list[str]:
    """The cells of the only row of a Markdown table that begins with this one."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    (row,) = [row for row in rows if row[0] == first]
    return row
