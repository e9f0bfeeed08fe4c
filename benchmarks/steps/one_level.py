"""One level against SGD, its floors and kfac-pytorch, on one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.page import table
from benchmarks.steps.floors import (
    DENSE,
    INPUT_ROWS,
    INPUT_SAMPLES,
    ROWS,
    SAMPLES,
    WITHOUT_MOMENTS,
    Floor,
    pieces,
)
from benchmarks.steps.peer import METHODS
from benchmarks.steps.problems import Problem, Sizes, autoencoder, resnet20
from benchmarks.steps.runs import ONE_LEVEL, OurRun, PeerRun, Run
from benchmarks.steps.timing import Spread, Times, measure, ratio

CYCLES = (100, 10)
HEAD = ("", "plain step, ms", "with new curvature, ms", "updates every", "over SGD (quartiles)", "target", "", "floor")


@dataclass(frozen=True)
class Cell:
    """A way to precondition, and what is wanted of it.

    Attributes:
        name: of the row.
        settings: of the preconditioner.
        targets: ratios to SGD with updates every 100 and every 10 steps; none: reported only.
        floor: the arithmetic it cannot do without.
        rivals: the methods of kfac-pytorch that it must not be slower than.
    """

    name: str
    settings: Mapping[str, Any]
    targets: tuple[float, ...] = ()
    floor: Floor | None = None
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Net:
    """A problem and its cells.

    Attributes:
        title: of the table.
        cells: the rows.
        peer: method of kfac-pytorch -> its ratios to SGD where no clone is given, as measured before on two cores.
    """

    title: str
    cells: tuple[Cell, ...]
    peer: Mapping[str, tuple[float | None, ...]]


DEFAULT = "one level"
SAMPLED = {"preconditioning": "samples"}
INPUT_SIDE = {"factor_sides": "input"}
WITHOUT_CLIP = {"kl_clip": None, "damping": 3.0}  # or its steps, which nothing bounds, end in infinite weights
AUTOENCODER = Net(
    "MNIST autoencoder, batch {batch}",
    (
        Cell(DEFAULT, {}, (2.6, 3.0), ROWS, METHODS),
        Cell('preconditioning="gradients"', {"preconditioning": "gradients"}, (2.6, 3.0), DENSE, METHODS),
        Cell('preconditioning="samples"', SAMPLED, (1.9, 2.1), SAMPLES, METHODS),
        Cell("the same, no clip", SAMPLED | WITHOUT_CLIP, (1.9, 2.1), SAMPLES, METHODS),
        Cell('factor_sides="input"', INPUT_SIDE, (1.4, 1.6), INPUT_ROWS, METHODS),
        Cell('"input", "samples"', INPUT_SIDE | SAMPLED, (1.4, 1.6), INPUT_SAMPLES, METHODS),
        Cell('"input", "samples", no clip', INPUT_SIDE | SAMPLED | WITHOUT_CLIP, (1.4, 1.6), INPUT_SAMPLES, METHODS),
        Cell('damping_method="eigen"', {"damping_method": "eigen"}, rivals=("eigen",)),
    ),
    {"inverse": (4.5, 9.3), "eigen": (4.5, 5.4)},
)
LARGE = Net(
    "MNIST autoencoder, batch {batch}",
    (
        Cell(DEFAULT, {}, (1.2, 1.25), DENSE, METHODS),
        Cell("factor_samples=0.25", {"factor_samples": 0.25}, (1.2, 1.25), rivals=METHODS),
    ),
    {"inverse": (None, None), "eigen": (None, None)},
)
RESNET = Net(
    "ResNet-20, {side} x {side}, batch {batch}",
    (
        Cell(DEFAULT, {}, (1.05, 1.15), WITHOUT_MOMENTS, METHODS),
        Cell("factor_samples=0.25", {"factor_samples": 0.25}, (1.05, 1.15), rivals=METHODS),
    ),
    {"inverse": (1.18, 1.64), "eigen": (1.18, 1.64)},
)


def verdict(found: float, target: float) -> str:
    """Whether a bound is kept, to the two digits that are shown."""
    return "kept" if round(found, 2) <= target else "missed"


def shown(spread: Spread) -> str:
    """Median and quartiles."""
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def run(net: Net, problem: Problem, rounds: int, peer: type[Any] | None) -> dict[str, Times]:
    """Everything about one net in turns."""
    timed: list[Run] = [Run("SGD", problem)]
    timed += [OurRun(cell.name, problem, {**ONE_LEVEL, **cell.settings}) for cell in net.cells]
    timed += [PeerRun(f"kfac-pytorch, {method}", problem, peer, method) for method in METHODS if peer]
    floors = [cell.floor for cell in net.cells if cell.floor]
    return measure([*timed, *pieces(problem, floors)], rounds)


def rows(net: Net, times: Mapping[str, Times]) -> list[list[str]]:
    """The table's rows: SGD, the cells, kfac-pytorch."""
    found = [["SGD", f"{times['SGD'].of_kind('plain'):.1f}", "", "", "1", "", "", ""]]
    for cell in net.cells:
        for number, every in enumerate(CYCLES):
            over = ratio(times[cell.name], times["SGD"], every)
            target = (
                [f"{cell.targets[number]:g}", verdict(over.median, cell.targets[number])] if cell.targets else ["", ""]
            )
            floor = f"{cell.floor.ratio(times, every).median:.2f}" if cell.floor else ""
            found.append([*timings(cell.name, times, every), shown(over), *target, floor])
    for name in (name for name in times if name.startswith("kfac-pytorch")):
        for every in CYCLES:
            found.append([*timings(name, times, every), shown(ratio(times[name], times["SGD"], every)), "", "", ""])
    return found


