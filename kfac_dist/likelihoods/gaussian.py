"""Real outputs with the squared error (1/2) ||f - y||^2, that is unit variance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_dist.likelihoods.base import Likelihood, likelihoods


@likelihoods.register("gaussian")
class Gaussian(Likelihood):
    """y = f + N(0, I). ``nn.MSELoss()`` is ``loss_reduction="mean_all"``: an average over outputs, without the 1/2."""

    mean_all_factor = 2.0

    def uniforms_per_sample(self, logits: Tensor) -> int:
        """One per output."""
        return self.elements(logits)

    def sampled_cotangent(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Minus a standard normal number: f - y."""
        normal: Tensor = torch.special.ndtri(uniforms)
        return -normal.view(logits.shape).to(logits.dtype)

    def root_columns(self, logits: Tensor) -> Iterator[Tensor]:
        """Columns e_k for every output k."""
        flat = logits.detach().reshape(logits.shape[0], -1)
        self.check_column_count(flat.shape[1])
        for k in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, k] = 1.0
            yield column.view(logits.shape)
