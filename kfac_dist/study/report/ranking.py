"""Every method on one problem: the table, the winners and who beats whom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from kfac_dist.study.intervals import median_interval, ratio_interval, share_won
from kfac_dist.study.methods import method
from kfac_dist.study.readings import Lines, ended_well, seconds_to
from kfac_dist.study.report.budgets import CLOCKS, SECONDS, Budget, budgets, step_milliseconds
from kfac_dist.study.report.collect import Results, Seeds
from kfac_dist.study.report.words import NEVER, loss, loss_interval, milliseconds, seconds_interval, share, table
from kfac_dist.study.report.words import ratio_interval as ratio_words

FIRST_ORDER = ("sgd", "adam", "adamw")
Value = Callable[[Lines], float]


def median(runs: Seeds, value: Value) -> float:
    """Over the seeds."""
    return statistics.median(value(lines) for lines in runs.values())


def order(results: Results, budget: Budget | None = None) -> list[str]:
    """The methods that ran, the lowest median loss at the end of a budget (None: the last one) first."""
    end = budget or budgets(results.protocol)[-1]
    return sorted(results.ran, key=lambda name: median(results.ran[name].finals, end.loss))


def target(results: Results) -> tuple[float, str] | None:
    """The median loss of the best first-order method at the end of the seconds, and whose it is.

    Of an even number of seeds the upper of the two in the middle, which more than half of them reach.
    """
    last = budgets(results.protocol)[-1]
    names = [name for name in FIRST_ORDER if name in results.ran]
    if last.clock is None or not names:
        return None
    runs = {name: results.ran[name].finals.values() for name in names}
    value, name = min((statistics.median_high(map(last.loss, lines)), name) for name, lines in runs.items())
    return (value, name) if math.isfinite(value) else None


def time_to(results: Results) -> Value | None:
    """Seconds to the target, of one run."""
    aim = target(results)
    clock = CLOCKS[results.protocol.clock]
    return None if aim is None else lambda lines: seconds_to(lines, aim[0], clock)


def ranking(results: Results) -> list[str]:
    """The table of methods."""
    protocol, ends, reach = results.protocol, budgets(results.protocol), time_to(results)
    head = ["method", *(f"loss, {end.words}" for end in ends), *(f"held-out, {end.words}" for end in ends)]
    head += [f"{SECONDS[CLOCKS[protocol.clock]]} to the target"] if reach else []
    head += ["ms per step", "diverged", "trials that diverged"]
    rows = []
    for name in order(results):
        found = results.ran[name]
        runs = list(found.finals.values())
        so_far = f" ({len(runs)} seed{'s' * (len(runs) != 1)} so far)"
        cells = [method(name).title + ("" if len(runs) == len(protocol.seeds) else so_far)]
        cells += [loss_interval(median_interval([end.loss(lines) for lines in runs])) for end in ends]
        cells += [loss(median(found.finals, lambda lines, end=end: end.loss(lines, "val_loss"))) for end in ends]  # type: ignore[misc]
        cells += [seconds_interval(median_interval([reach(lines) for lines in runs]))] if reach else []
        cells += [milliseconds(median(found.finals, lambda lines: step_milliseconds(lines, protocol)))]
        cells += [f"{sum(not ended_well(lines) for lines in runs)} of {len(runs)}"]
        cells += [f"{sum(map(math.isinf, found.trials.values()))} of {len(found.trials)}"]
        rows.append(cells)
    return table(head, rows)


def measures(results: Results) -> list[tuple[str, Value, bool]]:
    """What methods compete in: (words, the value of a run, whether it is a time)."""
    found: list[tuple[str, Value, bool]] = [
        (f"loss, {end.words}", end.loss, False) for end in budgets(results.protocol)
    ]
    reach = time_to(results)
    return found + ([("time to the target", reach, True)] if reach else [])


def winners(results: Results, title: str = "") -> list[list[str]]:
    """One row per measure: the winner, the second, and whether the winner is ahead beyond the seeds' noise."""
    rows = []
    for words, value, is_time in measures(results):
        ranked = sorted((median(found.finals, value), name) for name, found in results.ran.items())
        names = [name for middle, name in ranked if math.isfinite(middle)][:2]
        titles = [*(method(name).title for name in names), *[NEVER] * (2 - len(names))]
        cells = [*([title] if title else []), words, *titles]
        if names:
            first = results.ran[names[0]].finals
            interval = median_interval([value(lines) for lines in first.values()])
            cells.append((seconds_interval if is_time else loss_interval)(interval))
        seconds = results.ran[names[1]].finals if len(names) > 1 else {}
        seeds = [seed for seed in seconds if seed in first]
        if seeds:
            values = [[value(runs[seed]) for seed in seeds] for runs in (first, seconds)]
            against = ratio_interval(*values)
            cells += [ratio_words(against), share(share_won(*values)), "yes" if against.verdict == "helps" else "no"]
        rows.append([*cells, *[NEVER] * (len(WINNERS) + bool(title) - len(cells))])
    return rows


WINNERS = ("measure", "winner", "second", "winner's median", "winner / second", "seeds won", "clearly ahead")


def pairs(results: Results, budget: Budget) -> list[str]:
    """Who beats whom: the share of the seeds that the row's method wins against the column's."""
    names = order(results, budget)
    head = [f"wins, {budget.words}", *(str(i + 1) for i in range(len(names)))]
    rows = []
    for i, name in enumerate(names):
        cells = []
        for other in names:
            mine, theirs = results.ran[name].finals, results.ran[other].finals
            seeds = [seed for seed in mine if seed in theirs]
            values = [[budget.loss(runs[seed]) for seed in seeds] for runs in (mine, theirs)]
            cells.append("" if name == other else f"{100 * share_won(*values):.0f}" if seeds else NEVER)
        rows.append([f"{i + 1} {method(name).title}", *cells])
    return table(head, rows)