def timings(name: str, times: Mapping[str, Times], every: int) -> list[str]:
    """The first columns of a row."""
    return [name, f"{times[name].of_kind('plain'):.1f}", f"{times[name].of_kind('curvature'):.1f}", str(every)]


def against_peer(net: Net, times: Mapping[str, Times]) -> list[list[str]]:
    """Every cell over the faster one of its rivals; at most 1 is wanted."""
    found = []
    for cell in (cell for cell in net.cells if cell.rivals):
        for number, every in enumerate(CYCLES):
            own = times[cell.name]
            measured = {m: times[f"kfac-pytorch, {m}"] for m in cell.rivals if f"kfac-pytorch, {m}" in times}
            if measured:
                method = min(measured, key=lambda m: ratio(measured[m], times["SGD"], every).median)
                over = ratio(own, measured[method], every)
                found.append([cell.name, str(every), method, shown(over), verdict(over.median, 1.0)])
                continue
            known = {m: value for m in cell.rivals if (value := net.peer[m][number]) is not None}
            if known:
                method = min(known, key=lambda m: known[m])
                over = ratio(own, times["SGD"], every).median / known[method]
                found.append(
                    [cell.name, str(every), method, f"{over:.2f} (of {known[method]:g}, recorded)", verdict(over, 1.0)]
                )
            else:
                found.append([cell.name, str(every), "", "not measured", ""])
    return found


def parts(times: Mapping[str, Times], net: Net) -> list[list[str]]:
    """The pieces of the floors."""
    names = sorted({part for cell in net.cells if cell.floor for part in cell.floor.parts})
    return [[name, f"{times[name].of_kind('plain'):.1f}", shown(ratio(times[name], times["SGD"], 1))] for name in names]


def section(net: Net, problem: Problem, rounds: int, peer: type[Any] | None) -> str:
    """Run one net, and write its three tables."""
    times = run(net, problem, rounds, peer)
    title = net.title.format(batch=len(problem.x), side=problem.x.shape[-1])
    return "\n".join(
        [
            f"### {title}\n",
            table(HEAD, rows(net, times)),
            "Never slower than the faster method of kfac-pytorch (for eigen damping: than its eigen method):\n",
            table(("", "updates every", "against", "our time over its (quartiles)", ""), against_peer(net, times)),
            "What the floors are made of:\n",
            table(("part", "ms", "over SGD (quartiles)"), parts(times, net)),
        ]
    )


def sections(sizes: Sizes, rounds: int, peer: type[Any] | None) -> str:
    """All nets."""
    few = max(1, rounds * 2 // 3)  # their steps take ten times as long
    return "\n".join(
        [
            section(AUTOENCODER, autoencoder(sizes, sizes.batch), rounds, peer),
            section(LARGE, autoencoder(sizes, sizes.large), few, peer),
            section(RESNET, resnet20(sizes), few, peer),
        ]
    )
