"""How close does each coarse space come to the natural gradient? ``python -m benchmarks.coarse_error``.

Small networks, dense float64 Fisher matrices, five states of training each: the error ||d - d*||_F of the two-level
direction d over that of one-level K-FAC (geometric mean over the states), and in brackets the same for the
step-size-free error min_a ||a d - d*||_F. Writes ``benchmarks/coarse_error.md``.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.config import KFACConfig
from kfac_dist.study.dense_fisher import DenseFisher, sampled_cotangents

DAMPING, SAMPLES, STATES, STEPS_BETWEEN = 1e-2, 1024, 5, 20

NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "MLP 64-20-20-20-10": (
        lambda: nn.Sequential(
            nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10)
        ),
        "categorical",
    ),
    "CNN 6-8-8-10": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        "categorical",
    ),
    "autoencoder 64-24-8-24-64": (
        lambda: nn.Sequential(
            nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 8), nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 64)
        ),
        "bernoulli",
    ),
}
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


def loss_of(likelihood: str, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if likelihood == "categorical":
        return F.cross_entropy(logits, y)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def direction(
    model: nn.Module, likelihood: str, x: Tensor, y: Tensor, coarse: CoarseConfig | None, previous: KFACPreconditioner
) -> dict[str, Tensor]:
    """The direction at the model's parameters; momentum spaces get the one that ``previous`` handed out last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kfac = KFACPreconditioner(
            model, likelihood=likelihood, damping=DAMPING, damping_method="eigen", coarse=coarse, seed=1
        )
    if coarse is not None and "momentum" in coarse.space:
        kfac.load_state_dict(kfac.state_dict() | {"coarse": previous.state_dict()["coarse"] | {"space": coarse.space}})
    model.zero_grad()
    logits = model(x)
    kfac.accumulate(sample_ids=torch.arange(len(x)))
    loss_of(likelihood, logits, x, y).backward()
    kfac.step()
    kfac.close()
    return {layer.name: layer.gradient() for layer in kfac.layers}  # type: ignore[misc]


def states(model: nn.Module, likelihood: str, x: Tensor, y: Tensor) -> KFACPreconditioner:
    """The preconditioner that trains the model between the states: one step of layer_step_momentum at a time."""
    coarse = CoarseConfig(space="layer_step_momentum", max_samples=None, damping=0.1)
    return KFACPreconditioner(
        model, likelihood=likelihood, damping=DAMPING, damping_method="eigen", coarse=coarse, seed=2, kl_clip=0.3
    )


def measure(name: str) -> dict[str, tuple[float, float]]:
    """Row -> geometric means of the two error ratios over the states of one network."""
    build, likelihood = NETS[name]
    digits = load_digits()
    x = torch.tensor(digits.data[:SAMPLES] / 16.0, dtype=torch.float64)
    y = torch.tensor(digits.target[:SAMPLES])
    torch.manual_seed(0)
    model = build().double()
    trainer = states(model, likelihood, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    logs: dict[str, list[tuple[float, float]]] = {row: [] for row in ("one level", *SPACES)}
    for _ in range(STATES):
        for _ in range(STEPS_BETWEEN):
            optimizer.zero_grad()
            logits = model(x)
            trainer.accumulate()
            loss_of(likelihood, logits, x, y).backward()
            trainer.step(lr=optimizer)
            optimizer.step()
        model.zero_grad()
        logits = model(x)
        loss_of(likelihood, logits, x, y).backward()
        cotangents = sampled_cotangents(KFACConfig(likelihood=likelihood, seed=1), 0, logits)
        fisher = DenseFisher(model, trainer.layers, x, cotangents)
        gradient = fisher.flatten({layer.name: layer.gradient() for layer in trainer.layers})  # type: ignore[misc]
        trainer.forget()
        for row in logs:
            space, k, variant, _ = SPACES.get(row, ("", 1, None, ""))
            coarse = None
            if space:
                coarse = CoarseConfig(space=space, vectors_per_layer=k, variant=variant, max_samples=None)
            found = fisher.flatten(direction(model, likelihood, x, y, coarse, trainer))
            logs[row] += fisher.errors(gradient, [found], DAMPING)
        trainer.forget()
    trainer.close()
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
