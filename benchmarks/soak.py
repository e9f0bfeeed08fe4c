"""Thousands of steps on two ranks, watched: ``make soak`` or ``python -m benchmarks.soak``.

1. 12,000 steps in one process per rank: memory, file descriptors, threads, process groups, hooks.
2. 8,000 of these steps again with a checkpoint every 500, and ranks that are killed at uneven steps, also while they
   save, and resumed: the same losses and weights, bit by bit, as all checkpoints fall on curvature steps.
3. Preconditioners that are built, used and closed, one after another in one process per rank.
Writes ``benchmarks/soak.md``; the exit status is 1 where a bound is not kept.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import soak_rank
from benchmarks.soak_rank import CURVATURE, INVERSION, Part
from benchmarks.waiting import wait_until_ended

KILLS = (613, 1240, 2000, 2077, 3504, 5499, 6001, 7999)
"""Of 8,000 steps; 2,000 is in the middle of writing a checkpoint."""
REBUILDS, WARM = 40, 10


def run(job: str, part: Part) -> bool:
    """Both ranks of a part; whether they reached the end. Where one dies, so does the other.

    Raises:
        RuntimeError: a rank died that was not to be killed.
    """
    for stale in Path(part.folder).glob("store_*"):
        stale.unlink()
    # Fresh processes, forked from one that has imported everything and done nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.soak_rank"])
    processes = [context.Process(target=soak_rank.main, args=(rank, job, part)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        wait_until_ended(processes)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    if part.kill < 0 and codes != [0, 0]:
        logs = "\n".join(part.log(rank).read_text(errors="replace")[-3000:] for rank in range(2))
        raise RuntimeError(f"the ranks of {job} ended with {codes}\n{logs}")
    return codes == [0, 0]


def results(part: Part) -> list[dict[str, Any]]:
    """What the two ranks left."""
    return [torch.load(part.result(rank), weights_only=True) for rank in range(2)]


def killed_and_resumed(part: Part, kills: Sequence[int]) -> tuple[list[dict[str, Any]], list[int]]:
    """The results, and the steps that the run was resumed from."""
    resumed: list[int] = []
    for number, kill in enumerate((*kills, -1)):
        # A checkpoint is written by rank 0.
        victim = 0 if kill % part.save == 0 else number % 2
        reached = run("train", replace(part, kill=kill, victim=victim))
        if reached != (kill < 0):
            raise RuntimeError(f"the run was to be killed in step {kill} and was not")
        if kill >= 0:
            first = torch.load(part.checkpoint, weights_only=True)["step"] if part.checkpoint.exists() else 0
            part = replace(part, first=first)
            resumed.append(first)
    return results(part), resumed


def slope(steps: Sequence[int], sizes: Sequence[int]) -> float:
    """Bytes per step, by least squares."""
    x, y = torch.tensor(steps, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    x = x - x.mean()
    return float(x @ y / (x @ x))


@dataclass(frozen=True)
class Row:
    """One line of the table: what was found on the two ranks, and whether it may be so."""

    what: str
    found: str
    wanted: str
    kept: bool


def watched_rows(name: str, ends: Sequence[dict[str, Any]], start: int, bound: float, unit: str) -> list[Row]:
    """Memory and leaks, from sample number ``start`` on."""
    seen = [end["watched"] for end in ends]
    slopes = [slope(each["steps"][start:], each["resident"][start:]) for each in seen]
    sizes = [f"{each['resident'][start] / 2**20:.1f} to {each['resident'][-1] / 2**20:.1f}" for each in seen]
    since, limit = seen[0]["steps"][start], "" if bound == float("inf") else f"below {bound:.0f}"
    rows = [
        Row(f"{name}: resident MiB since {unit} {since}", "; ".join(sizes), "", True),
        Row(f"{name}: bytes per {unit}", "; ".join(f"{each:.0f}" for each in slopes), limit, max(slopes) < bound),
    ]
    for what in ("descriptors", "threads"):
        ranges = [(each[what][start], each[what][-1]) for each in seen]
        found = "; ".join(f"{first} to {last}" for first, last in ranges)
        rows.append(Row(f"{name}: {what}", found, "no more", all(last <= first for first, last in ranges)))
    groups = [(each["groups"][0], each["groups"][-1]) for each in seen]
    found = "; ".join(f"{first} to {last}" for first, last in groups)
    rows.append(Row(f"{name}: process groups", found, "as before", all(last == first for first, last in groups)))
    left = [each["hooks"][-1] for each in seen]
    rows.append(Row(f"{name}: hooks after close()", "; ".join(map(str, left)), "0", not any(left)))
    return rows


def resumed_rows(whole: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]], resumed: Sequence[int]) -> list[Row]:
    """The killed and resumed run against the undisturbed one, as far as it goes."""
    pairs = [(one["losses"][: len(other["losses"])], other["losses"]) for one, other in zip(whole, ends, strict=True)]
    worst = [float((one - other).abs().max()) for one, other in pairs]
    same = [
        all(torch.equal(one["marked"][name], value) for name, value in other["net"].items())
        for one, other in itertools.product(whole, ends)
    ]
    return [
        Row("resumed from the steps", ", ".join(map(str, resumed)), "", True),
        Row("resumed: largest difference of a loss", "; ".join(f"{each:g}" for each in worst), "0", max(worst) == 0.0),
        Row("resumed: weights at the end", "the same bits" if all(same) else "others", "the same bits", all(same)),
    ]


def table(rows: Sequence[Row], command: str, steps: int, seconds: float, metrics: dict[str, float]) -> str:
    """The page."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        "# Soak\n",
        f"`{command}` on {machine}, {versions}; {seconds / 60:.0f} minutes. Two gloo ranks, a convolution and two "
        f"linear layers, factors every {CURVATURE} steps, inverses every {INVERSION}, an adaptive coarse level, "
        f'"mem_opt". Values are those of rank 0; rank 1. Within {steps} steps there were '
        f"{metrics['factor_updates']:.0f} factor updates and {metrics['inverse_updates']:.0f} inversions; "
        f"{metrics['coarse/failures']:.0f} coarse solves failed.\n",
        "| what | found | wanted | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        verdict = "" if not row.wanted else "kept" if row.kept else "NOT KEPT"
        lines.append(f"| {row.what} | {row.found} | {row.wanted} | {verdict} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the three parts, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12000, help="undisturbed ones; two thirds of them are resumed")
    parser.add_argument("--kills", type=int, default=len(KILLS))
    parser.add_argument("--rebuilds", type=int, default=REBUILDS)
    parser.add_argument("--bound", type=float, default=1024.0, help="bytes per step")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("soak.md"))
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the ranks import torch
    begin, steps = time.monotonic(), arguments.steps
    unit = max(CURVATURE, steps // 24 // CURVATURE * CURVATURE)  # steps between checkpoints: 500 of 12,000
    shorter = 16 * unit
    kills = [kill * shorter // 8000 for kill in KILLS[: arguments.kills]]
    with tempfile.TemporaryDirectory() as folder:
        part = Part(
            first=0,
            last=steps,
            look=max(1, steps // 120),
            mark=shorter,
            patience=60.0 + 0.3 * steps,
            folder=folder,
        )
        run("train", part)
        whole = results(part)
        rows = watched_rows("undisturbed", whole, len(whole[0]["watched"]["steps"]) // 3, arguments.bound, "step")
        part = replace(part, last=shorter, mark=-1)
        ends, resumed = killed_and_resumed(replace(part, save=unit), kills)
        rows += resumed_rows(whole, ends, resumed)
        part = replace(part, last=arguments.rebuilds)
        run("rebuild", part)
        rows += watched_rows("rebuilt", results(part), min(WARM, arguments.rebuilds // 2), float("inf"), "time")
    command = f"python -m benchmarks.soak --steps {steps}"
    page = table(rows, command, steps, time.monotonic() - begin, whole[0]["metrics"])
    arguments.output.write_text(page)
    Console(highlight=False, soft_wrap=True).print(page)
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
