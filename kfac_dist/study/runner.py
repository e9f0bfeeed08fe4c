"""Many runs, each in a process of its own and with a file of its own; what is finished is not run again.

A file holds the run, then the lines of :func:`kfac_dist.study.run.train`, the last one with ``end``. A study that was
killed loses at most the runs in flight.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from kfac_dist import __version__
from kfac_dist.config import check_positive_int
from kfac_dist.machine import machine
from kfac_dist.study.in_memory import InMemoryDataModule
from kfac_dist.study.methods import method
from kfac_dist.study.run import Line, Run, check_device, obstacle, train
from kfac_dist.study.suite import PROBLEMS

START_SECONDS = 0.5
"""What a process takes before its run begins; for estimates only."""


CALIBRATION_SECONDS = 2.0


class RunFailedError(RuntimeError):
    """A run's process ended without the end of its run; the message holds its error."""


def file_of(run: Run, folder: Path) -> Path:
    """Where the run's lines are."""
    return folder / run.problem / run.method.replace(":", "-") / f"{run.label}-seed-{run.seed}.jsonl"


def read_lines(path: Path) -> list[Line]:
    """The complete lines of a run's file; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def finished_lines(run: Run, folder: Path) -> list[Line]:
    """The lines of this very run, with these settings and this budget, if it has ended; else none."""
    lines = read_lines(file_of(run, folder))
    if not lines or "end" not in lines[-1]:
        return []
    # What an older file does not know had its default.
    default = Run(problem=run.problem, method=run.method, epochs=1).header()
    return lines if default | lines[0]["run"] == json.loads(json.dumps(run.header())) else []


def finished(run: Run, folder: Path) -> bool:
    """Whether this very run, with these settings and this budget, has ended."""
    return bool(finished_lines(run, folder))


def execute(run: Run, data: InMemoryDataModule, path: Path) -> None:
    """Train, and write the lines to ``path`` as they come; an error goes to the file beside it and on."""
    torch.set_num_threads(run.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    path.unlink(missing_ok=True)  # a new file: the process of a study that was killed may still write to the old one
    try:
        with path.open("w", buffering=1) as file:
            header = {"run": run.header(), "torch": torch.__version__, "machine": machine(), "version": __version__}
            file.write(json.dumps(header) + "\n")
            for line in train(run, data):
                if "end" in line:
                    line["wall"] = time.perf_counter() - began
                file.write(json.dumps(line) + "\n")
    except BaseException:
        log.write_text(traceback.format_exc())
        raise


def run_all(
    runs: Sequence[Run],
    folder: Path,
    processes: int = 2,
    on_end: Callable[[Run, Line], None] = lambda run, end: None,
    timeout: float = 1800.0,
) -> None:
    """Run those that are not finished, in their order, ``processes`` at a time.

    Args:
        runs: what to run; an array task takes its share, such as ``runs[task::tasks]``.
        folder: of the files.
        processes: how many at a time.
        on_end: called with a run and its last line.
        timeout: seconds after which one run is given up.

    Raises:
        ValueError: this machine has not the device of a run.
        RunFailedError: a run's process failed or took too long; those in flight are ended.
    """
    check_positive_int("processes", processes)
    waiting = [run for run in runs if not finished(run, folder)]
    for device in {run.device for run in waiting}:
        check_device(device)
    data = {name: PROBLEMS[name].data() for name in sorted({run.problem for run in waiting})}
    for module in data.values():
        module.setup("fit")  # loaded once; the processes get a copy
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    flying: dict[ForkServerProcess, tuple[Run, float]] = {}
    try:
        while waiting or flying:
            while waiting and len(flying) < processes:
                run = waiting.pop(0)
                process = context.Process(target=execute, args=(run, data[run.problem], file_of(run, folder)))
                process.start()
                flying[process] = (run, time.monotonic() + timeout)
            wait([process.sentinel for process in flying], timeout=1.0)
            for process, (run, deadline) in list(flying.items()):
                if process.exitcode is None and time.monotonic() < deadline:
                    continue
                if process.exitcode != 0:
                    raise RunFailedError(failure(run, process.exitcode, folder, timeout))
                del flying[process]
                on_end(run, read_lines(file_of(run, folder))[-1])
    finally:
        for process in flying:
            process.kill()
            process.join()


def failure(run: Run, exitcode: int | None, folder: Path, timeout: float) -> str:
    """What happened to a run whose process did not end well."""
    late = f"took more than timeout={timeout:g} s: give it more time (--timeout MINUTES) or a smaller budget"
    what = late if exitcode is None else f"ended with status {exitcode}"
    log = file_of(run, folder).with_suffix(".log")
    return f"{run.method} ({run.label}, seed {run.seed}) {what}\n{log.read_text() if log.exists() else ''}"


def calibrate(problem: str, folder: Path, **where: Any) -> tuple[float, int, float]:
    """Seconds of a step of SGD, steps per epoch, and seconds of an evaluation of both splits: for estimates.

    It runs for a moment, always anew.

    Args:
        problem: its name.
        folder: of the runs.
        **where: device, threads and clock of the run.
    """
    settings = {"lr": 1e-4, "momentum": 0.0}
    run = Run(
        problem=problem, method="sgd", settings=settings, seconds=CALIBRATION_SECONDS, label="calibration", **where
    )
    file_of(run, folder).unlink(missing_ok=True)
    run_all([run], folder, processes=1)
    lines = read_lines(file_of(run, folder))
    end = lines[-1]
    share = end["cpu_seconds"] / end["seconds"] if run.clock == "cpu" else 1.0  # what others took counts for nothing
    return share * end["seconds"] / end["step"], lines[1]["steps_per_epoch"], share * lines[1]["evaluation"]


def estimate(runs: Sequence[Run], sgd: tuple[float, int, float], processes: int) -> float:
    """Seconds that ``runs`` will take, from what :func:`calibrate` measured and the methods' declared costs."""
    step, steps_per_epoch, evaluation = sgd
    total = 0.0
    for run in runs:
        epochs = run.epochs * steps_per_epoch * step * method(run.method).cost
        evaluations = 1 + run.epochs + len(run.marks)
        total += START_SECONDS + max(epochs, run.seconds) + evaluations * evaluation
    return total / processes


def available(problem: str, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Which of the methods can run on the problem here, and for the others why not.

    Raises:
        ValueError: a name that no method has.
    """
    reasons = {name: obstacle(problem, name) for name in names}
    return [n for n in names if reasons[n] is None], {n: why for n, why in reasons.items() if why is not None}


def make_run(problem: str, name: str, trial: Mapping[str, float], *, seed: int, label: str, **budget: object) -> Run:
    """A run of a method at one point of its search space, its fixed settings added."""
    run = Run(problem=problem, method=name, seed=seed, label=label, **budget)  # type: ignore[arg-type]
    return replace(run, settings={**method(name).fixed, **trial})
