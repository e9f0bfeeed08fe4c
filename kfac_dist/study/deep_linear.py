"""A deep linear network on generated data: a product of matrices, each one's best step depending on all the others.

The function is linear and the loss a sum of squares, so nothing but the layers' interaction makes the problem hard: the
case where a curvature of single layers should fall short most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_dist.study.in_memory import InMemoryDataModule, Split
from kfac_dist.study.problem import Problem


class DeepLinear(Problem):
    """``depth`` Linear layers and nothing between them; the loss is half the squared error.

    It is summed over the outputs and averaged over the samples, hence the mean negative log-likelihood of a sample with
    unit variance. Logs it per output as ``squared_error`` and ``val_squared_error``. The weights are Glorot's uniform
    ones: the products keep their size with the depth, and get ill-conditioned.

    Args:
        width: of every layer's input and output.
        depth: number of layers.
        lr: learning rate of the SGD that serves unless the command line or a configuration names an optimizer.
        momentum: of that SGD.

    Raises:
        ValueError: a width or a depth below 1.
    """

    def __init__(self, width: int = 20, depth: int = 20, lr: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__(lr, momentum)
        if min(width, depth) < 1:
            raise ValueError(f"width={width}, depth={depth}: both must be at least 1")
        self.net = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
        for layer in self.net:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        return self.net(x)

    def loss(self, batch: tuple[Tensor, Tensor], prefix: str) -> Tensor:
        """Loss of one batch (inputs, targets)."""
        x, y = batch
        loss = 0.5 * (self(x) - y).square().sum() / len(x)
        self.log_means({"squared_error": loss.detach() / y.shape[1]}, prefix, len(x))
        return loss


class PlantedLinear(InMemoryDataModule):
    """Gaussian inputs and a random linear map of them with noise, as batches (inputs (B, width), targets (B, width)).

    The map has independent entries of variance 1 / width: the targets have about unit variance. No network has a loss
    per output below noise^2 / 2, but for chance.

    Args:
        batch_size: samples per batch and process.
        seed: of the map, the inputs and the noise.
        width: of inputs and targets.
        noise: deviation of the noise.
        train_samples: to train on.
        val_samples: held out.

    Raises:
        ValueError: a size below 1, or a negative noise.
    """

    def __init__(
        self,
        batch_size: int = 256,
        seed: int = 0,
        width: int = 20,
        noise: float = 0.1,
        train_samples: int = 4_096,
        val_samples: int = 512,
    ) -> None:
        super().__init__(batch_size, seed)
        if min(width, train_samples, val_samples) < 1:
            raise ValueError(
                f"width={width}, train_samples={train_samples}, val_samples={val_samples}: all must be at least 1"
            )
        if noise < 0:
            raise ValueError(f"noise={noise} must be at least 0")
        self.width = width
        self.noise = noise
        self.train_samples = train_samples
        self.val_samples = val_samples

    def load(self) -> tuple[Split, Split]:
        """Both splits, from one random stream."""
        generator = torch.Generator().manual_seed(self.seed)
        W = torch.randn(self.width, self.width, generator=generator) / self.width**0.5
        x = torch.randn(self.train_samples + self.val_samples, self.width, generator=generator)
        y = x @ W.T + self.noise * torch.randn(x.shape, generator=generator)
        n = self.train_samples
        return (x[:n], y[:n]), (x[n:], y[n:])
