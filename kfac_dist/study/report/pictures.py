"""The pictures of one problem: loss curves, time to the target, errors, coarse gain and interactions of the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from kfac_dist.study.intervals import median_interval, medians_interval
from kfac_dist.study.methods import method
from kfac_dist.study.readings import evaluated, number
from kfac_dist.study.report.budgets import CLOCKS, WORDS, Budget, budgets
from kfac_dist.study.report.collect import Results
from kfac_dist.study.report.comparisons import headline
from kfac_dist.study.report.drawing import WIDTH, label, legend_below, logarithmic, panel, styles
from kfac_dist.study.report.measures import Series, interactions, series
from kfac_dist.study.report.ranking import order, target, time_to
from kfac_dist.study.report.words import loss

GRID = 24
"""Points of a curve against seconds."""
BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
ROW = 0.19
"""Inches of a legend's row."""


def legend_height(names: Iterable[str]) -> float:
    """Inches below a panel."""
    lines = sorted((label(name).count("\n") + 1 for name in names), reverse=True)
    return ROW * math.ceil(sum(lines[: math.ceil(len(lines) / 2)]))


def curves(results: Results, budget: Budget) -> Figure:
    """Median training loss up to a budget's end, and its interval as a band; the best at the end comes first."""
    names = order(results, budget)
    figure, axes = panel(
        4.2 + legend_height(names), f"training loss against {'epochs' if budget.clock is None else 'seconds'}"
    )
    looks, best = styles(names), headline(results)
    count = int(budget.amount) if budget.clock is None else GRID
    grid = [budget.amount * i / count for i in range(count + 1)]
    start = 0.0
    for name in names:
        runs = list(results.ran[name].finals.values())
        start = max(start, *(number(evaluated(lines)[0]["loss"]) for lines in runs))
        middle, low, high = medians_interval(
            np.array([[Budget(x, budget.clock).reading(lines) for x in grid] for lines in runs])
        )
        shown = np.isfinite(middle)
        places = np.array(grid)[shown]
        look = looks[name] | {"linewidth": 2.8 if name == best else looks[name]["linewidth"]}
        axes.plot(places, middle[shown], label=label(name), markevery=max(1, count // 8), **look)
        top = np.where(np.isfinite(high), high, 2 * start)
        axes.fill_between(places, low[shown], top[shown], color=look["color"], alpha=0.13, linewidth=0)
    axes.set_xlabel(budget.words.split()[-1] if budget.clock is None else f"{WORDS[budget.clock]} of training")
    axes.set_ylabel(results.entry.unit, fontsize=9)
    axes.set_xlim(0, budget.amount)
    logarithmic(axes, 2 * start)  # what diverges leaves the picture
    legend_below(figure, axes)
    return figure


def times(results: Results) -> Figure | None:
    """Bars: the time to the target; None where there is no target."""
    aim, reach = target(results), time_to(results)
    if aim is None or reach is None:
        return None
    found = {name: median_interval([reach(run) for run in each.finals.values()]) for name, each in results.ran.items()}
    names = sorted(found, key=lambda name: found[name].middle, reverse=True)
    clock = WORDS[CLOCKS[results.protocol.clock]]
    figure, axes = panel(
        1.3 + 0.3 * len(names), f"{clock} to {loss(aim[0])}, the median of {method(aim[1]).title} at the end"
    )
    # A slow method goes on beyond the seconds until its epochs are over, and may get there then.
    finite = [value for each in found.values() for value in (each.middle, each.high) if math.isfinite(value)]
    end, looks = max([results.protocol.seconds, *finite]), styles(names)
    for place, name in enumerate(names):
        interval = found[name]
        if math.isinf(interval.middle):
            axes.text(0.01 * end, place, "not reached", va="center", fontsize=8, color="0.35")
            continue
        solid = method(name).ours
        axes.barh(
            place,
            interval.middle,
            0.62,
            color=looks[name]["color"] if solid else "white",
            edgecolor=looks[name]["color"],
            linewidth=1.4,
            hatch=None if solid else "////",
        )
        high = min(interval.high, 1.1 * end)
        axes.plot([interval.low, high], [place, place], color="black", linewidth=1.2, marker="|", markersize=7)
        axes.text(0.01 * end, place, f"{interval.middle:.1f}", va="center", fontsize=8, bbox=BOX)
    axes.set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
    axes.set_xlim(0, 1.1 * end)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"{clock} of training")
    axes.grid(visible=False, axis="y")
    return figure


def over_training(results: Results, group: str, key: str, title: str, unit: str) -> Figure | None:
    """One value of every method that has it, against epochs; None where none has."""
    found: Mapping[str, Series] = {name: series(each.finals, group, key) for name, each in results.ran.items()}
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None
    figure, axes = panel(3.6 + legend_height(found), title)
    looks = styles(found)
    for name, points in found.items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=label(name), markevery=max(1, len(x) // 8), **looks[name])
    axes.set_xlabel("epochs")
    axes.set_ylabel(unit)
    if all(value > 0 for points in found.values() for _, value in points):
        logarithmic(axes)
    legend_below(figure, axes)
    return figure


def heat_map(layers: Sequence[str], matrix: np.ndarray, title: str) -> Figure:
    """How strongly the layers' coarse vectors interact."""
    side = min(max(4.6, 0.3 * len(layers) + 2.4), WIDTH)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
    for place in range(len(set(layers)), len(layers), len(set(layers))):  # the next vector of every layer
        axes.axhline(place - 0.5, color="0.2", linewidth=1.0)
        axes.axvline(place - 0.5, color="0.2", linewidth=1.0)
    every = -(-len(layers) // 40)
    places = list(range(len(layers)))[::every]
    axes.set_xticks(places, layers[::every], rotation=90, fontsize=8)
    axes.set_yticks(places, layers[::every], fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label=r"$E_{ij}\,/\,\sqrt{E_{ii}E_{jj}}$")
    return figure


OVER_TRAINING: tuple[tuple[str, str, str, str, str], ...] = (
    ("error", "measures", "error", "error of the step's direction", "‖d - d*‖ / ‖d*‖"),
    ("error_free", "measures", "error_free", "step-size-free error", "least ‖a d - d*‖ / ‖d*‖"),
    ("coarse_gain", "coarse", "decrease_ratio", "what the coarse level takes off the squared error", "share of ‖ζ‖²"),
)


def pictures(results: Results) -> Iterator[tuple[str, str, Figure]]:
    """(name, what a reader who cannot see it should know, picture), those for which there is something to draw."""
    if not results.ran:
        return
    for budget in budgets(results.protocol):
        kind = "epochs" if budget.clock is None else "seconds"
        yield (
            kind,
            f"Loss against {kind}; lowest after {budget.words}: {method(order(results, budget)[0]).title}",
            curves(results, budget),
        )
    bars = times(results)
    if bars is not None:
        yield "time_to_target", "Time to the best first-order method's loss", bars
    for name, group, key, title, unit in OVER_TRAINING:
        figure = over_training(results, group, key, title, unit)
        if figure is not None:
            yield name, f"{title.capitalize()} over training", figure
    best = headline(results)
    for name in [*([best] if best else []), *results.ran]:
        found = interactions(results.ran[name].finals)
        if found:
            yield (
                "interactions",
                "Heat map of the layers' interactions",
                heat_map(*found, f"{method(name).title}, last solve"),
            )
            return
