"""Preconditioning by samples: the local gradient of a Linear layer is g^T a with R rows, and so is its direction.

    G^-1 (g^T a) A^-1 = (g G^-1)^T (a A^-1):    R (g^2 + a^2) + R g a multiply-adds
    against  g a (g + a) + R g a  for the gradient and two dense products.

Preconditioning is linear, so the mean over the ranks of the preconditioned LOCAL gradients is the direction: one fused
all-reduce of these (sum over the layers of g a + 1 words) takes the place of the one of the gradients. Whether a rank
takes its rows or forms its dense gradient is its own affair.

With the KL clip <zeta, grad> is summed over rows as well: sum_r (g_r zeta) a_r, another R g a; or over pairs of rows,

    sum_rs (g_r G^-1 g_s) (a_r A^-1 a_s):    at most R^2 (g + a), as both factors are symmetric,

where that is less, the direction is of one rank's rows and the inverses are dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kfac_dist.comm import Communicator
from kfac_dist.compat import ignored_by_ddp, unwrap
from kfac_dist.config import CoarseConfig, DistributionConfig, KFACConfig
from kfac_dist.fused import FusedBuffer
from kfac_dist.inverse import DensePreconditioner, LayerPreconditioner
from kfac_dist.kept_rows import Rows, saved
from kfac_dist.layers import Layer
from kfac_dist.layers.linear import LinearLayer
from kfac_dist.sample_rows import LayerRows
from kfac_dist.state import LayerState

PAIRS = 64
"""Rows of a block of pairs."""


def plain_linears(model: nn.Module, layers: Sequence[Layer]) -> list[LinearLayer]:
    """The layers that can be preconditioned by samples: trained nn.Linear weights that no other module has."""
    modules = list(unwrap(model).modules())
    holders: dict[int, int] = {}
    for parameter in (p for module in modules for p in module._parameters.values() if p is not None):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return [
        layer
        for layer in layers
        if type(layer) is LinearLayer and layer.has_weight and all(holders[id(p)] == 1 for p in layer.parameters)
    ]


def served_layers(
    model: nn.Module,
    layers: Sequence[Layer],
    config: KFACConfig,
    coarse: CoarseConfig | None,
    distribution: DistributionConfig,
    world_size: int,
) -> list[LinearLayer]:
    """The layers of ``preconditioning="samples"``; none otherwise.

    Raises:
        ValueError: the other options, or the model, do not go with "samples".
    """
    if config.preconditioning != "samples":
        return []
    cure = 'use preconditioning="gradients"'
    if coarse is not None:
        raise ValueError(
            f'preconditioning="samples" forms no gradients, and coarse={coarse.space!r} is made of them at every step: '
            f"{cure}, or coarse=None"
        )
    if config.damping == "adaptive":
        raise ValueError(
            'preconditioning="samples" forms no gradients, with which damping="adaptive" predicts the loss: '
            f"{cure}, or a number or a schedule"
        )
    served = plain_linears(model, layers)
    if not served:
        raise ValueError(f'preconditioning="samples" serves nn.Linear layers, and none is preconditioned here: {cure}')
    if world_size > 1 and distribution.strategy != "comm_opt":
        raise ValueError(
            f'preconditioning="samples" with distribution={distribution.strategy!r}: every rank preconditions its own '
            f'samples and needs all inverses: choose "comm_opt", or {cure}'
        )
    ignored = ignored_by_ddp(model)
    if ignored is None and (world_size == 1 or distribution.average_gradients):
        return served
    names = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
    served = [layer for layer in served if (ignored or frozenset()).issuperset(names[id(p)] for p in layer.parameters)]
    if not served:
        raise ValueError(
            'preconditioning="samples" leaves no weight gradients, for which DistributedDataParallel would wait: use '
            "the model without it and DistributionConfig(average_gradients=True); or the Lightning callback, which "
            f"lets it ignore those nn.Linear layers that the module has before its setup(); or {cure}"
        )
    return served


def pays(layer: Layer, rows: int, config: KFACConfig) -> bool:
    """Whether so many rows are cheaper than the two products with the gradient (the same for eigenbases)."""
    clip = 0 if config.kl_clip is None else layer.output_dim * layer.input_dim
    return saved(layer, rows, config) > rows * clip


def product_over_pairs(rows: Rows, preconditioned: Rows) -> Tensor:
    """The inner product <Q^T P, g^T a> of the direction with rows (P, Q) and the gradient with rows (a, g), one group.

    P = a A^-1 and Q = g G^-1, so a P^T and g Q^T are symmetric: their upper triangles, by blocks of rows, are enough.
    """
    (a, g), (P, Q) = ((each[0] for each in pair) for pair in (rows, preconditioned))
    total = a.new_zeros(())
    for start in range(0, len(a), PAIRS):
        end = min(start + PAIRS, len(a))
        pairs = (P[start:end] @ a[start:].mT).mul_(Q[start:end] @ g[start:].mT)
        total = total + 2.0 * pairs.sum() - pairs[:, : end - start].sum()
    return total


class RankB:
    """The gradients and directions of the served layers, which are the same on every rank in the end.

    Args:
        model: the model, plain or wrapped.
        served: :func:`served_layers`; there may be none.
        config: the method.
        average_gradients: whether all other gradients are averaged by K-FAC, too.
        world: the communicator of all ranks.
        dtype: the type of the directions.
    """

    def __init__(
        self,
        model: nn.Module,
        served: Sequence[LinearLayer],
        config: KFACConfig,
        average_gradients: bool,
        world: Communicator,
        dtype: torch.dtype,
    ) -> None:
        self.served = {layer.name: layer for layer in served}
        self._config = config
        self._world = world
        self._dtype = dtype
        self._average_gradients = average_gradients
        self._ignored = (ignored_by_ddp(model) or frozenset()) if served and world.size > 1 else frozenset[str]()
        self._model = unwrap(model)
        self._taken: dict[str, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._broadcast()
        self._rows = {
            layer.name: LayerRows(layer, lambda rows, layer=layer: pays(layer, rows, config))  # type: ignore[misc]
            for layer in served
        }

    def _broadcast(self) -> None:
        """Rank 0's parameters where DDP, which is told to ignore them, has not done it."""
        parameters = [p.detach() for name, p in self._model.named_parameters() if name in self._ignored]
        for parameter in parameters:
            value = parameter.contiguous()
            self._world.broadcast(value, src=0, phase="parameters")
            parameter.copy_(value)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the served layers: their gradients are local until :meth:`precondition`."""
        return [parameter for layer in self.served.values() for parameter in layer.parameters]

    @property
    def left_to_us(self) -> list[nn.Parameter]:
        """The other parameters whose gradients nobody else averages over the ranks."""
        if not self._average_gradients and not self._ignored:
            return []
        own = {id(parameter) for parameter in self.parameters}
        return [
            parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
            and id(parameter) not in own
            and (self._average_gradients or name in self._ignored)
        ]

    def take(self) -> list[Tensor]:
        """Take the window's rows; returns what the local gradients are made of, to be looked through."""
        self._taken = {}
        for name, rows in self._rows.items():
            if not pays(self.served[name], rows.count, self._config):  # several calls went by before their backward
                rows.fold()
            taken = rows.take()
            if taken is not None:
                self._taken[name] = (taken[0].to(self._dtype), taken[1].to(self._dtype))
        dense = [p.grad for name in self._rows if name not in self._taken for p in self.served[name].parameters]
        return [g for _, g in self._taken.values()] + [gradient for gradient in dense if gradient is not None]

    def precondition(self, states: Mapping[str, LayerState], damping: float, loss_scale: float) -> dict[str, Tensor]:
        """Layer -> zeta, the same on every rank, for the served layers with a gradient; ``param.grad`` is allocated.

        A layer without an inverse gets the mean of its plain gradients, and no direction.
        """
        local: dict[str, Tensor] = {}
        self._gradients, self._products = {}, {}
        for name, layer in self.served.items():
            preconditioner = states[name].preconditioner
            scale = 1.0 if preconditioner is None else loss_scale
            gradient = None if name in self._taken else layer.gradient()
            if name in self._taken:
                a, g = self._taken[name]
                if scale != 1.0:
                    self._taken[name] = a, g / scale
                local[name] = g.mT @ a if preconditioner is None else self._direction(name, preconditioner, damping)
            elif gradient is not None:
                gradient = gradient.to(self._dtype)
                gradient = self._gradients[name] = gradient if scale == 1.0 else gradient / scale
                local[name] = (
                    gradient if preconditioner is None else preconditioner.apply(gradient, damping).contiguous()
                )
        directions = self._mean(local)
        for name, direction in directions.items():
            for parameter in self.served[name].parameters:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
            if states[name].preconditioner is None:
                self.served[name].write_gradient(direction)
        return {name: zeta for name, zeta in directions.items() if states[name].preconditioner is not None}

    def _direction(self, name: str, preconditioner: LayerPreconditioner, damping: float) -> Tensor:
        """The direction of this rank's rows, and on one rank its product with the gradient, where pairs are cheaper."""
        a, g = self._taken[name]
        rows, d_in, d_out = a.shape[1], a.shape[2], g.shape[2]
        paired = self._config.kl_clip is not None and self._world.size == 1 and rows * (d_out + d_in) < d_out * d_in
        if not paired or not isinstance(preconditioner, DensePreconditioner):
            return preconditioner.apply_to_rows(a, g, damping)
        right, left = preconditioner.rows(a, g)
        self._products[name] = product_over_pairs((a, g), (right, left))
        return left.mT @ right

    def _mean(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means over the ranks, for what any of them has."""
        if self._world.size == 1 or not self.served:
            return dict(local)
        names = list(self.served)
        shapes = {name: layer.shape for name, layer in self.served.items()}
        sizes: dict[object, int] = {name: shape[0] * shape[1] * shape[2] for name, shape in shapes.items()}
        sizes[self] = len(names)
        buffer = FusedBuffer(sizes, self._dtype, self.parameters[0].device)
        buffer[self].copy_(torch.tensor([float(name in local) for name in names], dtype=self._dtype))
        for name, direction in local.items():
            buffer[name].copy_(direction.reshape(-1))
        self._world.all_reduce(buffer.flat, phase="directions")
        anywhere = dict(zip(names, buffer[self].tolist(), strict=True))
        buffer.flat.div_(self._world.size)
        return {name: buffer[name].view(shapes[name]) for name in names if anywhere[name] > 0}

    def products(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> <zeta, grad>, for the clip; nothing where there is none.

        On several ranks it is the mean of the products with the local gradients: one all-reduce of a number per layer.
        """
        if self._config.kl_clip is None:
            return {}
        names = [name for name in self.served if name in directions]
        if not names:
            return {}
        products = torch.stack([self._product(name, directions[name]) for name in names])
        if self._world.size > 1:
            self._world.all_reduce(products, phase="clip")
            products /= self._world.size
        return dict(zip(names, products, strict=True))

    def _product(self, name: str, direction: Tensor) -> Tensor:
        """The product of a direction with this rank's gradient."""
        if name in self._products:
            return self._products[name]
        if name in self._taken:
            a, g = self._taken[name]
            return torch.sum((g @ direction) * a)
        gradient = self._gradients.get(name)
        return direction.new_zeros(()) if gradient is None else torch.sum(direction * gradient)

    def close(self) -> None:
        """Remove the hooks; rows that are held become gradients. Idempotent."""
        self._taken, self._gradients, self._products = {}, {}, {}
        for rows in self._rows.values():
            rows.close()
