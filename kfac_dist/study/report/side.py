"""The side table: every coarse space and correction at fixed settings, one seed."""

from __future__ import annotations

from kfac_dist.study.intervals import ratio
from kfac_dist.study.methods import method
from kfac_dist.study.readings import Lines
from kfac_dist.study.report.budgets import Budget, step_milliseconds
from kfac_dist.study.report.collect import Results
from kfac_dist.study.report.comparisons import family
from kfac_dist.study.report.measures import middle
from kfac_dist.study.report.words import NEVER, loss, milliseconds, table
from kfac_dist.study.run import Run

WORDS = (
    "One run each, of one seed: an indication. Spaces that correct a direction run at the settings that the trials "
    "chose for one-level K-FAC, those that choose the step at those chosen for layer_step_momentum; at the defaults "
    "where the study has no such trials. Ratios are to one-level K-FAC in the same list. Coarse gain and share: "
    "medians over the run of what the coarse level takes off the squared error, in units of the one-level direction's "
    "squared norm, and of its share of a step's time."
)
FAMILY = {"paper": "the papers'", "ours": "ours", "scalar": "scalar", None: "-"}


def side_table(results: Results) -> list[str]:
    """The lowest loss first; ratios are to the one-level run of the same list. Nothing where no run has finished."""
    done = [(run, lines) for run, lines in results.side if lines]
    if not done:
        return []
    bases = {run.method: (run, lines) for run, lines in done if family(run.method) is None}
    rows = []
    for run, lines in done:
        form = method(run.method).one_level or ""
        rows.append((_loss(run, lines), cells(results, run, lines, bases.get(form, (run, [])))))
    head = ["space:correction", "whose", f"loss, {done[0][0].epochs} epochs", "over one level", "ms per step"]
    head += ["step over one level's", "coarse gain", "coarse share", "end"]
    return table(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])], names=2)


def _loss(run: Run, lines: Lines) -> float:
    return Budget(run.epochs).loss(lines)


def cells(results: Results, run: Run, lines: Lines, base: tuple[Run, Lines]) -> list[str]:
    """One row."""
    words = [run.method if ":" in run.method else method(run.method).title, FAMILY[family(run.method)]]
    step = step_milliseconds(lines, results.protocol)
    value = _loss(run, lines)
    coarse = [middle({run.seed: lines}, "coarse", key) for key in ("decrease_ratio", "share")]
    against = costs = NEVER
    if base[1] and base[0] is not run:
        other = _loss(*base)
        against = f"{ratio(value, other):.3g}".replace("inf", "∞")
        costs = f"{ratio(step, step_milliseconds(base[1], results.protocol)):.3g}"
    return [*words, loss(value), against, milliseconds(step), costs, *coarse, lines[-1]["end"]]
