"""Independent binary outputs with binary cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_dist.likelihoods.base import Likelihood, likelihoods


@likelihoods.register("bernoulli")
class Bernoulli(Likelihood):
    """p(y_k = 1) = sigmoid(logit_k), every output on its own."""

    not_logits = ("Sigmoid", "LogSigmoid", "Softmax", "LogSoftmax", "Hardsigmoid")

    def uniforms_per_sample(self, logits: Tensor) -> int:
        """One per output."""
        return self.elements(logits)

    def sampled_cotangent(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Sigmoid minus y."""
        probabilities = _probabilities(logits)
        return (probabilities - (uniforms.view(logits.shape) < probabilities).to(probabilities)).to(logits.dtype)

    def root_columns(self, logits: Tensor) -> Iterator[Tensor]:
        """Columns sqrt(p_k (1 - p_k)) e_k for every output k."""
        probabilities = _probabilities(logits).reshape(logits.shape[0], -1)
        self.check_column_count(probabilities.shape[1])
        for k in range(probabilities.shape[1]):
            column = torch.zeros_like(probabilities)
            column[:, k] = (probabilities[:, k] * (1.0 - probabilities[:, k])).sqrt()
            yield column.view(logits.shape).to(logits.dtype)


def _probabilities(logits: Tensor) -> Tensor:
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.detach().to(work).sigmoid()
