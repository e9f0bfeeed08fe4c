"""The report's text: Markdown with its pictures in files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kfac_dist.study.methods import method
from kfac_dist.study.report.budgets import budgets
from kfac_dist.study.report.collect import Results
from kfac_dist.study.report.conditions import PROTOCOL, failed_words, machines, problem_words, settings_table
from kfac_dist.study.report.drawing import save
from kfac_dist.study.report.measures import measures_table
from kfac_dist.study.report.pictures import pictures
from kfac_dist.study.report.ranking import WINNERS, pairs, ranking, target, winners
from kfac_dist.study.report.side import WORDS as SIDE_WORDS
from kfac_dist.study.report.side import side_table
from kfac_dist.study.report.study import Study
from kfac_dist.study.report.verdicts import RULE, comparisons, overall, paragraph, summary
from kfac_dist.study.report.words import loss, table

PICTURES = "pictures"


def page(study: Study, found: Mapping[str, Results], folder: Path) -> str:
    """The whole report; its pictures are written below ``folder``."""
    missing = sum(results.missing for results in found.values())
    lines = [f"# {study.title}", "", *([study.profile, ""] if study.profile else [])]
    if missing:
        lines += [f"**Incomplete: {missing} runs have not finished; what follows is what is there so far.**", ""]
    lines += ["## Verdict", "", summary(found), *overall(found), RULE, "", "## Winners"]
    rows = [row for results in found.values() if results.ran for row in winners(results, results.entry.title)]
    lines += table(("problem", *WINNERS), rows, names=4) if rows else ["", "No run has finished yet.", ""]
    lines += [
        "Winner and second are picked by the very medians that are shown, so that the distance between them is "
        '"clearly ahead" (the interval of the ratio, seed by seed, is below 1) a little too often.',
        "",
    ]
    for name, results in found.items():
        lines += problem(name, results, folder)
    lines += ["## How it was made", "", f"`{study.command}`", "", PROTOCOL, "", *machines(found), ""]
    lines += [f"- {method(name).title} is left out: it {reason}" for name, reason in study.left_out.items()]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def problem(name: str, results: Results, folder: Path) -> list[str]:
    """One problem's chapter."""
    lines = [f"## {results.entry.title}", "", problem_words(results), ""]
    if results.missing:
        lines += [f"Incomplete: {results.missing} runs of this problem have not finished.", ""]
    waiting = [method(each).title for each in results.methods if each not in results.ran]
    lines += [f"Without a finished run so far: {'; '.join(waiting)}.", ""] if waiting else []
    lines += failed_words(results)
    if results.ran:
        drawn = {}
        for kind, words, figure in pictures(results):
            path = save(figure, folder / PICTURES / f"{name}_{kind}.png")
            drawn[kind] = f"![{words}]({PICTURES}/{path.name})"
        lines += ["### Verdict", "", paragraph(results), ""]
        lines += ["### Losses", "", *(drawn.pop(kind) for kind in ("epochs", "seconds") if kind in drawn), ""]
        lines += [*ranking(results), *target_words(results)]
        lines += [drawn.pop("time_to_target"), ""] if "time_to_target" in drawn else []
        against = comparisons(results)
        lines += ["### Two levels against one", *against] if against else []
        lines += [
            "### Who beats whom",
            "",
            "Share of the seeds, in per cent, that the method of the row wins; ties are halves.",
        ]
        for budget in budgets(results.protocol):
            lines += pairs(results, budget)
        measured = measures_table(results)
        lines += ["### Directions and the coarse level", *measured] if measured else []
        lines += [*drawn.values(), ""] if drawn else []
    side = side_table(results)
    if side:
        lines += ["### Every space and correction at fixed settings", "", SIDE_WORDS, *side]
    chosen = settings_table(results)
    return lines + (["### Settings that the trials chose", *chosen] if chosen else [])


def target_words(results: Results) -> list[str]:
    """What the target is."""
    aim = target(results)
    if aim is None:
        return []
    return [
        f"The target is {loss(aim[0])}: the median of {method(aim[1]).title}, the best first-order method, after "
        f"{budgets(results.protocol)[-1].words}. Methods that take longer for their epochs run on and may reach it "
        "later; for the others a dash says nothing about what comes after.",
        "",
    ]
