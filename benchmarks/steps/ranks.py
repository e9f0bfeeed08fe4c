"""One level on two gloo ranks, one thread each, against kfac-pytorch in the same processes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.page import table
from benchmarks.steps import peer as kfac_pytorch
from benchmarks.steps.one_level import CYCLES, shown, timings, verdict
from benchmarks.steps.problems import Sizes, autoencoder
from benchmarks.steps.processes import on_ranks
from benchmarks.steps.runs import ONE_LEVEL, OurRun, PeerRun, Run
from benchmarks.steps.timing import Schedule, Times, measure, ratio
from kfac_dist import DistributionConfig

RANKS, TARGET = 2, 0.6
STRATEGIES = {"comm_opt": 1.0, "mem_opt": 0.0}
"""Strategy -> kfac-pytorch's fraction of gradient workers."""
OWN_AVERAGE = {"preconditioning": "samples", "distribution": DistributionConfig(average_gradients=True)}
OURS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "comm_opt": ("comm_opt", {"distribution": "comm_opt"}, True),
    # Instead of gradients it averages directions, and has to do so by itself.
    "comm_opt, samples route": ("comm_opt", OWN_AVERAGE, False),
    "mem_opt": ("mem_opt", {"distribution": "mem_opt"}, True),
}
"""Row -> strategy of the rival, further settings, and whether DistributedDataParallel averages the gradients."""


def measured(rank: int, sizes: Sizes, rounds: int, clone: Path | None) -> dict[str, Any]:
    """One rank's times, and the schedules they belong to."""
    half = sizes.batch // RANKS
    problem = autoencoder(sizes, half, rank * half)
    timed: list[Run] = [Run("SGD", problem, parallel=True)]
    for name, (_, further, parallel) in OURS.items():
        timed.append(OurRun(f"one level, {name}", problem, {**ONE_LEVEL, **further}, parallel=parallel))
    if clone:
        preconditioner = kfac_pytorch.load(clone)
        for strategy, fraction in STRATEGIES.items():
            for method in kfac_pytorch.METHODS:
                name = f"kfac-pytorch, {method}, {strategy}"
                timed.append(PeerRun(name, problem, preconditioner, method, fraction, parallel=True))
    times = measure(timed, rounds, dist.barrier)
    return {name: {"schedule": asdict(each.schedule), "rounds": each.rounds} for name, each in times.items()}


def slowest(ranks: list[dict[str, Any]]) -> dict[str, Times]:
    """Every step takes as long as it does on the slowest rank."""
    times = {}
    for name, first in ranks[0].items():
        times[name] = Times(Schedule(**first["schedule"]))
        for rounds in zip(*(rank[name]["rounds"] for rank in ranks), strict=True):
            kinds = {
                kind: [max(step) for step in zip(*(each[kind] for each in rounds), strict=True)] for kind in rounds[0]
            }
            times[name].rounds.append(kinds)
    return times


def section(sizes: Sizes, rounds: int, clone: Path | None) -> str:
    """Run on both ranks, and write both tables."""
    times = slowest(on_ranks(measured, RANKS, sizes, rounds, clone))
    rows = [["SGD", f"{times['SGD'].of_kind('plain'):.1f}", "", "", "1"]]
    for name in times:
        if name != "SGD":
            rows += [[*timings(name, times, every), shown(ratio(times[name], times["SGD"], every))] for every in CYCLES]
    against = []
    for name, (strategy, _, _) in OURS.items():
        own = times[f"one level, {name}"]
        for every in CYCLES:
            rivals = {m: times.get(f"kfac-pytorch, {m}, {strategy}") for m in kfac_pytorch.METHODS}
            overs = {m: ratio(own, each, every) for m, each in rivals.items() if each}
            for method, over in overs.items():
                against.append([name, str(every), method, shown(over), f"{TARGET}", verdict(over.median, TARGET)])
            if not overs:
                against.append([name, str(every), "", "not measured", f"{TARGET}", ""])
    return "\n".join(
        [
            f"MNIST autoencoder under DistributedDataParallel, {RANKS} gloo ranks with one thread and "
            f"{sizes.batch // RANKS} digits each; a step's time is that of the slower rank.\n",
            table(("", "plain step, ms", "with new curvature, ms", "updates every", "over SGD (quartiles)"), rows),
            table(
                ("one level", "updates every", "against kfac-pytorch", "our time over its (quartiles)", "target", ""),
                against,
            ),
        ]
    )
