"""Does K-FAC lose anything in mixed precision? ``python -m benchmarks.mixed_precision``.

The demo's autoencoder and settings, one process, float32 against bfloat16 autocast (``precision="bf16-mixed"``), with
one-level and two-level K-FAC. Writes ``benchmarks/mixed_precision.md``.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev

from rich.console import Console

from benchmarks.training_run import ROOT, TrainingRun

# Name -> configuration and number of seeds: early on one-level K-FAC with a fixed rate differs more from seed to seed.
METHODS = {"K-FAC": ("mnist_autoencoder.yaml", 9), "two-level K-FAC": ("mnist_autoencoder_two_level.yaml", 3)}
PRECISIONS, EPOCHS = ("32-true", "bf16-mixed"), 3


def losses(config: str, precision: str, seed: int, folder: Path) -> tuple[float, float]:
    """Training and held-out loss per pixel of the last epoch."""
    name = f"{Path(config).stem}-{precision}-{seed}"
    run = TrainingRun(
        config=ROOT / "configs" / config,
        options=[f"--seed_everything={seed}", f"--trainer.precision={precision}"],
        epochs=EPOCHS,
        record=folder / f"{name}.jsonl",
        log=folder / f"{name}.log",
    )
    last = run.train()[-1]
    return last["pixel_loss"], last["val_pixel_loss"]


def row(method: str, split: str, single: Sequence[float], mixed: Sequence[float]) -> str:
    """A line of the table, from the losses by seed in float32 and in mixed precision."""
    logs = [math.log(half / full) for full, half in zip(single, mixed, strict=True)]
    cells = [method, split, str(len(single))]
    cells += [f"{median(values):.4f} ({min(values):.4f}, {max(values):.4f})" for values in (single, mixed)]
    cells.append(f"{median(mixed) / median(single):.3f}")
    cells.append(f"{math.exp(mean(logs)):.3f} +- {stdev(logs) / len(logs) ** 0.5:.3f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Train with every method, precision and seed, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_precision", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("mixed_precision.md"))
    arguments = parser.parse_args()
    lines = [
        "# bfloat16 autocast against float32\n",
        f"`python -m benchmarks.mixed_precision`: the MNIST autoencoder on 4,500 digits, batch 256, {EPOCHS} epochs, "
        "settings of configs/. Binary cross-entropy per pixel in the last epoch: median (least, greatest) of the "
        "seeds, ratio of the medians, and the geometric mean over the seeds of bf16-mixed / float32 with its standard "
        "error.\n",
        "| method | loss | seeds | float32 | bf16-mixed | medians | seed by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        for method, (config, seeds) in METHODS.items():
            single, mixed = ([losses(config, p, seed, Path(folder)) for seed in range(seeds)] for p in PRECISIONS)
            for index, split in enumerate(("training", "held-out")):
                lines.append(row(method, split, [pair[index] for pair in single], [pair[index] for pair in mixed]))
                console.print(lines[-1])
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
