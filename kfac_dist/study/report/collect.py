"""A study as its runs' files tell it: what is there so far, and what is still missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfac_dist.study.methods import method
from kfac_dist.study.protocol import Protocol
from kfac_dist.study.readings import Lines, training_loss
from kfac_dist.study.report.study import Study
from kfac_dist.study.run import Run
from kfac_dist.study.runner import finished_lines
from kfac_dist.study.suite import PROBLEMS, Entry

Seeds = Mapping[int, Lines]
"""Seed -> the lines of its run."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One method on one problem.

    Attributes:
        trials: the finished trials' losses by number; infinite where one diverged.
        settings: what the trials chose; None: trials are missing.
        finals: the finished runs with these settings.
        twins: those of the one-level form at this method's settings.
        failed: the runs that ended with an error, trials included, each with its error.
    """

    trials: Mapping[int, float]
    settings: Mapping[str, Any] | None
    finals: Seeds
    twins: Seeds
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Results:
    """One problem.

    Attributes:
        entry: the problem.
        protocol: what every method got.
        methods: all methods of the study by name, those without any run included.
        side: the runs of the side table, each with its lines; none where it has not finished.
        missing: runs that have not finished.
    """

    entry: Entry
    protocol: Protocol
    methods: Mapping[str, Found]
    side: tuple[tuple[Run, Lines], ...]
    missing: int

    @property
    def ran(self) -> dict[str, Found]:
        """The methods with at least one run."""
        return {name: found for name, found in self.methods.items() if found.finals}


def read(runs: Iterable[Run], folder: Path) -> list[Lines]:
    """The lines of each run; none for one that has not finished."""
    return [finished_lines(run, folder) for run in runs]


def by_seed(runs: Iterable[Run], folder: Path) -> dict[int, Lines]:
    """The finished runs."""
    runs = list(runs)
    return {run.seed: lines for run, lines in zip(runs, read(runs, folder), strict=True) if lines}


def failures(runs: Mapping[str, Lines]) -> tuple[str, ...]:
    """Those that ended with an error, in words, each with its error."""
    return tuple(
        f"{words}: {lines[-1].get('error', 'it does not say why')}"
        for words, lines in runs.items()
        if lines and lines[-1]["end"] == "failed"
    )


def collect_problem(protocol: Protocol, names: Sequence[str], side: Sequence[Run], folder: Path) -> Results:
    """One problem's part."""
    chosen = {name: protocol.chosen(name, folder) for name in names}
    known = {name: settings for name, settings in chosen.items() if settings is not None}
    methods, missing = {}, 0
    for name in names:
        trials = read(protocol.tuning(name), folder)
        losses = {i: training_loss(lines) for i, lines in enumerate(trials) if lines}
        finals = by_seed(protocol.finals(name, known[name]), folder) if name in known else {}
        form = method(name).one_level
        paired = protocol.has_twin(name)
        twins = by_seed(protocol.twin(name, known), folder) if paired and name in known and form in known else {}
        missing += len(trials) - len(losses) + len(protocol.seeds) - len(finals)
        missing += len(protocol.seeds) - len(twins) if form in names and paired else 0
        runs = {f"trial {i}": each for i, each in enumerate(trials)}
        runs |= {f"seed {seed}": each for seed, each in finals.items()}
        runs |= {f"one level at its settings, seed {seed}": each for seed, each in twins.items()}
        methods[name] = Found(trials=losses, settings=chosen[name], finals=finals, twins=twins, failed=failures(runs))
    lines = read(side, folder)
    return Results(
        entry=PROBLEMS[protocol.problem],
        protocol=protocol,
        methods=methods,
        side=tuple(zip(side, lines, strict=True)),
        missing=missing + sum(not each for each in lines),
    )


def collect(study: Study, folder: Path) -> dict[str, Results]:
    """Problem -> what was found, from the files in ``folder``."""
    return {
        problem: collect_problem(protocol, study.methods.get(problem, ()), study.side.get(problem, ()), folder)
        for problem, protocol in study.protocols.items()
    }
