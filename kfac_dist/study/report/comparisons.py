"""Two methods against each other, seed by seed: what a coarse level changes, and whether one scalar does as well."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.study.intervals import Interval, median_interval, ratio_interval, share_won
from kfac_dist.study.methods import build_kfac, method
from kfac_dist.study.report.budgets import Budget, budgets, step_milliseconds
from kfac_dist.study.report.collect import Results, Seeds

OWN, SAME = "own", "same"
# The baseline that has one coefficient for the whole net where these spaces have one per layer.
SCALAR = {"layer_step": "scalar", "layer_step_momentum": "scalar_momentum"}
PAPER = ("nicolaides", "spectral", "krylov", "residual", "tselepidis")
"""Coarse spaces of the published two-level methods."""
FAMILIES = {"the papers' spaces": "paper", "ours": "ours"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method against another at the end of one budget.

    Attributes:
        name: the method.
        other: what it is compared with.
        settings: "own" (each at what its own trials chose) or "same" (the other runs at the method's settings).
        budget: where the losses are read.
        losses: median loss of either.
        ratio: of the losses, seed by seed.
        won: share of the seeds in which the method's loss is the lower one.
        cost: of a step, as a ratio, seed by seed.
    """

    name: str
    other: str
    settings: str
    budget: Budget
    losses: tuple[float, float]
    ratio: Interval
    won: float
    cost: Interval


def space_of(name: str) -> str | None:
    """The coarse space of a method."""
    return method(name).fixed.get("coarse_space")


def family(name: str) -> str | None:
    """Whose coarse space: "paper", "ours" or "scalar"; None for a method without a coarse level."""
    space = space_of(name)
    if space is None:
        return None
    return "paper" if space in PAPER else "scalar" if space in SCALAR.values() else "ours"


def compare(results: Results, name: str, other: str, settings: str, mine: Seeds, theirs: Seeds) -> list[Comparison]:
    """At the end of each budget, over the seeds that both have; none where they share no seed."""
    seeds = [seed for seed in mine if seed in theirs]
    if not seeds:
        return []
    steps = [[step_milliseconds(runs[s], results.protocol) for s in seeds] for runs in (mine, theirs)]
    found = []
    for budget in budgets(results.protocol):
        losses = [[budget.loss(runs[seed]) for seed in seeds] for runs in (mine, theirs)]
        middles = [median_interval(values).middle for values in losses]
        found.append(
            Comparison(
                name=name,
                other=other,
                settings=settings,
                budget=budget,
                losses=(middles[0], middles[1]),
                ratio=ratio_interval(*losses),
                won=share_won(*losses),
                cost=ratio_interval(*steps),
            )
        )
    return found


def against_one_level(results: Results, name: str) -> list[Comparison]:
    """A two-level method against its one-level form, each at its own settings and both at the method's."""
    form, mine = method(name).one_level, results.methods[name].finals
    if form is None or form not in results.methods:
        return []
    found = compare(results, name, form, OWN, mine, results.methods[form].finals)
    if not results.protocol.has_twin(name):  # nothing was chosen that the one-level form could take over, say
        return found
    return found + compare(results, name, form, SAME, mine, results.methods[name].twins)


def against_scalar(results: Results, name: str) -> list[Comparison]:
    """A method with a coefficient per layer against its form with one for the whole net, where the study has it.

    Only where nothing else differs: the fine level, and what the trials searched.
    """
    scalar = SCALAR.get(space_of(name) or "", "")
    if scalar not in results.methods or not _differ_in_space_only(name, scalar):
        return []
    return compare(results, name, scalar, OWN, results.methods[name].finals, results.methods[scalar].finals)


def _differ_in_space_only(name: str, other: str) -> bool:
    one, two = method(name), method(other)
    fixed = [{**each.fixed, "coarse_space": None, "coarse_correction": None} for each in (one, two)]
    return fixed[0] == fixed[1] and one.space == two.space


def best_one_level(results: Results) -> str | None:
    """The one-level K-FAC method that the trials ranked best; None where none has final runs."""
    names = [name for name in results.ran if method(name).build is build_kfac and space_of(name) is None]
    return min(names, key=lambda name: min(results.ran[name].trials.values()), default=None)


def against_best(results: Results, name: str) -> list[Comparison]:
    """A two-level method against the best of the one-level methods, where that is not its own form.

    A better damping, or the input side alone, may give what the coarse level seems to.
    """
    best = best_one_level(results)
    if best is None or best == method(name).one_level:
        return []
    return compare(results, name, best, OWN, results.methods[name].finals, results.methods[best].finals)


def headline(results: Results, kind: str | None = None) -> str | None:
    """The two-level method that the TRIALS ranked best, so that the seeds that are compared do not choose it.

    Only methods that were tuned as their one-level form was: one for which nothing is searched may differ from it in
    more than the coarse level (both dampings adaptive), and has no run of that form at its own settings to tell.

    Args:
        results: of one problem.
        kind: "paper" or "ours"; None: either.

    Returns:
        None where no such method has final runs.
    """
    kinds = ("paper", "ours") if kind is None else (kind,)
    tuned = [name for name in results.ran if family(name) in kinds and method(name).space]
    names = [name for name in tuned if method(name).one_level in results.ran]
    return min(names, key=lambda name: min(results.ran[name].trials.values()), default=None)
