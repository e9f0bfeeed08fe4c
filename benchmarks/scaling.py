"""How K-FAC scales: ``python -m benchmarks.scaling`` writes ``benchmarks/scaling.md`` in about three minutes.

Real runs of the MNIST autoencoder on 1, 2 and 4 processes of gloo on this machine, their step times beside the
forecast of ``kfac-dist plan --calibrate`` and their bytes against the formulas; then worlds of up to 1,024 ranks, of
which only the assignment is real.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from kfac_dist import DistributionConfig, KFACPreconditioner
from kfac_dist.assignment import assign
from kfac_dist.balance import Phase, balance, makespan_lower_bound
from kfac_dist.costs import Forecast, Machine, Method, forecast, inversions, preconditioning, strategies, traffic
from kfac_dist.launch.calibrate import calibrate
from kfac_dist.networks import Network, linear, networks
from kfac_dist.study import Autoencoder
from kfac_dist.study.mnist import mnist_digits

BATCH, CYCLE, CYCLES = 256, 5, 4
WIDTHS = (784, 1000, 500, 250, 30)
METHOD = Method(factor_every=CYCLE, inverse_every=CYCLE, by_rows=True)
STRATEGIES = ("comm_opt", "mem_opt")
WORLDS = (2, 3, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024)
NAMES = ("resnet50", "vit_b_16", "gpt2_small", "bert_large")
ACCELERATOR = Machine.from_rates(1e13, 1e10)


def autoencoder() -> Network:
    """The net of the real runs, as a layer list."""
    sizes = (*WIDTHS, *WIDTHS[-2::-1])
    layers = tuple(linear(f"{i}", a, g) for i, (a, g) in enumerate(itertools.pairwise(sizes)))
    return Network("MNIST autoencoder", layers, batch=BATCH)


# -- real runs --------------------------------------------------------------------------------------------------------


def preconditioners(nets: dict[str, nn.Module]) -> dict[str, KFACPreconditioner]:
    """One for each strategy; they average the gradients themselves."""
    return {
        name: KFACPreconditioner(
            nets[name],
            likelihood="bernoulli",
            damping=0.3,
            kl_clip=0.03,
            factor_every_n_steps=CYCLE,
            inverse_every_n_steps=CYCLE,
            distribution=DistributionConfig(strategy=name, average_gradients=True),  # type: ignore[arg-type]
        )
        for name in STRATEGIES
    }


def train(rank: int, ranks: int, store: str, answer: str) -> None:
    """SGD and both strategies take turns, step by step; rank 0 writes seconds, bytes and formulas down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    images = mnist_digits()[0][0]
    nets: dict[str, nn.Module] = {}
    for name in ("sgd", *STRATEGIES):
        torch.manual_seed(0)
        nets[name] = Autoencoder().net
    kfacs = preconditioners(nets)
    seconds: dict[str, dict[str, list[float]]] = {name: {"plain": [], "update": []} for name in nets}
    counted: dict[str, dict[str, float]] = {name: {} for name in STRATEGIES}
    for step in range(CYCLE * (CYCLES + 1)):
        start = ((step * ranks + rank) * BATCH) % (len(images) - BATCH)
        x = images[start : start + BATCH]
        for name, net in nets.items():
            dist.barrier()
            elapsed = -time.perf_counter()
            advance(net, x, kfacs.get(name), ranks)
            elapsed += time.perf_counter()
            if step >= CYCLE:  # the first cycle warms up
                seconds[name]["plain" if step % CYCLE else "update"].append(elapsed)
        for name, kfac in kfacs.items():
            phases = ("factors", "inverses", "directions")
            counted[name] |= {p: kfac.metrics[f"bytes/{p}"] for p in phases if f"bytes/{p}" in kfac.metrics}
    formulas = {
        name: {phase: size for phase, (_, size) in traffic(kfac.assignment, METHOD, rank).items()}
        for name, kfac in kfacs.items()
    }
    for kfac in kfacs.values():
        kfac.close()
    if rank == 0:
        Path(answer).write_text(json.dumps({"seconds": seconds, "counted": counted, "formulas": formulas}))
    dist.barrier()
    dist.destroy_process_group()


