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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.race_page import Curves, best_two_level, page, plot, training_loss
from benchmarks.training_run import ROOT
from kfac_dist.study.methods import METHODS, method
from kfac_dist.study.run import Line, Run
from kfac_dist.study.runner import available, calibrate, estimate, file_of, finished, make_run, read_lines, run_all
from kfac_dist.study.search import trials
from kfac_dist.study.suite import PROBLEMS

TUNING_SEED = 100


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every method gets.

    Attributes:
        problem: name of the problem.
        trials: points of the search space.
        tuning_epochs: length of a trial.
        seeds: of the runs with the chosen settings.
        epochs: their length; they go on until ``seconds`` are over, too.
        seconds: of training.
        marks: seconds at which losses are compared.
    """

    problem: str
    trials: int
    tuning_epochs: int
    seeds: tuple[int, ...]
    epochs: int
    seconds: float
    marks: tuple[float, ...]

    def command(self) -> str:
        """How to call for this protocol; places of files are left out."""
        options = {"problem": self.problem, "trials": self.trials, "tuning-epochs": self.tuning_epochs}
        options |= {"seeds": " ".join(map(str, self.seeds)), "epochs": self.epochs, "seconds": f"{self.seconds:g}"}
        words = [f"--{name} {value}" for name, value in options.items()]
        return " ".join(["python -m benchmarks.race", *words, "--marks", *(f"{mark:g}" for mark in self.marks)])

    def evaluations(self) -> tuple[float, ...]:
        """Seconds at which the losses are evaluated: every twelfth of the time, and at the marks."""
        grid = [self.seconds * i / 12 for i in range(1, 13)] if self.seconds else []
        return tuple(sorted({*grid, *self.marks}))

    def tuning(self, name: str) -> list[Run]:
        """The trials of a method."""
        points = trials(method(name).space, self.trials)
        budget = {"seed": TUNING_SEED, "epochs": self.tuning_epochs}
        return [make_run(self.problem, name, p, label=f"trial-{i}", **budget) for i, p in enumerate(points)]

    def chosen(self, name: str, folder: Path) -> dict[str, float] | None:
        """The settings of the best trial; None where trials are missing."""
        runs = self.tuning(name)
        if not all(finished(run, folder) for run in runs):
            return None
        losses = [training_loss(read_lines(file_of(run, folder))) for run in runs]
        return trials(method(name).space, self.trials)[losses.index(min(losses))]

    def finals(self, name: str, settings: Mapping[str, float], label: str = "final") -> list[Run]:
        """The runs with the chosen settings."""
        budget = {"epochs": self.epochs, "seconds": self.seconds, "marks": self.evaluations()}
        return [make_run(self.problem, name, settings, seed=s, label=label, **budget) for s in self.seeds]


def twin(protocol: Protocol, name: str, folder: Path) -> list[Run]:
    """The one-level form of a two-level method at that method's settings.

    The fine level's settings are the two-level method's. The learning rate, which two levels do not have, and the clip,
    which bounds another thing where nothing has chosen the step, are its own chosen ones.
    """
    form = method(name).one_level or ""
    own, two = protocol.chosen(form, folder), protocol.chosen(name, folder)
    if own is None or two is None:
        return []
    shared = {key: value for key, value in two.items() if key in own and key != "kl_clip"}
    return protocol.finals(form, own | shared, label=f"as-{name}")


def read(runs: Sequence[Run], folder: Path) -> list[list[Line]]:
    """The lines of runs that are all finished, else nothing."""
    return [read_lines(file_of(r, folder)) for r in runs] if runs and all(finished(r, folder) for r in runs) else []


def collect(protocol: Protocol, folder: Path) -> Curves:
    """Every method whose runs are complete: its settings, and its lines per seed."""
    curves = Curves(problem=PROBLEMS[protocol.problem])
    for name in METHODS:
        settings = protocol.chosen(name, folder)
        lines = read(protocol.finals(name, settings), folder) if settings is not None else []
        if settings is not None and lines:
            curves.settings[name], curves.lines[name] = settings, lines
    best = best_two_level(curves)
    if best is not None:
        runs = twin(protocol, best, folder)
        curves.twin = (best, runs[0].settings, read(runs, folder)) if runs and read(runs, folder) else None
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
    names, missing = available(arguments.methods)
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
    best = best_two_level(collect(protocol, folder))
    if best is not None:
        run_all(twin(protocol, best, folder), folder, arguments.processes, told)
    curves = collect(protocol, folder)
    plot(curves, folder / "race.png", protocol.epochs, protocol.seconds)
    left_out = available(list(METHODS))[1]
    arguments.output.write_text(page(curves, protocol, arguments.processes, left_out))
    console.print(f"written: {arguments.output} and {folder / 'race.png'}; {(time.monotonic() - began) / 60:.1f} min")


if __name__ == "__main__":
    main()
