"""Bytes per rank, at rest and at the peak of a step, each method in fresh processes."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

from torch import Tensor, nn

from benchmarks.page import table
from benchmarks.steps import peer as kfac_pytorch
from benchmarks.steps.one_level import verdict
from benchmarks.steps.problems import Problem, Sizes, autoencoder
from benchmarks.steps.processes import on_ranks
from benchmarks.steps.ranks import STRATEGIES
from benchmarks.steps.runs import ONE_LEVEL, OurRun, PeerRun, Run
from kfac_dist import KFACPreconditioner

TARGET = 0.7
MIB = 2.0**20
OURS = {"inverse": "factored", "eigen": "eigen"}
"""Method of kfac-pytorch -> damping method of ours that holds the same."""


def live_bytes() -> int:
    """Of all tensors in the process, shared storages once."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident(what: str) -> int:
    """Bytes: "VmRSS", or "VmHWM", its peak since :func:`reset_peak`; elsewhere than on Linux the peak of all time."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    """Forget the peak so far."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def formula(kfac: KFACPreconditioner, rank: int) -> int:
    """Bytes of the factors, and of the inverses that the rank uses, from the layers' sizes alone."""
    rows = [row for row in kfac.summary().rows if row.factors]
    used = (row.inverse_bytes for row in rows if kfac.assignment.preconditions(row.name, rank))
    return sum(row.factor_bytes for row in rows) + sum(used)


def peer_formula(net: nn.Module, method: str) -> int:
    """Bytes of kfac-pytorch's two factors and inverses per layer; "eigen" holds 1 / (eigenvalues' products), too."""
    words = 0
    for layer in (layer for layer in net.modules() if isinstance(layer, nn.Linear)):
        a, g = layer.in_features + 1, layer.out_features
        words += 2 * (a * a + g * g) + (a * g if method == "eigen" else 0)
    return 4 * words


def measured(rank: int, sizes: Sizes, ranks: int, method: str, strategy: str, clone: Path | None) -> dict[str, int]:
    """Bytes above those of SGD: of all tensors between two steps, and at the peak of a block of steps.

    ``clone``: measure kfac-pytorch; None: this package.
    """
    parallel, share = ranks > 1, sizes.batch // ranks
    problem = autoencoder(sizes, share, rank * share)

    def build(name: str, problem: Problem) -> Run:
        if name == "SGD":
            return Run(name, problem, parallel=parallel)
        if clone:
            return PeerRun(name, problem, kfac_pytorch.load(clone), method, STRATEGIES[strategy], parallel)
        settings = {**ONE_LEVEL, "damping_method": OURS[method], "distribution": strategy}
        return OurRun(name, problem, settings, parallel=parallel)

    tensors, peaks, expected = {}, {}, 0
    # The small one loads whatever is loaded at the first use.
    for name, net in (("small", autoencoder(Sizes(widths=(49, 8, 4)), 8)), ("SGD", problem), ("K-FAC", problem)):
        run = build(name, net)
        reset_peak()
        for _ in range(run.schedule.block + 2):
            run.step()
        tensors[name], peaks[name] = live_bytes(), resident("VmHWM")
        if isinstance(run, OurRun):
            expected = formula(run.kfac, rank)
        elif isinstance(run, PeerRun):
            expected = peer_formula(run.net, method)
        del run
        gc.collect()
    return {
        "formula": expected,
        "steady": tensors["K-FAC"] - tensors["SGD"],
        "peak": peaks["K-FAC"] - peaks["SGD"],
    }


def section(sizes: Sizes, clone: Path | None) -> str:
    """All methods in processes of their own; the rank that needs most counts."""
    rows = []
    for ranks in (1, 2):
        for strategy in STRATEGIES if ranks > 1 else ("comm_opt",):
            for method, ours in OURS.items():
                found = {}
                for name, where in (("kfac_dist", None), ("kfac-pytorch", clone)):
                    if name == "kfac_dist" or clone:
                        each = on_ranks(measured, ranks, sizes, ranks, method, strategy, where)
                        found[name] = {what: max(rank[what] for rank in each) / MIB for what in each[0]}
                for name, bytes_ in found.items():
                    what = f"{name}, {ours if name == 'kfac_dist' else method}"
                    row = [what, str(ranks), strategy, *(f"{bytes_[key]:.1f}" for key in ("formula", "steady", "peak"))]
                    if name == "kfac_dist" and clone:
                        over = [bytes_[key] / found["kfac-pytorch"][key] for key in ("steady", "peak")]
                        row += [f"{over[0]:.2f}", f"{TARGET}", verdict(over[0], TARGET), f"{over[1]:.2f}"]
                    rows.append(row + [""] * (10 - len(row)))
    return "\n".join(
        [
            f"MNIST autoencoder, {sizes.batch} digits over all ranks, MiB above those of SGD on the rank that needs "
            "most. Formula: factors and inverses by the layers' sizes. Steady: all tensors between two steps. "
            "Peak: of the resident memory over steps with and without new curvature, over that of SGD's steps.\n",
            table(
                (
                    "",
                    "ranks",
                    "strategy",
                    "formula",
                    "steady",
                    "peak",
                    "steady over kfac-pytorch's",
                    "target",
                    "",
                    "peak over its",
                ),
                rows,
            ),
        ]
    )
