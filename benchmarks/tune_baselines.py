"""The settings of every method in the demo, from a small grid: each trial is 10 epochs of the MNIST autoencoder.

    OMP_NUM_THREADS=1 python -m benchmarks.tune_baselines            # all methods, one run at a time
    OMP_NUM_THREADS=1 python -m benchmarks.tune_baselines --only adam

Writes ``benchmarks/baselines.csv``: one row per trial, in the order of the grid; rows of methods that are not run stay.
The best trial has the lowest training loss after the last epoch. One process, batch 256, seed 0. The seconds depend on
what else the machine does: compare them only where nothing else ran.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.training_run import ROOT, RunFailedError, TrainingRun

RESULTS = ROOT / "benchmarks" / "baselines.csv"
COLUMNS = ("method", "settings", "pixel_loss_5", "pixel_loss_10", "val_pixel_loss_5", "val_pixel_loss_10", "seconds_10")
EPOCHS = 10


class Grid(NamedTuple):
    """A configuration, and the options that are tried on it."""

    config: str
    trials: tuple[tuple[str, ...], ...]


def options(**values: float | str | None) -> tuple[str, ...]:
    """Options of ``kfac-dist fit``; a double underscore in a name stands for a dot."""
    return tuple(f"--{name.replace('__', '.')}={'null' if v is None else v}" for name, v in values.items())


SGD_TRIALS = ((1e-3, 0.9), (2e-3, 0.9), (3e-3, 0.9), (5e-3, 0.9), (1e-2, 0.9), (1e-3, 0.95), (3e-3, 0.95), (1e-3, 0.99))
ADAM = tuple(options(optimizer__lr=lr) for lr in (3e-4, 7e-4, 1e-3, 1.5e-3, 3e-3, 1e-2))
SGD = tuple(options(optimizer__lr=lr, optimizer__momentum=momentum) for lr, momentum in SGD_TRIALS)
# Learning rate, damping, KL clip.
KFAC_TRIALS = (
    (0.1, 0.03, 0.03),
    (0.1, 0.03, 0.1),
    (0.1, 0.03, 0.01),
    (0.1, 0.1, 0.03),
    (0.1, 0.1, 0.1),
    (0.1, 0.01, 0.03),
    (0.3, 0.03, 0.03),
    (0.03, 0.03, 0.03),
)
KFAC = tuple(
    options(optimizer__lr=lr, trainer__callbacks__damping=damping, trainer__callbacks__kl_clip=clip)
    for lr, damping, clip in KFAC_TRIALS
)


def initialised(init: str, trials: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """The same trials from another initialisation."""
    return tuple((f"--model.init={init}", *trial) for trial in trials)


ADAM_FILE, SGD_FILE, KFAC_FILE = ("mnist_autoencoder_adam.yaml", "mnist_autoencoder_sgd.yaml", "mnist_autoencoder.yaml")
GRIDS = {
    "adam": Grid(ADAM_FILE, ADAM),
    "sgd": Grid(SGD_FILE, SGD),
    "kfac": Grid(KFAC_FILE, KFAC),
    # How much of a method's place is the initialisation's: PyTorch's own, and He et al.'s, which suits ReLU.
    "adam_default": Grid(ADAM_FILE, initialised("default", ADAM)),
    "sgd_default": Grid(SGD_FILE, initialised("default", SGD)),
    "adam_kaiming": Grid(ADAM_FILE, initialised("kaiming", [options(optimizer__lr=lr) for lr in (5e-4, 1e-3, 2e-3)])),
    "sgd_kaiming": Grid(SGD_FILE, initialised("kaiming", [options(optimizer__lr=lr) for lr in (3e-4, 1e-3, 3e-3)])),
    "kfac_kaiming": Grid(KFAC_FILE, initialised("kaiming", KFAC[:3])),
}


def trial(method: str, number: int, scratch: Path) -> dict[str, str]:
    """Run one trial; a run that fails (a loss that is no number stops some optimizers) is a row without results."""
    grid = GRIDS[method]
    settings = grid.trials[number]
    run = TrainingRun(
        config=ROOT / "configs" / grid.config,
        options=settings,
        epochs=EPOCHS,
        record=scratch / f"{method}-{number}.jsonl",
        log=scratch / f"{method}-{number}.log",
    )
    row = {"method": method, "settings": " ".join(settings)}
    try:
        epochs = run.train()
    except RunFailedError as error:
        print(error)
        return row | dict.fromkeys(COLUMNS[2:], "failed")
    for mark in (5, EPOCHS):
        for metric in ("pixel_loss", "val_pixel_loss"):
            row[f"{metric}_{mark}"] = f"{epochs[mark - 1][metric]:.4f}"
    return row | {"seconds_10": f"{epochs[-1]['seconds']:.1f}"}


def read_results() -> list[dict[str, str]]:
    """The rows of an earlier call."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write_results(rows: Sequence[dict[str, str]]) -> None:
    """All rows, methods in the order of the grids."""
    order = list(GRIDS)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: order.index(row["method"])))


def final_loss(row: dict[str, str]) -> float:
    """Training loss after the last epoch; infinite where the run failed or diverged."""
    try:
        loss = float(row[f"pixel_loss_{EPOCHS}"])
    except ValueError:
        return float("inf")
    return loss if loss == loss else float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grids; print every trial, and the best one of each method at the end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_baselines", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(GRIDS), default=list(GRIDS), help="tune only these methods")
    parser.add_argument("--scratch", type=Path, default=ROOT / "outputs" / "tune", help="folder of logs and records")
    arguments = parser.parse_args(argv)
    scratch = arguments.scratch.resolve()
    rows = [row for row in read_results() if row["method"] not in arguments.only]
    for method in arguments.only:
        for number in range(len(GRIDS[method].trials)):
            rows.append(trial(method, number, scratch))
            write_results(rows)
            print(*(rows[-1][column] for column in COLUMNS), flush=True)
    for method in arguments.only:
        best = min((row for row in rows if row["method"] == method), key=final_loss)
        print("best:", *(best[column] for column in COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
