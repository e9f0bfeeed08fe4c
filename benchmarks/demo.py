"""The MNIST autoencoder on two processes: K-FAC, two-level K-FAC, Adam and SGD, as a table and a plot.

    python -m benchmarks.demo

Every method trains from the same initial weights on the same batches (256 digits over two ranks) with the settings of
its configuration, which says where they come from; two-level K-FAC has no learning rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.training_run import ROOT, RunFailedError, TrainingRun

PROCESSES = 2
GLOBAL_BATCH = 256


@dataclass(frozen=True)
class Method:
    """One line of the table: its name, the key of its files, and a configuration with further options."""

    name: str
    key: str
    config: str
    options: tuple[str, ...] = ()


METHODS = (
    Method("K-FAC", "kfac", "mnist_autoencoder.yaml"),
    Method("two-level K-FAC", "two_level", "mnist_autoencoder_two_level.yaml"),
    Method("Adam", "adam", "mnist_autoencoder_adam.yaml"),
    Method("SGD with momentum", "sgd", "mnist_autoencoder_sgd.yaml"),
)

Curves = dict[str, list[dict[str, Any]]]
"""Method's name -> its epochs, as kfac_dist.study.EpochRecord wrote them."""


def train_method(method: Method, arguments: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Train with one method while its bar moves.

    Raises:
        RunFailedError: the processes failed or took longer than allowed.
    """
    options = [*method.options, f"--data.batch_size={GLOBAL_BATCH // PROCESSES}"]
    if arguments.smoke:
        options += ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
    run = TrainingRun(
        config=ROOT / "configs" / method.config,
        options=options,
        epochs=arguments.epochs,
        record=arguments.output / f"{method.key}.jsonl",
        log=arguments.output / f"{method.key}.log",
        processes=PROCESSES,
        timeout=arguments.timeout,
    )
    bar = progress.add_task(method.name, total=None, note="starting")
    steps_per_epoch = 0.0

    def advance(line: dict[str, Any]) -> None:
        nonlocal steps_per_epoch
        if line.get("steps"):
            progress.update(bar, total=line["steps"], completed=line["step"], note="training")
        elif "epoch" in line:
            steps_per_epoch = line["step"] / line["epoch"]
            note = f"epoch {line['epoch']}: pixel loss {line['pixel_loss']:.4f}"
            progress.update(bar, total=steps_per_epoch * arguments.epochs, completed=line["step"], note=note)

    epochs = run.train(advance)
    advance(epochs[-1])
    progress.stop_task(bar)
    return epochs


def loss_table(curves: Curves, marks: Sequence[int]) -> Table:
    """The losses after the epochs ``marks``, and the seconds of training."""
    table = Table(title="MNIST autoencoder: binary cross-entropy per pixel (nats), lower is better")
    table.add_column("method", no_wrap=True)
    for split in ("training", "held-out"):
        for mark in marks:
            table.add_column(f"{split},\nepoch {mark}", justify="right")
    table.add_column(f"seconds until\nepoch {marks[-1]}", justify="right")
    for name, epochs in curves.items():
        losses = [epochs[mark - 1][metric] for metric in ("pixel_loss", "val_pixel_loss") for mark in marks]
        table.add_row(name, *(f"{loss:.4f}" for loss in losses), f"{epochs[-1]['seconds']:.1f}")
    return table


def plot(curves: Curves, path: Path) -> None:
    """Loss against epochs and against seconds; solid on the training digits, dashed on the held-out ones."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, abscissa, label in zip(panels, ("epoch", "seconds"), ("epochs", "seconds of training"), strict=True):
        for number, (name, epochs) in enumerate(curves.items()):
            x = [line[abscissa] for line in epochs]
            style = {"color": f"C{number}", "marker": ".", "markersize": 4}
            axes.plot(x, [line["pixel_loss"] for line in epochs], label=name, **style)
            axes.plot(x, [line["val_pixel_loss"] for line in epochs], linestyle="--", **style)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("cross-entropy per pixel (nats)")
    panels[0].set_yscale("log")
    panels[0].legend(title=f"{PROCESSES} processes, batch {GLOBAL_BATCH}; dashed: held-out")
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``smoke`` overrides the number of epochs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs per method (default 10)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo", help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[m.key for m in METHODS], help="train only these methods")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds until a method is given up")
    parser.add_argument("--smoke", action="store_true", help="one epoch of three batches: does it run at all?")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.epochs = 1
    if arguments.epochs < 1:
        parser.error(f"--epochs={arguments.epochs} must be at least 1")
    arguments.output = arguments.output.resolve()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Train with every method, print the table, save the plot.

    Returns:
        The exit status: 0, or 1 where a run failed; the end of its log has been printed then.
    """
    arguments = parse(argv)
    console = Console(soft_wrap=True, highlight=False)
    methods = [m for m in METHODS if not arguments.only or m.key in arguments.only]
    arguments.output.mkdir(parents=True, exist_ok=True)
    digits = "a few digits" if arguments.smoke else "4,500 real digits (500 more are held out)"
    console.print(
        f"An autoencoder 784-1000-500-250-30-250-500-1000-784 learns {digits}: {', '.join(m.name for m in methods)}, "
        f"{arguments.epochs} epochs each, on {PROCESSES} processes (torchrun, gloo, one thread each).\n"
        f"Outputs: {arguments.output} (loss.png; <method>.jsonl: losses and seconds per epoch; <method>.log)"
    )
    start = time.monotonic()
    curves: Curves = {}
    columns = ("{task.description:<18}", BarColumn(), "{task.percentage:>3.0f}%", TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        for method in methods:
            try:
                curves[method.name] = train_method(method, arguments, progress)
            except RunFailedError as error:
                progress.stop()
                console.print(f"{method.name}: {error}", style="red", markup=False)
                return 1
    plot(curves, arguments.output / "loss.png")
    console.print(loss_table(curves, sorted({max(1, arguments.epochs // 2), arguments.epochs})))
    console.print(
        "Training losses are means over the steps of an epoch, held-out ones are taken after it. Seconds: wall time of "
        "the training epochs, fetching batches included; start-up and validation excluded.\n"
        f"Plot: {arguments.output / 'loss.png'}. All of it took {time.monotonic() - start:.0f} s."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
