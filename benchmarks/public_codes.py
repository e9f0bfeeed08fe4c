"""What the public two-level codes compute in the place of the corrections: ``python -m benchmarks.public_codes``.

Small networks, dense float64 Fisher matrices, several states of training each. Every row is a correction with some of
the deviations of :mod:`benchmarks.corrections`, one at a time and all together. Writes ``benchmarks/public_codes.md``;
docs/study/public-codes.md discusses it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.approximate_operator import growth, tselepidis
from benchmarks.corrections import (
    LayerSamples,
    Memory,
    exact_on,
    fine_level,
    koroko,
    preconditioned,
    samples_of,
)
from benchmarks.page import table
from benchmarks.states import DAMPING, NETS, SAMPLES, STEPS_BETWEEN, visited

DEVIATIONS = {
    "rhs": "R_0 grad in the place of R_0 r",
    "layout": "gradient laid out [W flat, b flat], vectors [W, b]",
    "kron": "q_A (x) q_G viewed row by row",
    "locations": "F v: weights of the samples in another order than the locations",
    "p_i": "coarse damping lambda p_i on the diagonal alone, vectors of inf-norm 1",
    "both": "lambda added to both factors",
    "twice": "basis: 2 lambda added to both factors",
    "average": "E averaged, whatever the basis does",
    "iterations": "factors averaged with weights of iterations",
    "lambda": "coarse damping lambda for vectors of p_i ones",
    "draws": "another random sub-batch for every layer",
    "over_B": "cross-covariances of G over B, not B T (T_ij the nearest pixels)",
    "in_place": "averages symmetrised in place",
    "no_T": "E without T, maps resized as lines of pixels",
}

COUNT, SUB_BATCH, INVERSIONS = 10, 64, 13
HEAD = ("method", "instead of the published", "in the code of", "error", "free", "promised", "true", "worse", "uphill")
K, T = "Koroko et al.", "Tselepidis et al."
# Space -> what the code of Koroko et al. does with it, in the order of the rows.
KOROKO = {
    "nicolaides": ("rhs", "locations", "both", "average", "iterations"),
    "spectral, smallest": ("rhs", "layout", "kron", "p_i", "locations", "both", "average", "iterations"),
    "residual": ("rhs", "layout", "p_i", "twice", "locations", "both", "average", "iterations"),
    "krylov": ("rhs", "layout", "p_i", "twice", "locations", "both", "average", "iterations"),
}
TSELEPIDIS = ("lambda", "over_B", "in_place")


@dataclass(frozen=True)
class Row:
    """One reading of one method."""

    space: str
    deviations: frozenset[str] = frozenset()
    code: str = ""

    @property
    def text(self) -> str:
        """What is deviated from."""
        if not self.deviations:
            return "(as published)"
        return DEVIATIONS[next(iter(self.deviations))] if len(self.deviations) == 1 else "all of the code's"


@dataclass
class Log:
    """Per state: the two errors over one level's, and the promised and the true decrease in ||zeta - zeta*||^2."""

    full: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    promised: list[float] = field(default_factory=list)
    true: list[float] = field(default_factory=list)
    uphill: list[bool] = field(default_factory=list)


def rows(convolutions: bool) -> list[Row]:
    """All rows of a network's table; without convolutions the deviations that need locations change nothing."""
    spatial = {"locations", "over_B"}
    found = [Row("one level"), Row("one level", frozenset({"both"}), K)]
    for space, names in KOROKO.items():
        names = tuple(n for n in names if convolutions or n not in spatial)
        found.append(Row(space))
        found += [Row(space, frozenset({name}), K) for name in names]
        found.append(Row(space, frozenset(names), K))
    found += [Row("tselepidis")]
    found += [Row("tselepidis", frozenset({n}), T) for n in TSELEPIDIS if convolutions or n not in spatial]
    found += [Row("tselepidis", frozenset(TSELEPIDIS), T)]
    found += [Row("tselepidis", frozenset({"both", "no_T", "average", "iterations"}), K)]
    return [*found, Row("exact"), Row("exact", frozenset({"draws"}), K)]


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def directions(row: Row, layers: Sequence[LayerSamples], memory: Memory) -> tuple[Tensor, Tensor, float]:
    """One-level direction, the row's direction, and the decrease that its coarse system promises."""
    if row.space in ("one level", "exact"):
        eigen, gradients = fine_level(layers, frozenset(), Memory()), [layer.gradient for layer in layers]
        one = flat(preconditioned(layers, eigen, gradients, DAMPING, frozenset()))
        if row.space == "exact":
            return one, flat(exact_on(layers, DAMPING, SUB_BATCH, row.deviations)), float("nan")
        return one, flat(preconditioned(layers, eigen, gradients, DAMPING, row.deviations)), float("nan")
    if row.space == "tselepidis":
        made = tselepidis(layers, DAMPING, row.deviations, memory)
    else:
        made = koroko(layers, row.space, DAMPING, row.deviations, memory)
    return flat(made.fine), flat(made.direction), made.promised


