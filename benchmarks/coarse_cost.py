"""What the coarse level costs per step on the MNIST autoencoder: ``python -m benchmarks.coarse_cost``.

Every variant trains its own copy of the net on the same batches; they take turns step by step, so that what disturbs
the machine disturbs all of them. Reported: median seconds of a whole step (forward, backward, K-FAC) over those of
one-level K-FAC, for steps with new curvature and for the others, and over a whole cycle of ten.
Writes ``benchmarks/coarse_cost.md``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.study import Autoencoder
from kfac_dist.study.mnist import mnist_digits

CYCLE, BATCH = 10, 256
# Name -> (configuration, multiple of L that m is).
VARIANTS: dict[str, tuple[CoarseConfig | None, str]] = {
    "one level": (None, ""),
    "layer_step": (CoarseConfig(space="layer_step", damping=1.0), "L"),
    "layer_step, 256 samples": (CoarseConfig(space="layer_step", damping=1.0, max_samples=256), "L"),
    "nicolaides": (CoarseConfig(space="nicolaides"), "L"),
    "layer_step_momentum": (CoarseConfig(space="layer_step_momentum", damping=1.0), "2 L"),
    "layer_step_momentum, 256 samples": (
        CoarseConfig(space="layer_step_momentum", damping=1.0, max_samples=256),
        "2 L",
    ),
    "layer_step_residual": (CoarseConfig(space="layer_step_residual", damping=1.0), "2 L"),
    "spectral": (CoarseConfig(space="spectral", vectors_per_layer=8), "8 L"),
    "krylov": (CoarseConfig(space="krylov", vectors_per_layer=8), "8 L"),
    "pcg": (CoarseConfig(space="pcg", vectors_per_layer=8, damping=1.0), "8 L"),
}


def main() -> None:
    """Train in turns, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coarse_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("coarse_cost.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = mnist_digits()[0][0]
    torch.manual_seed(0)
    base = Autoencoder().net
    nets = {name: copy.deepcopy(base) for name in VARIANTS}
    kfacs = {
        name: KFACPreconditioner(
            nets[name],
            likelihood="bernoulli",
            damping=0.03,
            kl_clip=0.03,
            factor_every_n_steps=CYCLE,
            inverse_every_n_steps=CYCLE,
            coarse=coarse,
        )
        for name, (coarse, _) in VARIANTS.items()
    }
    seconds: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in VARIANTS}
    for step in range(CYCLE * (arguments.cycles + 1)):
        x = images[(step % CYCLE) * BATCH :][:BATCH]
        for name, net in nets.items():
            start = time.perf_counter()
            net.zero_grad()
            logits = net(x)
            kfacs[name].accumulate()
            (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)).backward()
            kfacs[name].step(lr=1.0)
            elapsed = time.perf_counter() - start
            if step >= CYCLE:  # the first cycle warms up
                seconds[name][step % CYCLE == 0].append(elapsed)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.03 * parameter.grad
    update = {name: statistics.median(each[True]) for name, each in seconds.items()}
    plain = {name: statistics.median(each[False]) for name, each in seconds.items()}
    cycle = {name: (update[name] + (CYCLE - 1) * plain[name]) / CYCLE for name in VARIANTS}
    lines = [
        "# Cost of the coarse level\n",
        f"`python -m benchmarks.coarse_cost`: a step of the MNIST autoencoder, batch {BATCH}, factors and inverses "
        f"every {CYCLE} steps, over the same of one-level K-FAC in the same interleaved run (medians; "
        f"{arguments.threads} thread, torch {torch.__version__}). One level takes {1e3 * cycle['one level']:.0f} ms.\n",
        "| space | m | B_c | step without new curvature | step with new curvature | average over a cycle |",
        "|---|---|---|---|---|---|",
    ]
    for name, (_, m) in VARIANTS.items():
        ratios = [value[name] / value["one level"] for value in (plain, update, cycle)]
        samples = f"{kfacs[name].metrics['coarse/samples']:.0f}" if m else ""
        lines.append(f"| {name} | {m} | {samples} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    arguments.output.write_text("\n".join(lines) + "\n")
    Console(highlight=False, soft_wrap=True).print("\n".join(lines))


if __name__ == "__main__":
    main()
