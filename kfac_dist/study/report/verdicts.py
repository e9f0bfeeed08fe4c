"""What the coarse level did, in words: composed from the intervals, never written by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from kfac_dist.study.intervals import FEWEST_SEEDS, MARGIN
from kfac_dist.study.methods import method
from kfac_dist.study.report.budgets import budgets
from kfac_dist.study.report.collect import Results
from kfac_dist.study.report.comparisons import (
    FAMILIES,
    OWN,
    SAME,
    Comparison,
    against_best,
    against_one_level,
    against_scalar,
    family,
    headline,
)
from kfac_dist.study.report.words import change, enumerated, loss, ratio_interval, share, table

HEAD = (
    "method",
    "against",
    "settings",
    "after",
    "its loss",
    "the other's",
    "ratio",
    "seeds won",
    "verdict",
    "step cost",
)
SETTINGS = {OWN: "each its own", SAME: "the method's"}


def row(found: Comparison) -> list[str]:
    """One line of a table of comparisons."""
    cells = [method(found.name).title, method(found.other).title, SETTINGS[found.settings], found.budget.words]
    cells += [loss(value) for value in found.losses]
    cells += [ratio_interval(found.ratio), share(found.won), f"**{found.ratio.verdict}**", ratio_interval(found.cost)]
    return cells


def comparisons(results: Results) -> list[str]:
    """The table: two-level methods against their one-level forms, the scalar baseline and the best of one level."""
    found = [each for name in results.ran for each in against_one_level(results, name)]
    found += [each for name in results.ran for each in against_scalar(results, name)]
    name = headline(results)
    found += against_best(results, name) if name else []
    return table(HEAD, [row(each) for each in found], names=4) if found else []


def by_how_much(found: Comparison) -> str:
    """The change and its interval: "4.0 % lower, between 9.0 % lower and 1.1 % higher, lower in 80 % of 5 seeds"."""
    low, high = change(found.ratio.low), change(found.ratio.high)
    between = f", between {low} and {high}" if low != high else ""
    seeds = f"lower in {share(found.won)} of {found.ratio.count} seed{'s' * (found.ratio.count != 1)}"
    both = found.ratio.middle == 1 and all(map(math.isinf, found.losses))
    return f"{'infinite, as both diverged' if both else change(found.ratio.middle)}{between}, {seeds}"


def sentence(found: Comparison) -> str:
    """One comparison in words."""
    few = ", too few seeds for a verdict" if found.ratio.count < FEWEST_SEEDS else ""
    return f"after {found.budget.words} **{found.ratio.verdict}**{few} (loss {by_how_much(found)})"


def paragraph(results: Results) -> str:
    """The verdict on one problem."""
    name = headline(results)
    if name is None:
        return "No two-level method and its one-level form have runs here: no verdict."
    found = against_one_level(results, name)
    title, form = method(name).title, method(found[0].other).title if found else ""
    if not found:
        return f"{title} and its one-level form share no finished seed: no verdict."
    parts = [f"The trials rank {title} best of the two-level methods; without its coarse level it is {form}.", ""]
    for settings, words in (
        (OWN, "Each at its own settings"),
        (SAME, f"{form} at the settings of the two-level method"),
    ):
        some = [sentence(each) for each in found if each.settings == settings]
        parts += [f"- {words}: {'; '.join(some)}."] if some else []
    parts.append(f"- A step of it costs {ratio_interval(found[0].cost)} times one of {form}.")
    parts += [f"- {words}" for words in (best_words(results, name), scalar_words(results, name)) if words]
    return "\n".join(parts)


def best_words(results: Results, name: str) -> str:
    """Whether another one-level method does as well."""
    found = against_best(results, name)
    if not found:
        return ""
    best = f"{method(found[0].other).title}, which the trials rank best of the one-level methods"
    return f"Against {best}: {'; '.join(sentence(each) for each in found)}."


def scalar_words(results: Results, name: str) -> str:
    """Whether one coefficient for the whole net does as well as one per layer."""
    found = against_scalar(results, name)
    if not found:
        return ""
    parts = []
    for each in found:
        word = each.ratio.verdict
        says = {
            "helps": "a coefficient per layer is better",
            "harms": "one for the whole net is better",
            "does not help": "one for the whole net does as well: the scalar baseline explains what is gained",
            "undecided": "it is undecided whether one for the whole net does as well",
        }[word]
        parts.append(f"after {each.budget.words} {says} (loss {by_how_much(each)})")
    return f"Against {method(found[0].other).title}, each at its own settings: {'; '.join(parts)}."


def cell(results: Results, kind: str, words: str) -> str:
    """The verdict of one family's headline method at one budget, each form at its own settings."""
    name = headline(results, kind)
    found = against_one_level(results, name) if name else []
    for each in found:
        if each.settings == OWN and each.budget.words == words:
            return f"**{each.ratio.verdict}**, {ratio_interval(each.ratio)} ({method(each.name).title})"
    kin = [each for each in results.methods if family(each) == kind]
    if any(method(each).space and method(each).one_level in results.methods for each in kin):
        return "not finished"
    if kin:
        return "none that was tuned beside its one-level form"
    tried = any(family(run.method) == kind for run, lines in results.side if lines)
    return "only in the side table" if tried else "did not run"


