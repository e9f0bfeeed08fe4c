"""CURVES, generated: images of random cubic Bezier curves, the synthetic problem of the autoencoder literature.

Hinton & Salakhutdinov (2006) and Martens (2010) train on 28 x 28 images of curves through random points. Their file is
not ours to ship, so curves of the same kind are drawn here, from a seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.study.in_memory import InMemoryDataModule, Split

SIDE = 28
"""Pixels along one side of an image."""
SEGMENTS = 16
"""Straight pieces that stand for one curve; more do not change an image visibly."""
HALF_WIDTH = 0.75
"""Half the width of the pen, in pixels."""


def control_points(count: int, seed: int) -> Tensor:
    """Four control points per curve, uniform in the inner 80 % of the image.

    Returns:
        (count, 4, 2) in pixels, the last dimension as (x, y).
    """
    points = torch.rand(count, 4, 2, generator=torch.Generator().manual_seed(seed))
    return (0.1 + 0.8 * points) * SIDE


def draw_curves(points: Tensor, chunk: int = 256) -> Tensor:
    """Rasterise cubic Bezier curves with a round pen; a pixel's value is the pen's cover of it.

    Args:
        points: (N, 4, 2) control points in pixels, (x, y).
        chunk: curves drawn at a time; bounds the memory to ``chunk * SEGMENTS * 784`` numbers per intermediate.

    Returns:
        (N, 784) float32 in [0, 1], row by row from the top.
    """
    t = torch.linspace(0, 1, SEGMENTS + 1)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])  # (4, S + 1)
    centres = torch.arange(SIDE) + 0.5
    images = []
    for part in points.split(chunk):
        knots = torch.einsum("ks,nkc->nsc", bernstein, part)  # (n, S + 1, 2)
        start, piece = knots[:, :-1], knots[:, 1:] - knots[:, :-1]
        offset = centres - start[..., None]  # (n, S, 2, 28): pixel centre minus start, along x and along y
        x, y = offset[:, :, 0, None, :], offset[:, :, 1, :, None]
        dx, dy = piece[..., 0, None, None], piece[..., 1, None, None]
        along = ((x * dx + y * dy) / (dx**2 + dy**2).clamp_min(1e-12)).clamp(0, 1)  # (n, S, 28, 28)
        distance = ((x - along * dx) ** 2 + (y - along * dy) ** 2).amin(1).sqrt()
        images.append((0.5 + HALF_WIDTH - distance).clamp(0, 1).flatten(1))
    return torch.cat(images)


class Curves(InMemoryDataModule):
    """Generated curves as batches (images (B, 784) in [0, 1],).

    Args:
        batch_size: samples per batch and process.
        seed: of the control points.
        train_samples: curves to train on.
        val_samples: curves held out.

    Raises:
        ValueError: a number of samples below 1.
    """

    def __init__(
        self, batch_size: int = 256, seed: int = 0, train_samples: int = 20_000, val_samples: int = 2_000
    ) -> None:
        super().__init__(batch_size, seed)
        if min(train_samples, val_samples) < 1:
            raise ValueError(f"train_samples={train_samples}, val_samples={val_samples}: both must be at least 1")
        self.train_samples = train_samples
        self.val_samples = val_samples

    def load(self) -> tuple[Split, Split]:
        """Draw all curves; the held-out ones follow the training ones in the same random stream."""
        images = draw_curves(control_points(self.train_samples + self.val_samples, self.seed))
        return (images[: self.train_samples],), (images[self.train_samples :],)
