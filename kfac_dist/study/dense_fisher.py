"""The Fisher matrix of one batch through a small network, without approximation, and errors of directions in its norm.

F = (1/B) U U^T is held as U: its products and the inverse of F + lambda I need matrices of as many rows as there are
samples only (Sherman, Morrison and Woodbury), in float64. Vectors are over the layers that K-FAC covers, each layer's
[W | b] flattened row by row, in the order of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from kfac_dist.config import KFACConfig
from kfac_dist.draws import default_sample_ids, uniforms
from kfac_dist.layers import Layer
from kfac_dist.likelihoods import likelihoods

MAX_PARAMETERS = 20_000


def sampled_cotangents(config: KFACConfig, step: int, logits: Tensor) -> Iterator[tuple[Tensor, float]]:
    """The output gradients at targets drawn from the model, with the weight of each draw: those that K-FAC makes.

    Args:
        config: K-FAC's; the likelihood, the draws and the seed count.
        step: counted from 0.
        logits: (B, ..), of one process's only micro-batch.

    Raises:
        ValueError: the empirical Fisher, which draws nothing.
    """
    if config.likelihood == "empirical":
        raise ValueError('likelihood="empirical" draws no targets: name the likelihood of the loss')
    family = likelihoods[config.likelihood](config.class_dim)
    if config.fisher_samples == "exact":
        yield from ((column, 1.0) for column in family.root_columns(logits))
        return
    ids = default_sample_ids(0, 0, len(logits), logits.device)
    for draw in range(config.fisher_samples):
        numbers = uniforms(config.seed, step, draw, ids, family.uniforms_per_sample(logits))
        yield family.sampled_cotangent(logits.detach(), numbers), 1.0 / config.fisher_samples


def check_small(layers: Sequence[Layer]) -> None:
    """Raise ValueError where the layers have more than 20,000 parameters."""
    size = sum(math.prod(layer.shape) for layer in layers)
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} covered parameters: a dense Fisher is for at most {MAX_PARAMETERS}")


def matrices(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Layer -> what ``param.grad`` holds, Theta-shaped, where every parameter has a gradient."""
    return {layer.name: layer.gradient() for layer in layers}  # type: ignore[misc]


class DenseFisher:
    """F = (1/B) sum u u^T from single samples' gradients, for given output gradients.

    Args:
        model: the network; per-sample gradients are those of a forward of one sample alone.
        layers: the covered layers.
        x: inputs (B, ..).
        cotangents: output gradients (B, ..) with the weight of each draw, as a likelihood makes them.

    Raises:
        ValueError: more than 20,000 covered parameters.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], x: Tensor, cotangents: Iterable[tuple[Tensor, float]]
    ) -> None:
        check_small(layers)
        self.layers = layers
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = {layer.name: [names[id(p)] for p in layer.parameters] for layer in layers}
        trained = {name: p.detach() for name, p in model.named_parameters()}
        columns = [self._columns(model, trained, x, c) * weight**0.5 for c, weight in cotangents]
        self.U = torch.cat(columns).T.double() / len(x) ** 0.5
        """(p, columns) float64, with F = U U^T: a column per sample and draw."""

    @property
    def matrix(self) -> Tensor:
        """F (p, p)."""
        return self.U @ self.U.T

    def _columns(self, model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        def single(sample: Tensor, gradient: Tensor) -> dict[str, Tensor]:
            back = vjp(lambda p: functional_call(model, p, (sample[None],)), dict(parameters))[1]
            return back(gradient[None])[0]

        parts = vmap(single, chunk_size=64)(x, cotangent)
        rows = [self._matrices(layer, parts).flatten(1) for layer in self.layers]
        return torch.cat(rows, dim=1)

    def _matrices(self, layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
        tensors = [parts[name] for name in self._names[layer.name]]
        return vmap(lambda *parts: layer.to_matrix(*(layer.part(part) for part in parts)))(*tensors)

    def flatten(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Layer -> Theta-shaped tensors as one float64 vector."""
        return torch.cat([directions[layer.name].flatten() for layer in self.layers]).double()

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`flatten`, still in float64."""
        parts = vector.split([math.prod(layer.shape) for layer in self.layers])
        return {layer.name: part.view(layer.shape) for layer, part in zip(self.layers, parts, strict=True)}

    def damped(self, damping: float) -> Tensor:
        """F + damping I."""
        return self.matrix + damping * torch.eye(len(self.U), dtype=torch.float64)

    def energy(self, vector: Tensor, damping: float) -> float:
        """v^T (F + damping I) v of a vector (p,)."""
        return float((self.U.T @ vector).square().sum() + damping * vector.square().sum())

    def solve(self, vector: Tensor, damping: float) -> Tensor:
        """(F + damping I)^-1 v = (v - U (U^T U + damping I)^-1 U^T v) / damping."""
        gram = self.U.T @ self.U
        gram.diagonal().add_(damping)
        inner = torch.cholesky_solve((self.U.T @ vector)[:, None], torch.linalg.cholesky(gram))[:, 0]
        return (vector - self.U @ inner) / damping

    def errors(self, gradient: Tensor, directions: Sequence[Tensor], damping: float) -> list[tuple[float, float]]:
        """Of each direction d, ||d - d*||_F and its minimum over multiples of d, where d* = (F + damping I)^-1 grad.

        The first punishes a wrong length, the second (the step-size-free error) only a wrong direction. Both in units
        of the natural gradient's ||d*||_F, in the norm of F + damping I.
        """
        exact = self.solve(gradient, damping)
        unit = float(exact @ gradient)
        found = []
        for direction in directions:
            along, length = float(direction @ gradient), self.energy(direction, damping)
            free = unit - along**2 / length if length > 0 else unit
            found.append(((self.energy(direction - exact, damping) / unit) ** 0.5, (max(free, 0.0) / unit) ** 0.5))
        return found
