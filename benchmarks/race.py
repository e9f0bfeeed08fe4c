"""Loss after equal epochs, over seeds: ``make race`` or ``python -m benchmarks.race``; writes benchmarks/race.md.

The MNIST autoencoder, one process, one thread, batch 256. The seed decides the initial weights and the order of the
batches, so that the methods are paired; runs of all methods with one seed come before those with the next.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.demo import METHODS, Method
from benchmarks.training_run import ROOT, TrainingRun
from kfac_dist.study.record import read_record

COARSE = "--trainer.callbacks.coarse"
TWO_LEVEL = "mnist_autoencoder_two_level.yaml"
RIVALS = (
    *METHODS,
    Method("scalar_momentum", "scalar_momentum", TWO_LEVEL, (f"{COARSE}=scalar_momentum",)),
    Method(
        "layer_step_momentum, coarse damping 1",
        "fixed_damping",
        TWO_LEVEL,
        (f'{COARSE}={{"space": "layer_step_momentum", "damping": 1.0}}',),
    ),
)
INITIALISATIONS = ("xavier", "kaiming")
MARKS = (5, 10)


def options_of(method: Method, seed: int, init: str) -> list[str]:
    """The command line's options.

    SGD takes the next best rate of its grid: the best one, 0.005, diverges from another seed's weights.
    """
    options = [*method.options, f"--seed_everything={seed}", f"--model.init_args.init={init}"]
    if method.key == "sgd":
        options.append("--optimizer.init_args.lr=0.001")
    return options


def cell(values: Sequence[float]) -> str:
    """Mean and range over the seeds."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f}-{max(values):.4f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--inits", nargs="+", choices=INITIALISATIONS, default=list(INITIALISATIONS))
    parser.add_argument("--only", nargs="+", choices=[m.key for m in RIVALS], help="only these methods")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished in outputs/race")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("race.md"))
    arguments = parser.parse_args(argv)
    folder = ROOT / "outputs" / "race"
    methods = [m for m in RIVALS if not arguments.only or m.key in arguments.only]
    curves: dict[tuple[str, str], list[list[dict]]] = {(i, m.key): [] for i in arguments.inits for m in methods}
    console = Console(highlight=False)
    for init in arguments.inits:
        for seed in arguments.seeds:
            for method in methods:
                name = f"{init}-{method.key}-{seed}"
                run = TrainingRun(
                    config=ROOT / "configs" / method.config,
                    options=options_of(method, seed, init),
                    epochs=max(MARKS),
                    record=folder / f"{name}.jsonl",
                    log=folder / f"{name}.log",
                    timeout=900.0,
                )
                epochs = read_record(run.record)[0] if arguments.resume and run.record.exists() else []
                if len(epochs) < max(MARKS):
                    epochs = run.train()
                curves[init, method.key].append(epochs)
                console.print(f"{name}: {epochs[-1]['pixel_loss']:.4f}, {epochs[-1]['seconds']:.1f} s")
    lines = [
        "# Race on the MNIST autoencoder",
        "",
        f"`python -m benchmarks.race --seeds {' '.join(map(str, arguments.seeds))} --inits "
        f"{' '.join(arguments.inits)}`: binary cross-entropy per pixel "
        f"(nats), mean over {len(arguments.seeds)} seeds (and range); one process, one thread, batch 256, "
        f"4,500 digits for training and 500 held out. torch {torch.__version__}, {platform.machine()}. What a "
        "step costs is in coarse_cost.md.",
    ]
    for init in arguments.inits:
        lines += [
            "",
            f"## {init.capitalize()} initialisation",
            "",
            "| method | " + " | ".join(f"training, epoch {m}" for m in MARKS) + " | held-out, epoch 10 |",
            "|---|" + "---|" * (len(MARKS) + 1),
        ]
        for method in methods:
            runs = curves[init, method.key]
            cells = [cell([run[m - 1]["pixel_loss"] for run in runs]) for m in MARKS]
            cells.append(cell([run[-1]["val_pixel_loss"] for run in runs]))
            lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    arguments.output.write_text("\n".join(lines) + "\n")
    console.print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
