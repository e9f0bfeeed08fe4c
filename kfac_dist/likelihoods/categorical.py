"""Softmax outputs with cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_dist.likelihoods.base import Likelihood, likelihoods


@likelihoods.register("categorical")
class Categorical(Likelihood):
    """p(y = c) = softmax(logits)_c along ``class_dim``; one target for every other position."""

    not_logits = ("Softmax", "Softmax2d", "Softmin", "Sigmoid")

    def check(self, logits: Tensor) -> None:
        """See :meth:`Likelihood.check`."""
        super().check(logits)
        dims = logits.dim()
        if not -dims <= self.class_dim < dims or self.class_dim % dims == 0:
            raise ValueError(
                f"categorical logits of shape {tuple(logits.shape)} have no class dimension "
                f"class_dim={self.class_dim}: return (B, classes, ..) or set class_dim"
            )
        if logits.shape[self.class_dim] < 2:
            raise ValueError(
                f"categorical logits of shape {tuple(logits.shape)} have {logits.shape[self.class_dim]} class along "
                f'class_dim={self.class_dim}: need at least 2; for one logit per target use likelihood="bernoulli"'
            )

    def target_shape(self, logits: Tensor) -> tuple[int, ...]:
        """Every dimension of the logits but the classes."""
        axis = self.class_dim % logits.dim()
        return tuple(logits.shape[:axis]) + tuple(logits.shape[axis + 1 :])

    def expand_mask(self, mask: Tensor, logits: Tensor) -> Tensor:
        """See :meth:`Likelihood.expand_mask`."""
        missing = logits.dim() - 1 - mask.dim()
        return mask.reshape(*mask.shape, *[1] * missing).unsqueeze(self.class_dim % logits.dim())

    def uniforms_per_sample(self, logits: Tensor) -> int:
        """One per position."""
        return self.elements(logits)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """(B, positions, classes), at least float32."""
        classes_last = logits.detach().movedim(self.class_dim, -1)
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return classes_last.to(work).softmax(-1).reshape(logits.shape[0], -1, classes_last.shape[-1])

    def _like_logits(self, cotangent: Tensor, logits: Tensor) -> Tensor:
        shape = logits.movedim(self.class_dim, -1).shape
        return cotangent.reshape(shape).movedim(-1, self.class_dim).to(logits.dtype)

    def sampled_cotangent(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Softmax minus onehot(y); y by inversion of the cumulative distribution."""
        probabilities = self._probabilities(logits)
        below = probabilities.to(uniforms.dtype).cumsum(-1) < uniforms[..., None]
        target = below.sum(-1).clamp_max(probabilities.shape[-1] - 1)
        cotangent = probabilities.scatter_add(-1, target[..., None], -torch.ones_like(probabilities[..., :1]))
        return self._like_logits(cotangent, logits)

    def root_columns(self, logits: Tensor) -> Iterator[Tensor]:
        """Columns sqrt(p_c) (p - e_c) for all positions and classes: their outer products sum to diag(p) - p p^T."""
        probabilities = self._probabilities(logits)
        _, positions, classes = probabilities.shape
        self.check_column_count(positions * classes)
        for position in range(positions):
            p = probabilities[:, position]
            for c in range(classes):
                column = torch.zeros_like(probabilities)
                column[:, position] = p
                column[:, position, c] -= 1.0
                column[:, position] *= p[:, c, None].sqrt()
                yield self._like_logits(column, logits)