def advance(net: nn.Module, x: torch.Tensor, kfac: KFACPreconditioner | None, ranks: int) -> None:
    """One training step."""
    net.zero_grad()
    logits = net(x)
    if kfac is not None:
        kfac.accumulate()
    (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)).backward()
    if kfac is not None:
        kfac.step(lr=1.0)
    elif ranks > 1:
        dist.all_reduce(torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.003 * parameter.grad  # type: ignore[operator]


def real(ranks: int) -> dict[str, Any]:
    """What rank 0 of a run on so many processes wrote down."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, str(Path(folder, "store")), str(Path(folder, "answer")))
        mp.start_processes(train, arguments, nprocs=ranks, start_method="spawn")
        return json.loads(Path(arguments[-1]).read_text())


def real_runs(machine: Machine, sizes: tuple[int, ...]) -> Iterator[str]:
    """The rows of the real runs."""
    cores = os.cpu_count() or 1
    for ranks in sizes:
        answer = real(ranks)
        # More processes than cores take turns on them.
        share = min(1.0, cores / ranks)
        rates = replace(machine, **{r: getattr(machine, r) * share for r in ("gemm", "cholesky", "eigh", "memory")})
        sgd = statistics.median(answer["seconds"]["sgd"]["plain"] + answer["seconds"]["sgd"]["update"])
        for name in STRATEGIES:
            plan = forecast(autoencoder(), METHOD, rates, ranks, ranks if name == "comm_opt" else 1)
            plain, update = (statistics.median(answer["seconds"][name][kind]) for kind in ("plain", "update"))
            average = (update + (CYCLE - 1) * plain) / CYCLE
            counted, formulas = answer["counted"][name], answer["formulas"][name]
            sent = ", ".join(f"{phase} {size:,.0f}" for phase, size in counted.items()) or "nothing"
            check = "equal" if counted == formulas else f"NOT {formulas}"
            yield (
                f"| {ranks} | {name} | {1e3 * sgd:.0f} | {1e3 * plain:.0f} | {1e3 * update:.0f} | "
                f"{1e3 * average:.0f} | {average / sgd:.2f} | {1e3 * plan.sgd:.0f} | {1e3 * plan.step:.0f} | "
                f"{plan.sgd / sgd:.2f} | {plan.step / average:.2f} | {sent} | {check} |"
            )


# -- large worlds -----------------------------------------------------------------------------------------------------


def balance_rows() -> Iterator[str]:
    """Makespans over their lower bounds."""
    for name in NAMES:
        costs = networks[name]().costs
        for every in (10, 100):
            worlds = {ranks: (assign(costs, ranks, ranks, every), assign(costs, ranks, 1, every)) for ranks in WORLDS}
            for label, kind, ratio in (
                ("inversions, comm_opt", 0, inversions),
                ("inversions, mem_opt", 1, inversions),
                ("preconditioning, mem_opt", 1, preconditioning),
            ):
                cells = " | ".join(_mark(ratio(worlds[ranks][kind]).ratio) for ranks in WORLDS)
                yield f"| {networks[name]().name} | {every} | {label} | {cells} |"
        for label, jobs in (
            ("inversions, mem_opt, alone", [sum(map(cost.inversion, cost.blocks())) for cost in costs]),
            ("preconditioning, mem_opt, alone", [cost.preconditioning() for cost in costs]),
        ):
            cells = " | ".join(_mark(_alone(jobs, ranks)) for ranks in WORLDS)
            yield f"| {networks[name]().name} | | {label} | {cells} |"


def _alone(jobs: Sequence[float], ranks: int) -> float:
    """Makespan over lower bound where there is no other phase."""
    loads = [0.0] * ranks
    for job, rank in zip(jobs, balance([Phase(jobs)], ranks), strict=True):
        loads[rank] += job
    return max(loads) / makespan_lower_bound(jobs, ranks)


def _mark(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio > 1.10 else f"{ratio:.2f}"


def traffic_rows() -> Iterator[str]:
    """Megabytes of one rank, phase by phase."""
    for name in NAMES:
        network = networks[name]()
        for label in STRATEGIES:
            for phase in ("factors", "inverses", "directions"):
                cells = []
                for ranks in (2, 8, 64, 1024):
                    assignment = assign(network.costs, ranks, ranks if label == "comm_opt" else 1, 100)
                    count, size = traffic(assignment, Method()).get(phase, (0, 0))
                    cells.append(f"{count} x {size / 1e6:.2f}" if count else "-")
                if set(cells) != {"-"}:
                    yield f"| {network.name} | {label} | {phase} | " + " | ".join(cells) + " |"


def divided(plan: Forecast, machine: Machine) -> float:
    """Seconds of a step whose layers are preconditioned in slices of rows by all ranks, and factors go to owners only.

    A rank computes (G^-1)[rows] X A^-1 for its share of the rows of every layer, and the directions travel as under
    mem_opt. Factors are reduced to the ranks that invert them, which is half of an all-reduce.
    """
    ranks, phases = plan.assignment.world_size, dict(plan.phases)
    work = plan.preconditioning
    phases["precondition"] *= work.total / ranks / work.longest
    phases["directions"] = machine.collective(4 * sum(c.input_dim * c.output_dim for c in plan.assignment.costs), ranks)
    if "factors" in plan.traffic:
        phases["factors"] -= machine.collective(plan.traffic["factors"][1], ranks) / 2
    return plan.sgd + sum(seconds / plan.every[phase] for phase, seconds in phases.items())


def step_rows() -> Iterator[str]:
    """Forecast step times over plain SGD."""
    for name in NAMES:
        network = networks[name]()
        for ranks in (1, 8, 64, 1024):
            found = strategies(network, Method(), ACCELERATOR, ranks)
            cells = [f"{plan.step / plan.sgd:.2f}" for plan in found.values()]
            best = found["best"]
            cells[-1] += f" (W = {best.assignment.gradient_workers})"
            cells += [f"{1e3 * best.sgd:.0f}", f"{divided(found['mem_opt'], ACCELERATOR) / best.sgd:.2f}"]
            yield f"| {network.name} | {ranks} | " + " | ".join(cells) + " |"


def limit_rows() -> Iterator[str]:
    """The number of ranks beyond which a phase takes as long as its largest job."""
    for name in NAMES:
        network = networks[name]()
        whole = assign(network.costs, 1, 1, 100)
        layers, work = inversions(whole), preconditioning(whole)
        largest, side, layer = max((c.inversion(s), s, c.name) for c in network.costs for s in c.blocks())
        heaviest, dear = max((c.preconditioning(), c.name) for c in network.costs)
        yield (
            f"| {network.name} | {layers.total / largest:.1f} | {side} of {layer} | {work.total / heaviest:.1f} | "
            f"{dear} |"
        )


TIES = """
"alone" is an assignment for that phase only. Under mem_opt the rank that preconditions a layer inverts both of its
factors, so one assignment has to be near two bounds at once, which it cannot where a layer is dear in one phase and
cheap in the other: a table of tokens (GPT-2's output, BERT's embedding) costs as much to precondition as three
perceptron layers and next to nothing to invert. GPT-2 on 24 ranks: an assignment within 1.10 of the inversions' bound
gives each rank one of the 24 perceptron layers, so that the table shares a rank with one of them, at 1.31 of the other
bound. comm_opt has no such ties."""

TEXT = """
## Where plain K-FAC stops

- **Inversions** take no less time on more ranks than total / largest in the table above: from there on one rank
  inverts the largest factor and the others wait. What goes further divides the factor (`max_factor_dim`: a block costs
  the cube of its order, so two halves a quarter) or the time (`inverse_schedule="staggered"`), not the list of factors.
- **Preconditioning** does not scale under comm_opt, where every rank does all of it at every step, and up to the number
  in the table under mem_opt. A network of equal layers scales to their number.
- **Bytes** of a rank are those of all factors and, under mem_opt, of all directions, whatever the number of ranks: one
  collective per phase, of a size that only grows by two checksums a rank. With the same batch per rank the ratio to
  SGD thus stays, and with the same global batch (the work of a rank falls as 1 / P) it grows without a bound.
- **The next design**, in the last column of the table of step times: all ranks precondition a slice of the rows of
  every layer, (G^-1)[rows] X A^-1, which falls as 1 / P and sends what mem_opt sends; and factors are reduced to the
  ranks that invert them only, which is half of an all-reduce. It needs the inverses everywhere, as comm_opt does.
"""


def main() -> None:
    """Measure, forecast, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="sizes of the real runs (1 2 4)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("scaling.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = calibrate()
    head = " | ".join(map(str, WORLDS))
    lines = [
        "# Scaling\n",
        f"`python -m benchmarks.scaling` on {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, "
        "gloo, one thread per process.\n",
        "## Real runs\n",
        f"The MNIST autoencoder, batch {BATCH} per rank, factors and inverses every {CYCLE} steps; medians, in ms, of "
        "steps that take turns with SGD's. The forecast is that of `kfac-dist plan --calibrate`, which measured "
        f"{machine.gemm / 1e9:.0f} GF/s of products, {machine.cholesky / 1e9:.1f} G of n^3/s of Cholesky inverses, "
        f"{machine.memory / 1e9:.1f} GB/s of memory, {machine.bandwidth / 1e9:.2f} GB/s and "
        f"{machine.latency * 1e6:.0f} us of an all-reduce between two processes; with more processes than cores, its "
        "rates are divided.\n",
        "| ranks | strategy | SGD | plain step | update step | average | ratio | forecast SGD | forecast average | "
        "forecast / measured SGD | forecast / measured average | bytes per collective | against the formulas |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *real_runs(machine, tuple(arguments.ranks)),
        "\n## Large worlds: balance\n",
        "Makespan over its lower bound; above 1.10 in bold. Columns are numbers of ranks; the second column is the "
        "number of steps between inversions.\n",
        f"| network | every | phase | {head} |",
        "|---|---|---|" + "---|" * len(WORLDS),
        *balance_rows(),
        TIES,
        "\n## Large worlds: bytes\n",
        'Collectives and MB of one rank on a step on which the phase takes place; "inverses" of the first column\'s.\n',
        "| network | strategy | phase | 2 ranks | 8 | 64 | 1024 |",
        "|---|---|---|---|---|---|---|",
        *traffic_rows(),
        "\n## Large worlds: forecast step times\n",
        f"Over plain SGD at the same batch per rank, factors every 10 steps and inverses every 100, on ranks of "
        f"{ACCELERATOR.gemm:.0e} flops/s and {ACCELERATOR.bandwidth:.0e} B/s; nothing overlaps.\n",
        "| network | ranks | comm_opt | mem_opt | best | SGD ms | next design |",
        "|---|---|---|---|---|---|---|",
        *step_rows(),
        "\n## Large worlds: limits\n",
        "| network | inversions scale to | largest factor | preconditioning scales to | dearest layer |",
        "|---|---|---|---|---|",
        *limit_rows(),
        TEXT,
    ]
    arguments.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
