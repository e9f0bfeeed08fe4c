"""Is the training loss the negative log-likelihood that targets are sampled from? Its first output gradients tell."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kfac_dist.config import KFACConfig


class LossCheck:
    """Compares the training's output gradients with the sampled ones of the same batch, once, and warns.

    Args:
        config: the method's configuration.
        rank: this process's rank; only rank 0 warns.
    """

    def __init__(self, config: KFACConfig, rank: int) -> None:
        self.done = False
        self._config = config
        self._rank = rank
        self._training: tuple[Tensor, float] | None = None
        self._sampled: Tensor | None = None
        self._sums: Tensor | None = None

    def begin(self) -> None:
        """A batch that is to be compared."""
        self._training = self._sampled = self._sums = None

    def add_sampled(self, cotangent: Tensor, weight: float) -> None:
        """One draw of the sampled gradients, with its share of the expectation."""
        square = cotangent.double().square().sum() * weight
        self._sampled = square if self._sampled is None else self._sampled + square

    def watch_training(self, output: Tensor, factor: float) -> None:
        """Take the gradient that the training's backward is to bring to ``output``.

        ``factor`` makes of it that of the samples' negative log-likelihoods, as ``loss_reduction`` says.
        """

        def remember(gradient: Tensor) -> None:
            if self._training is None:
                self._training = gradient.detach().double().square().sum(), factor
            if self._config.likelihood == "categorical":
                self._sums = sums_to_zero(gradient.detach())

        output.register_hook(remember)

    def report(self, grad_scale: float) -> None:
        """Warn, the first time that both are known, where they are not gradients of one loss.

        Args:
            grad_scale: what a gradient scaler multiplied the training loss by.
        """
        if self.done or self._training is None or self._sampled is None:
            return
        square, factor = self._training
        if not bool(square.isfinite()):  # a gradient scaler that still searches for its scale
            return
        self.done = True
        training = float(square) ** 0.5 * factor / grad_scale
        sampled = float(self._sampled) ** 0.5
        ratio = training / sampled if sampled > 0 else float("nan")
        if self._other_class_dim():
            return
        if self._rank == 0 and not 0.1 <= ratio <= 10.0 and ratio == ratio:
            warnings.warn(
                f"the output gradients of the training loss are {ratio:.3g} times those of the sampled "
                f"{self._config.likelihood} loss after loss_reduction={self._config.loss_reduction!r}: damping and the "
                "step sizes of the coarse level depend on that scale. Sum the loss over outputs and average it over "
                'samples, or state its form, such as loss_reduction="mean_all" for nn.MSELoss()',
                stacklevel=3,
            )

    def _other_class_dim(self) -> bool:
        """Whether the training loss's classes lie in another dimension of the logits than ours (and say so)."""
        sums = [] if self._sums is None else self._sums.tolist()
        class_dim = self._config.class_dim % max(len(sums), 1)
        others = [dim for dim in range(1, len(sums)) if sums[dim] < 0.1 * sums[class_dim]]
        if not others or sums[class_dim] < 0.02:  # in bfloat16 a sum that is zero is one of 0.002
            return False
        if self._rank == 0:
            warnings.warn(
                f"the gradient of the training loss sums to zero along dimension {others[-1]} of the {len(sums)} of "
                "the logits, as that of a cross-entropy does along the classes, and not along class_dim="
                f"{self._config.class_dim}: set class_dim={others[-1]}",
                stacklevel=4,
            )
        return True


def sums_to_zero(gradient: Tensor) -> Tensor:
    """Norm of the sums along each dimension, over that of the sums of absolute values; 0 where there is nothing."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    sizes = torch.stack([g.abs().sum(dim).norm() for dim in range(g.dim())])
    return torch.stack([g.sum(dim).norm() for dim in range(g.dim())]) / sizes.clamp_min(torch.finfo(g.dtype).tiny)
