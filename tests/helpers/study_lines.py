"""Lines of runs that never ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kfac_dist.study.protocol import Protocol
from kfac_dist.study.run import Line, Run
from kfac_dist.study.runner import file_of


def made(
    rate: float, end: str = "done", epochs: int = 10, epoch_seconds: float = 6.0, share: float = 1.0
) -> list[dict]:
    """A run whose loss is 1 / (1 + rate * epochs) after every epoch."""
    lines: list[dict] = [{"run": {}, "torch": "2"}, {"batch_size": 256, "samples": [4500, 500]}]
    for epoch in range(epochs + 1):
        loss, seconds = 1 / (1 + rate * epoch), epoch_seconds * epoch
        clock = {"step": 18 * epoch, "seconds": seconds, "cpu_seconds": share * seconds}
        lines += [{"epoch": epoch, **clock, "loss": loss, "val_loss": 2 * loss}]
    return [*lines, lines[-1] | {"end": end}]


def store(run: Run, lines: Sequence[Line], folder: Path) -> None:
    """As the file of a run that has finished."""
    path = file_of(run, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [{**lines[0], "run": run.header()}, *lines[1:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in written))


def store_method(
    protocol: Protocol,
    name: str,
    runs: Sequence[Sequence[Line]],
    folder: Path,
    trials: Sequence[Sequence[Line]] | None = None,
) -> Mapping[str, float]:
    """A method's trials, and its final runs in the order of the seeds; returns what the trials chose.

    Args:
        protocol: of the study.
        name: of the method.
        runs: their lines; fewer than seeds: the others have not finished.
        folder: of the files.
        trials: their lines; None: all are like the first run.
    """
    for i, run in enumerate(protocol.tuning(name)):
        store(run, trials[i] if trials else runs[0], folder)
    chosen = protocol.chosen(name, folder)
    assert chosen is not None
    for run, lines in zip(protocol.finals(name, chosen), runs, strict=False):
        store(run, lines, folder)
    return chosen
