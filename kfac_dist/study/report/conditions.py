"""How a study was made: its protocol in words, the machine and the versions, and the settings that were chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping

from kfac_dist import __version__
from kfac_dist.machine import machine
from kfac_dist.study.intervals import LEVEL, RESAMPLES
from kfac_dist.study.methods import method
from kfac_dist.study.protocol import TUNING_SEED
from kfac_dist.study.readings import Lines
from kfac_dist.study.report.budgets import budgets
from kfac_dist.study.report.collect import Results
from kfac_dist.study.report.words import enumerated, table

QUIET = 0.95
"""Least share of a core that a timed run has to get."""

PROTOCOL = (
    f"Every method gets the same number of trials from its search space, its documented default first and then "
    f"quasi-random points, all of seed {TUNING_SEED}; the settings with the lowest training loss are chosen. They then "
    "run with fresh seeds until both budgets, epochs and seconds, are used up. Runs of one seed begin with the same "
    "weights and see the same batches, whatever the method. Seconds are those of the training steps, evaluations left "
    "out. Each two-level method's one-level form runs once more at that method's settings; where that one chooses its "
    "step, the learning rate and the clip are the one-level form's own. Losses are means over all training "
    "samples; held-out losses are medians over the seeds. Square brackets: the median's interval by percentile "
    f"bootstrap over the seeds ({LEVEL:.0%}, {RESAMPLES:,} resamples); with five seeds it is their whole range, which "
    "holds the median in 94 of 100 cases. Each interval stands by itself: none is corrected for the number of "
    'comparisons. A run that diverged or failed counts as the worst of all: its loss is infinite ("∞"). A dash: not '
    "reached, or nothing to compare with."
)


def all_lines(found: Mapping[str, Results]) -> Iterator[Lines]:
    """Of every finished run."""
    for results in found.values():
        for method_found in results.methods.values():
            yield from method_found.finals.values()
            yield from method_found.twins.values()
        yield from (lines for _, lines in results.side if lines)


def machines(found: Mapping[str, Results]) -> list[str]:
    """On what the runs ran, as they say themselves, and on what the report was written."""
    said = sorted(
        {(lines[0].get("machine", ""), lines[0]["torch"], lines[0].get("version", "")) for lines in all_lines(found)}
    )
    ran = [
        f"- Runs: {where or 'on a machine that they do not name, torch ' + torch}"
        + (f", kfac-dist {version}" if version else "")
        for where, torch, version in said
    ]
    return [*ran, f"- Report: {machine()}, kfac-dist {__version__}"]


def quiet_words(runs: Iterable[Lines], clock: str) -> str:
    """Whether the timed runs had their core to themselves, and what it means for the seconds of the clock."""
    shares = sorted(lines[-1]["cpu_seconds"] / max(1e-9, lines[-1]["seconds"]) for lines in runs)
    least, middle = (shares[0], statistics.median(shares)) if shares else (math.nan, math.nan)
    said = f"Share of a core that the timed runs got: least {least:.2f}, median {middle:.2f}. "
    if shares and least >= QUIET:
        return said + "The machine was quiet."
    if clock == "cpu":
        return said + (
            "**The machine was not quiet.** CPU seconds leave out what others took, but not what sharing its caches "
            "and memory costs: take them as rough."
        )
    return said + "**The machine was not quiet: take the seconds as rough.**"


def problem_words(results: Results) -> str:
    """One problem's share of the protocol."""
    protocol, entry = results.protocol, results.entry
    lines = next((runs for found in results.ran.values() for runs in found.finals.values()), None)
    size = ""
    if lines is not None and len(lines[1].get("samples", ())) > 1:
        train, held_out = lines[1]["samples"]
        size = f" Batch {lines[1]['batch_size']}, {train:,} samples for training and {held_out:,} held out."
    runs = [lines for found in results.ran.values() for lines in found.finals.values()]
    timed = runs and protocol.seconds and protocol.device == "cpu"  # a step on a GPU may well leave the CPU idle
    quiet = f" {quiet_words(runs, protocol.clock)}" if timed else ""
    where = f"{protocol.threads} thread{'s' * (protocol.threads != 1)}, device {protocol.device}"
    ends = enumerated([end.words for end in budgets(protocol)])
    note = f"{entry.note} " if entry.note else ""
    return (
        f"{note}Measured: {entry.unit}.{size} {protocol.trials} trials of {protocol.tuning_epochs} epochs each, then "
        f"{len(protocol.seeds)} seeds until {ends} are over; {where}.{quiet}"
    )


def failed_words(results: Results) -> list[str]:
    """The errors of the runs that failed: not every one is the method's fault."""
    errors = [f"- {method(name).title}, {each}" for name, found in results.methods.items() for each in found.failed]
    return ["Runs that ended with an error, and count as diverged:", "", *errors, ""] if errors else []


def settings_table(results: Results) -> list[str]:
    """What the trials chose."""
    rows = []
    for name, found in results.methods.items():
        if found.settings is not None:
            chosen = ", ".join(f"{key} {value:g}" for key, value in found.settings.items())
            fixed = ", ".join(f"{key} {value}" for key, value in method(name).fixed.items())
            rows.append([method(name).title, chosen, fixed])
    return table(("method", "searched", "fixed"), rows, names=3) if rows else []
