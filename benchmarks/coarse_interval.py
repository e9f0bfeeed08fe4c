"""Loss and step time against the coarse level's interval and samples: ``python -m benchmarks.coarse_interval``.

Every variant trains its own copies of the MNIST autoencoder, one a seed, as configs/mnist_autoencoder_two_level.yaml
does, on the same batches; they take turns step by step, so that what disturbs the machine disturbs all of them. Between
solves a layer keeps the coefficients of the last solve (its step size and its momentum). Writes
``benchmarks/coarse_interval.md``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.page import machine, table
from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.study import Autoencoder
from kfac_dist.study.mnist import mnist_digits

BATCH, CYCLE, WARM = 256, 10, 20  # a cycle of curvature updates; the damping's trials are at each of the first steps
INTERVALS, SAMPLES = (1, 2, 5, 10), (32, 64, 128, 256)
HEAD = ("every_n_steps", "max_samples", "training loss", "held-out loss", "step, ms", "of the first line's")
Chosen = Sequence[tuple[int, int]]


def loss_of(logits: Tensor, images: Tensor) -> Tensor:
    """The summed cross-entropy of an image, mean over images."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


@dataclass
class Variant:
    """One copy of the net, its preconditioner and what was measured of it."""

    net: nn.Module
    every: int
    samples: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        coarse = CoarseConfig(
            space="layer_step_momentum", every_n_steps=self.every, max_samples=self.samples, damping="adaptive"
        )
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1.0)
        self.kfac = KFACPreconditioner(
            self.net,
            likelihood="bernoulli",
            damping=0.01,
            kl_clip=3.0,
            factor_every_n_steps=CYCLE,
            inverse_every_n_steps=CYCLE,
            coarse=coarse,
        )

    def step(self, images: Tensor) -> None:
        """Train on one batch."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.net(images)
        self.kfac.accumulate()
        loss = loss_of(logits, images)
        loss.backward()
        self.kfac.step(lr=self.optimizer, closure=lambda: loss_of(self.net(images), images))
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(float(loss.detach()) / images[0].numel())

    def milliseconds(self) -> float:
        """Mean over a cycle of the median step at each of its places, after the first steps."""
        places = [self.seconds[WARM + place :: CYCLE] for place in range(CYCLE)]
        return 1e3 * statistics.mean(statistics.median(each) for each in places)


@dataclass(frozen=True)
class Outcome:
    """Losses per pixel, inside and outside of the training data, and what a step took."""

    inside: float
    outside: float
    milliseconds: float


def train(chosen: Chosen, widths: Sequence[int], epochs: int, seed: int) -> list[Outcome]:
    """Train all variants in turns, from the same weights and on the same batches."""
    (images, _), (held_out, _) = mnist_digits()
    torch.manual_seed(seed)
    base = Autoencoder(widths=tuple(widths)).net
    variants = [Variant(copy.deepcopy(base), every, samples) for every, samples in chosen]
    steps = len(images) // BATCH
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for step in range(steps):
            batch = images[order[step * BATCH :][:BATCH]]
            for variant in variants:
                variant.step(batch)
    found = []
    for variant in variants:
        with torch.no_grad():
            outside = float(loss_of(variant.net(held_out), held_out)) / held_out[0].numel()
        found.append(Outcome(statistics.mean(variant.losses[-steps:]), outside, variant.milliseconds()))
    return found


def over_seeds(losses: Sequence[float]) -> str:
    """Median and range."""
    spread = f" ({min(losses):.4f}-{max(losses):.4f})" if len(losses) > 1 else ""
    return f"{statistics.median(losses):.4f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train in turns, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coarse_interval", description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the weights and of the order")
    parser.add_argument("--grid", action="store_true", help="all pairs of interval and samples, not the two lines")
    parser.add_argument("--smoke", action="store_true", help="a small net for two epochs, only to see that it runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("coarse_interval.md"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    widths = (784, 20, 5) if arguments.smoke else (784, 1000, 500, 250, 30)
    epochs = 2 if arguments.smoke else arguments.epochs
    most = max(SAMPLES)
    pairs = [(every, samples) for samples in reversed(SAMPLES) for every in INTERVALS]
    chosen = [(e, s) for e, s in pairs if arguments.grid or e == 1 or s == most]
    trained = [train(chosen, widths, epochs, seed) for seed in arguments.seeds]
    rows = []
    for number, (every, samples) in enumerate(chosen):
        ms = statistics.median(each[number].milliseconds for each in trained)
        ratio = statistics.median(each[number].milliseconds / each[0].milliseconds for each in trained)
        inside, outside = ([getattr(each[number], kind) for each in trained] for kind in ("inside", "outside"))
        rows.append((str(every), str(samples), over_seeds(inside), over_seeds(outside), f"{ms:.1f}", f"{ratio:.2f}"))
    seeds = ", ".join(map(str, arguments.seeds))
    text = (
        "# The coarse level's interval and samples\n\n"
        "`python -m benchmarks.coarse_interval`: layer_step_momentum with adaptive damping on the MNIST autoencoder, "
        f"as in configs/mnist_autoencoder_two_level.yaml; {epochs} epochs, batch {BATCH}, seeds {seeds}, threads: "
        f"{arguments.threads}. Medians over the seeds, ranges in parentheses. Loss: binary cross-entropy per pixel "
        "(nats), mean over the last epoch, and on the held-out digits after it. Step: interleaved, mean over a cycle "
        f"of ten with one update of factors and inverses. {machine()}.\n\n{table(HEAD, rows)}"
    )
    arguments.output.write_text(text)
    Console(highlight=False, soft_wrap=True).print(text)


if __name__ == "__main__":
    main()
