"""The Fisher matrix of a small network as a dense matrix, and errors of directions in its norm.

Vectors are over the layers that K-FAC covers, each layer's [W | b] flattened row by row, in the order of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from kfac_dist.layers import Layer

MAX_PARAMETERS = 20_000


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
        self.layers = layers
        size = sum(math.prod(layer.shape) for layer in layers)
        if size > MAX_PARAMETERS:
            raise ValueError(f"{size} covered parameters: a dense Fisher is for at most {MAX_PARAMETERS}")
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = {layer.name: [names[id(p)] for p in layer.parameters] for layer in layers}
        trained = {name: p.detach() for name, p in model.named_parameters()}
        columns = [self._columns(model, trained, x, c) * weight**0.5 for c, weight in cotangents]
        self.U = torch.cat(columns).T.double()
        self.matrix = self.U @ self.U.T / len(x)

    def _columns(self, model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        def single(sample: Tensor, gradient: Tensor) -> dict[str, Tensor]:
            back = vjp(lambda p: functional_call(model, p, (sample[None],)), dict(parameters))[1]
            return back(gradient[None])[0]

        parts = vmap(single, chunk_size=64)(x, cotangent)
        rows = [self._matrices(layer, parts).flatten(1) for layer in self.layers]
        return torch.cat(rows, dim=1)

    def _matrices(self, layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
        tensors = [parts[name] for name in self._names[layer.name]]
        each = [layer.to_matrix(*(layer.part(t[b]) for t in tensors)) for b in range(len(tensors[0]))]
        return torch.stack(each)

    def flatten(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Layer -> Theta-shaped tensors as one float64 vector."""
        return torch.cat([directions[layer.name].flatten() for layer in self.layers]).double()

    def damped(self, damping: float) -> Tensor:
        """F + damping I."""
        return self.matrix + damping * torch.eye(len(self.matrix), dtype=torch.float64)


def errors(F_l: Tensor, gradient: Tensor, direction: Tensor) -> tuple[float, float]:
    """||d - d*||_F and its minimum over multiples of d, where d* = F_l^-1 grad is the natural gradient.

    The first punishes a wrong length, the second (the step-size-free error) only a wrong direction. Both in units of
    ||d*||_F.
    """
    exact = torch.linalg.solve(F_l, gradient)
    energy = float(exact @ gradient)
    difference = direction - exact
    full = float(difference @ F_l @ difference)
    along = float(direction @ gradient)
    length = float(direction @ F_l @ direction)
    free = energy - along**2 / length if length > 0 else energy
    return (max(full, 0.0) / energy) ** 0.5, (max(free, 0.0) / energy) ** 0.5
