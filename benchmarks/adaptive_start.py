"""Does the adaptive coarse damping forget where it started? ``python -m benchmarks.adaptive_start``.

Learning-rate-free two-level K-FAC (``layer_step_momentum``) on the autoencoder and on a classifier of the same digits,
with the coarse damping started at .01, .3 and 10, and fixed at those values. Writes ``benchmarks/adaptive_start.md``.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.study import Autoencoder
from kfac_dist.study.mnist import mnist_digits

STARTS, BATCH, EPOCHS, EVERY = (0.01, 0.3, 10.0), 256, 10, 10


@dataclass(frozen=True)
class Problem:
    """A network with its likelihood, fine damping, clip, and what divides its loss in the table."""

    name: str
    likelihood: str
    damping: float
    kl_clip: float
    per: float

    def net(self) -> nn.Module:
        """The network, from the same weights every time."""
        torch.manual_seed(0)
        if self.likelihood == "bernoulli":
            return Autoencoder().net
        widths = (784, 500, 300, 100, 10)
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def loss(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The mean negative log-likelihood of a sample."""
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        return F.cross_entropy(logits, y)


PROBLEMS = (
    Problem("autoencoder, cross-entropy per pixel", "bernoulli", 0.01, 3.0, 784.0),
    Problem("classifier 784-500-300-100-10, cross-entropy", "categorical", 0.001, 0.3, 1.0),
)


def train(problem: Problem, adaptive: bool, damping: float) -> tuple[list[float], float]:
    """Training loss of every epoch, and the last coarse damping."""
    images, labels = mnist_digits()[0]
    net = problem.net()
    coarse = CoarseConfig(
        space="layer_step_momentum", damping="adaptive" if adaptive else damping, initial_damping=damping
    )
    kfac = KFACPreconditioner(
        net,
        likelihood=problem.likelihood,
        damping=problem.damping,
        kl_clip=problem.kl_clip,
        factor_every_n_steps=EVERY,
        inverse_every_n_steps=EVERY,
        coarse=coarse,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(EPOCHS):
        total = 0.0
        for index in torch.randperm(len(images), generator=order).split(BATCH):
            x, y = images[index], labels[index]
            optimizer.zero_grad()
            logits = net(x)
            kfac.accumulate()
            loss = problem.loss(logits, x, y)
            loss.backward()
            kfac.step(lr=optimizer, closure=lambda x=x, y=y: problem.loss(net(x), x, y))
            optimizer.step()
            total += float(loss.detach()) * len(index)
        losses.append(total / len(images) / problem.per)
    return losses, kfac.metrics["coarse/damping"]


def main() -> None:
    """Train from every start, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive_start", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("adaptive_start.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Where the adaptive coarse damping starts\n",
        f"`python -m benchmarks.adaptive_start`: training loss after 3, 5 and {EPOCHS} epochs of learning-rate-free "
        f"two-level K-FAC, 4,500 digits, batch {BATCH}, factors and inverses every {EVERY} steps, one seed.\n",
        "| problem | coarse damping | 3 | 5 | 10 | at the end |",
        "|---|---|---|---|---|---|",
    ]
    for problem in PROBLEMS:
        for adaptive in (True, False):
            for start in STARTS:
                losses, last = train(problem, adaptive, start)
                shown = [f"{loss:.4f}" if math.isfinite(loss) else "diverged" for loss in losses]
                kind = f"adaptive from {start:g}" if adaptive else f"fixed at {start:g}"
                cells = [problem.name, kind, shown[2], shown[4], shown[9], f"{last:.3g}"]
                lines.append("| " + " | ".join(cells) + " |")
                Console(highlight=False).print(lines[-1])
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
