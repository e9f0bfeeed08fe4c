"""How close does each coarse space come to the natural gradient? ``python -m benchmarks.coarse_error``.

Small networks, dense float64 Fisher matrices, five states of training each: the error ||d - d*||_F of the two-level
direction d over that of one-level K-FAC (geometric mean over the states), and in brackets the same for the
step-size-free error min_a ||a d - d*||_F. Writes ``benchmarks/coarse_error.md``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.states import DAMPING, NETS, SAMPLES, STATES, direction, visited
from kfac_dist import CoarseConfig

# Row of the table -> (space, vectors per layer, variant, multiple of L that its dimension is).
SPACES: dict[str, tuple[str, int, str | None, str]] = {
    "scalar": ("scalar", 1, None, "1"),
    "scalar_momentum": ("scalar_momentum", 1, None, "2"),
    "spectral, smallest": ("spectral", 1, "smallest", "L"),
    "nicolaides": ("nicolaides", 1, None, "L"),
    "tselepidis": ("tselepidis", 1, None, "L"),
    "spectral, largest": ("spectral", 1, "largest", "L"),
    "residual": ("residual", 1, None, "L"),
    "layer_step": ("layer_step", 1, None, "L"),
    "krylov, nicolaides": ("krylov", 2, "nicolaides", "2 L"),
    "krylov, residual": ("krylov", 2, "residual", "2 L"),
    "layer_step_momentum": ("layer_step_momentum", 1, None, "2 L"),
    "spectral_bands": ("spectral_bands", 2, None, "2 L"),
    "layer_step_residual": ("layer_step_residual", 1, None, "2 L"),
    "krylov, nicolaides (8)": ("krylov", 8, "nicolaides", "8 L"),
    "spectral, largest (8)": ("spectral", 8, "largest", "8 L"),
    "krylov, residual (8)": ("krylov", 8, "residual", "8 L"),
    "spectral_bands (8)": ("spectral_bands", 8, None, "8 L"),
    "pcg (8)": ("pcg", 8, None, "8 L"),
}


def measure(name: str) -> dict[str, tuple[float, float]]:
    """Row -> geometric means of the two error ratios over the states of one network."""
    logs: dict[str, list[tuple[float, float]]] = {row: [] for row in ("one level", *SPACES)}
    for state in visited(name):
        found = []
        for row in logs:
            space, k, variant, _ = SPACES.get(row, ("", 1, None, ""))
            coarse = None
            if space:
                coarse = CoarseConfig(space=space, vectors_per_layer=k, variant=variant, max_samples=None)
            found.append(direction(state, coarse))
        for log, error in zip(logs.values(), state.fisher.errors(state.gradient, found, DAMPING), strict=True):
            log.append(error)
    base = logs["one level"]
    result = {"one level, absolute": tuple(_mean([e[i] for e in base]) for i in (0, 1))}
    for row, values in logs.items():
        result[row] = tuple(_mean([v[i] / b[i] for v, b in zip(values, base, strict=True)]) for i in (0, 1))
    return result  # type: ignore[return-value]


def _mean(values: list[float]) -> float:
    return math.exp(sum(math.log(max(v, 1e-300)) for v in values) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("coarse_error.md"))
    arguments = parser.parse_args()
    results = {name: measure(name) for name in NETS}
    table = Table(title=f"||d - d*||_F over one-level K-FAC's, (step-size-free); lambda {DAMPING}, B {SAMPLES}")
    lines = [
        f"# Errors against the natural gradient\n\n`python -m benchmarks.coarse_error`: ||d - d*||_F over that of "
        f"one-level K-FAC, in brackets the step-size-free error; geometric mean over {STATES} states; eigen damping "
        f"{DAMPING}, {SAMPLES} digits, float64. The first row is one-level K-FAC's own error over ||d*||_F.\n",
        "| m | space | " + " | ".join(results) + " |",
        "|---|---|" + "---|" * len(results),
    ]
    for column in ("m", "space", *results):
        table.add_column(column)
    for row in next(iter(results.values())):
        cells = [f"{results[net][row][0]:.3f} ({results[net][row][1]:.2f})" for net in results]
        m = SPACES[row][3] if row in SPACES else ""
        table.add_row(m, row, *cells)
        lines.append(f"| {m} | {row} | " + " | ".join(cells) + " |")
    Console(width=150).print(table)
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
