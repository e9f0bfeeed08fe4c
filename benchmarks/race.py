"""Time to loss of every method on the MNIST autoencoder: ``make race`` or ``python -m benchmarks.race``.

1. Every method gets the same number of trials from its search space (the first one is its documented default), each of
   a few epochs with a seed of its own; the trial with the lowest training loss is chosen.
2. The chosen settings run with fresh seeds until both budgets, epochs and seconds, are used up.
3. The best two-level method's one-level form runs once more at that method's own settings.

Each run is one process with one thread, two at a time: nothing else should run. Everything is kept in outputs/race, one
file per run; ``--resume`` goes on where an earlier call stopped, ``--methods`` runs a part, and the page,
benchmarks/race.md, is made of all methods whose runs are complete.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.race_page import Curves, best_two_level, page, plot
from benchmarks.training_run import ROOT
from kfac_dist.study.methods import METHODS, method
from kfac_dist.study.protocol import TUNING_SEED, Protocol, lines_of
from kfac_dist.study.readings import training_loss
from kfac_dist.study.run import Line, Run
from kfac_dist.study.runner import available, calibrate, estimate, file_of, finished, read_lines, run_all
from kfac_dist.study.search import trials
from kfac_dist.study.suite import PROBLEMS


def command(protocol: Protocol) -> str:
    """How to call for this protocol; places of files are left out."""
    options = {"problem": protocol.problem, "trials": protocol.trials, "tuning-epochs": protocol.tuning_epochs}
    options |= {"seeds": " ".join(map(str, protocol.seeds)), "epochs": protocol.epochs}
    words = [f"--{name} {value}" for name, value in options.items()]
    words += [f"--seconds {protocol.seconds:g}", "--marks", *(f"{mark:g}" for mark in protocol.marks)]
    return " ".join(["python -m benchmarks.race", *words])


def collect(protocol: Protocol, folder: Path) -> Curves:
    """Every method whose runs are complete: its settings, and its lines per seed."""
    curves = Curves(problem=PROBLEMS[protocol.problem])
    for name in METHODS:
        settings = protocol.chosen(name, folder)
        lines = lines_of(protocol.finals(name, settings), folder) if settings is not None else []
        if settings is not None and lines:
            curves.settings[name], curves.lines[name] = settings, lines
    best = best_two_level(curves)
    if best is not None:
        runs = protocol.twin(best, curves.settings)
        curves.twin = (best, runs[0].settings, lines_of(runs, folder)) if lines_of(runs, folder) else None
    return curves


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="only these")
    parser.add_argument("--problem", choices=list(PROBLEMS), default="mnist_autoencoder")
    parser.add_argument("--trials", type=int, default=6, help="points of the search space for each method")
    parser.add_argument("--tuning-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--marks", type=float, nargs="+", default=[5.0, 10.0, 20.0, 43.0, 60.0], help="seconds")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--kfac-pytorch", type=Path, help="folder of a clone of kfac-pytorch; or KFAC_PYTORCH")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished")
    parser.add_argument("--estimate", action="store_true", help="only say how long it would take")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "race", help="of the runs and the plot")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("race.md"))
    arguments = parser.parse_args(argv)
    if TUNING_SEED in arguments.seeds:
        parser.error(f"--seeds: {TUNING_SEED} is the seed of the trials; choose others")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Race, and write the page."""
    arguments = parse(argv)
    if arguments.kfac_pytorch:
        os.environ["KFAC_PYTORCH"] = str(arguments.kfac_pytorch.resolve())
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    console, folder = Console(highlight=False, soft_wrap=True), arguments.folder.resolve()
    marks = tuple(m for m in arguments.marks if m <= arguments.seconds)
    protocol = Protocol(
        problem=arguments.problem,
        trials=arguments.trials,
        tuning_epochs=arguments.tuning_epochs,
        seeds=tuple(arguments.seeds),
        epochs=arguments.epochs,
        seconds=arguments.seconds,
        marks=marks,
    )
    names, missing = available(arguments.problem, arguments.methods)
    for name, reason in missing.items():
        console.print(f"{method(name).title} is left out: it {reason}")
    tuning = [run for name in names for run in protocol.tuning(name)]
    finals = [r for name in names for r in protocol.finals(name, trials(method(name).space, 1)[0])]
    extra = protocol.finals("kfac", {}, label="as") if any(method(name).one_level for name in names) else []
    sgd = calibrate(protocol.problem, folder)
    if not arguments.resume:
        twins = (folder / protocol.problem).glob("*/as-*.jsonl")
        for path in [*(file_of(run, folder) for run in [*tuning, *finals]), *twins]:
            path.unlink(missing_ok=True)
    todo = [run for run in tuning if not finished(run, folder)]
    seconds = [estimate(part, sgd, arguments.processes) for part in (todo, finals, extra)]
    console.print(
        f"{len(todo)} trials, about {seconds[0] / 60:.0f} min; {len(finals)} runs, at most {seconds[1] / 60:.0f} min; "
        f"{len(extra)} of a one-level form, {seconds[2] / 60:.0f} min. An SGD step takes {sgd[0] * 1e3:.0f} ms."
    )
    if arguments.estimate:
        return
    began = time.monotonic()

    def told(run: Run, end: Line) -> None:
        loss = training_loss(read_lines(file_of(run, folder)))
        passed = (time.monotonic() - began) / 60
        console.print(f"[{passed:5.1f} min] {run.method} {run.label} seed {run.seed}: {end['end']}, {loss:.4f}")

    run_all(tuning, folder, arguments.processes, told)
    settings = {name: protocol.chosen(name, folder) for name in names}
    runs = {name: protocol.finals(name, chosen) for name, chosen in settings.items() if chosen is not None}
    # Seed by seed, so that what a busy machine does to the times falls on all methods alike.
    run_all([run for seed in zip(*runs.values(), strict=True) for run in seed], folder, arguments.processes, told)
    curves = collect(protocol, folder)
    best = best_two_level(curves)
    if best is not None:
        run_all(protocol.twin(best, curves.settings), folder, arguments.processes, told)
    curves = collect(protocol, folder)
    plot(curves, folder / "race.png", protocol.epochs, protocol.seconds)
    left_out = available(protocol.problem, list(METHODS))[1]
    arguments.output.write_text(page(curves, protocol, command(protocol), arguments.processes, left_out))
    console.print(f"written: {arguments.output} and {folder / 'race.png'}; {(time.monotonic() - began) / 60:.1f} min")


if __name__ == "__main__":
    main()
