"""Where the time of a step goes: by phase, and by kind of operation."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Mapping

from torch.profiler import ProfilerActivity, profile

from benchmarks.page import table
from benchmarks.steps.problems import Sizes, autoencoder, resnet20
from benchmarks.steps.runs import ONE_LEVEL, OurRun, race_settings

PHASES = ("capture", "factors", "inverses", "precondition", "coarse", "write")
OPERATIONS = {
    "matrix products": r"mm|matmul|addbmm|bmm|mv$|dot$|einsum|linear$",
    "convolutions": r"conv|mkldnn",
    "factorisations": r"cholesky|eigh|linalg_|triangular|inverse|potr",
    "copies": r"copy|clone|cat$|fill|zero|index|gather|scatter|im2col|unfold|stack|tril|triu",
}
"""Kind -> what its operators' names hold; anything else is elementwise, a reduction, or Python."""


def phases(run: OurRun, rounds: int) -> dict[str, list[float]]:
    """Kind of step -> median milliseconds of the phases, and of the rest: forward, backward and SGD."""
    found: dict[str, list[list[float]]] = {}
    for step in range(run.schedule.warm_up + run.schedule.block * rounds):
        if step % run.schedule.block == 0:
            run.begin()
        kind = run.kind()
        start = time.perf_counter()
        run.step()
        total = 1e3 * (time.perf_counter() - start)
        inside = [run.kfac.metrics.get(f"ms/{phase}", 0.0) for phase in PHASES]
        if step >= run.schedule.warm_up:
            found.setdefault(kind, []).append([total, total - sum(inside), *inside])
    return {kind: [statistics.median(column) for column in zip(*rows, strict=True)] for kind, rows in found.items()}


def operations(run: OurRun) -> dict[str, Mapping[str, float]]:
    """Kind of step -> kind of operation -> its share of the time; one block is looked at."""
    shares = {}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every start and stop otherwise
    run.begin()
    for _ in range(run.schedule.block):
        kind = run.kind()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            start = time.perf_counter()
            run.step()
            total = 1e6 * (time.perf_counter() - start)
        sums = dict.fromkeys(OPERATIONS, 0.0)
        for event in seen.key_averages():
            name = next((name for name, words in OPERATIONS.items() if re.search(words, event.key)), None)
            if name and event.key.startswith("aten::"):
                sums[name] += event.self_cpu_time_total
        shares[kind] = {name: value / total for name, value in sums.items()}
    return shares


def section(sizes: Sizes, rounds: int) -> str:
    """Both tables."""
    race = race_settings()
    small = autoencoder(sizes, sizes.batch)
    runs = [
        OurRun(f"one level, batch {sizes.batch}", small),
        OurRun("the same, eigen", small, {**ONE_LEVEL, "damping_method": "eigen"}),
        OurRun(f"two levels ({race.coarse.space})", small, race.fine, race.coarse, race.optimizer),
        OurRun("ResNet-20", resnet20(sizes)),
    ]
    times, kinds = [], []
    for run in runs:
        for kind, values in sorted(phases(run, rounds).items()):
            times.append([run.name, kind, *(f"{value:.1f}" if value else "" for value in values)])
        for kind, shares in sorted(operations(run).items()):
            rest = 1.0 - sum(shares.values())
            kinds.append([run.name, kind, *(f"{100 * share:.0f} %" for share in (*shares.values(), rest))])
    return "\n".join(
        [
            "Milliseconds of the phases; what hooks do within forward and backward is in their column:\n",
            table(("", "step", "whole step", "forward, backward, SGD", *PHASES), times),
            "Share of the operators' own time in the whole step, under the profiler:\n",
            table(("", "step", *OPERATIONS, "rest"), kinds),
        ]
    )