def measure(name: str, count: int, samples: int, steps: int) -> tuple[dict[Row, Log], list[tuple[float, float]]]:
    """The rows of one network, and how averages that are symmetrised in place grow on its first state."""
    logs: dict[Row, Log] = {}
    memories: dict[Row, Memory] = {}
    grown: list[tuple[float, float]] = []
    for state in visited(name, count, samples, steps):
        layers = samples_of(state)
        grown = grown or growth(layers, DAMPING, INVERSIONS)
        here = rows(any(layer.locations > 1 for layer in layers))
        made = [directions(row, layers, memories.setdefault(row, Memory())) for row in here]
        both = state.fisher.errors(state.gradient, [d for one, two, _ in made for d in (one, two)], DAMPING)
        energy = float(state.fisher.solve(state.gradient, DAMPING) @ state.gradient)
        for row, (_, two, promised), before, after in zip(here, made, both[::2], both[1::2], strict=True):
            log = logs.setdefault(row, Log())
            log.full.append(after[0] / before[0])
            log.free.append(after[1] / before[1])
            log.promised.append(promised / (energy * before[0] ** 2))
            log.true.append(1 - (after[0] / before[0]) ** 2)
            log.uphill.append(float(two @ state.gradient) <= 0)
    return logs, grown


def cells(row: Row, log: Log) -> list[str]:
    worse = sum(ratio > 1 + 1e-9 for ratio in log.full)
    promised = statistics.median(log.promised)
    known = f"{100 * promised:.3g} %" if promised == promised else ""
    means = [f"{statistics.geometric_mean(values):.3f}" for values in (log.full, log.free)]
    true = f"{100 * statistics.median(log.true):.3g} %"
    states = len(log.full)
    return [row.space, row.text, row.code, *means, known, true, f"{worse}/{states}", f"{sum(log.uphill)}/{states}"]


def page(found: dict[str, tuple[dict[Row, Log], list[tuple[float, float]]]], count: int, samples: int) -> str:
    parts = [
        "# What the public two-level codes compute\n\n"
        f"`python -m benchmarks.public_codes`: {count} states of training per network, eigen damping and coarse "
        f"damping {DAMPING}, {samples} digits, float64. *error*: ||d - d*||_F over that of the one-level step that the "
        "correction was added to (below 1: the coarse level helped); *free*: the same when every direction may take "
        "its best step size; both geometric means over the states. *promised*: the decrease rhs^T E^-1 rhs of the "
        "squared error by which the coarse system justifies itself, *true*: what it was, both over the squared error "
        "of one level, medians. *worse*: states in which the error increased; *uphill*: in which d is no descent "
        "direction. *one level* and *exact* (the natural gradient of a random sub-batch of "
        f"{SUB_BATCH}) are compared with one level as published. [The discussion](../docs/study/public-codes.md).\n"
    ]
    for name, (logs, _) in found.items():
        parts.append(f"## {name}\n\n{table(HEAD, [cells(row, log) for row, log in logs.items()])}")
    head = ("inversions", *(f"{name}: {what}" for name in found for what in ("largest sum", "E")))
    lines = [
        [str(k + 1), *(text for _, g in found.values() for text in (f"{g[k][0]:.2f}", f"{g[k][1]:.1e}"))]
        for k in range(0, INVERSIONS, 2)
    ]
    parts.append(
        "## Averages that are symmetrised in place\n\nOn constant data (the first state), ten updates to an inversion: "
        "the largest off-diagonal sum of the inputs' averages over what it should be, and the smallest eigenvalue of E "
        f"over the largest.\n\n{table(head, lines)}"
    )
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("public_codes.md"))
    parser.add_argument("--smoke", action="store_true", help="one state of every network on 64 digits")
    arguments = parser.parse_args(argv)
    count, samples, steps = (1, 64, 2) if arguments.smoke else (COUNT, SAMPLES, STEPS_BETWEEN)
    found = {name: measure(name, count, samples, steps) for name in NETS}
    arguments.output.write_text(page(found, count, samples), encoding="utf-8")


if __name__ == "__main__":
    main()