def overall(found: Mapping[str, Results]) -> list[str]:
    """All problems at a glance: whose coarse space, per epoch and per second."""
    rows = []
    for results in found.values():
        for words, kind in FAMILIES.items():
            ends = ends_of(results)
            rows.append(
                [results.entry.title, words, *(cell(results, kind, e) if e else "no such budget" for e in ends)]
            )
    return table(("problem", "coarse spaces", "per epoch", "per second"), rows, names=4)


def ends_of(results: Results) -> tuple[str | None, str | None]:
    """The words of the budget in epochs and of the one in seconds."""
    ends = {end.clock is None: end.words for end in budgets(results.protocol)}
    return ends.get(True), ends.get(False)


def summary(found: Mapping[str, Results]) -> str:
    """Over all problems: on how many the headline method helps, and on how many more than one scalar would."""
    against = counted(found, against_one_level)
    if not against:
        return "No two-level method has been compared with its one-level form yet."
    text = (
        "The two-level method that the trials rank best, against the same method without its coarse level, each at its "
        f"own tuned settings: {against}."
    )
    best = counted(found, against_best)
    if best:
        text += f" Where the trials rank another one-level K-FAC method best, against that one: {best}."
    scalar = counted(found, against_scalar)
    if not scalar:
        return text
    return (
        f"{text} Where it has a coefficient per layer, against its form with one for the whole net, which is a "
        f"rescaling and no coarse level: {scalar}."
    )


def counted(found: Mapping[str, Results], compared: Callable[[Results, str], list[Comparison]]) -> str:
    """How often each verdict falls on the headline methods, per epoch and per second; nothing where none falls."""
    parts = []
    for index, words in enumerate(("per epoch", "per second")):
        falls = []
        for results in found.values():
            name, end = headline(results), ends_of(results)[index]
            pairs = compared(results, name) if name else []
            falls += [each for each in pairs if each.settings == OWN and each.budget.words == end]
        verdicts = Counter(each.ratio.verdict for each in falls)
        if verdicts:
            counts = enumerated([f"{word} on {count}" for word, count in verdicts.items()])
            few = all(each.ratio.count < FEWEST_SEEDS for each in falls)
            nowhere = "too few seeds for a verdict" if few else "nowhere is it ahead beyond the noise of the seeds"
            plainly = "" if "helps" in verdicts else f" ({nowhere})"
            parts.append(f"{words}, of {len(falls)} problem{'s' * (len(falls) != 1)}: {counts}{plainly}")
    return "; ".join(parts)


RULE = (
    f'"helps": the whole interval of the ratio (two levels / one level) is below 1. "harms": it is above 1. "does not '
    f'help": it is above {1 - MARGIN:g}, so that any gain is below {MARGIN:.0%}. Otherwise, and with fewer than '
    f'{FEWEST_SEEDS} seeds, "undecided".'
)
