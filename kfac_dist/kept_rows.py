"""Rows beside the gradient: where g^T a is what ``param.grad`` holds, the direction is made of g and a instead.

    G^-1 (g^T a) A^-1 = (g G^-1)^T (a A^-1):    R (g^2 + a^2 + g a) multiply-adds for R rows
    against  g a (g + a)  for the two dense products.

The backward is left as it is. Whether the gradient still is g^T a is asked of a random vector v (Freivalds): g^T (a v)
against ``grad v``. Whatever came to it on another way, a penalty on the weights, a clip, a scaler, an input that was
overwritten, makes the two differ, and the layer takes the dense route. No rows are taken on trust.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_dist.compat import in_backward, in_transform
from kfac_dist.config import KFACConfig
from kfac_dist.layers import Layer
from kfac_dist.layers.linear import LinearLayer
from kfac_dist.layers.watch import silenced

Rows = tuple[Tensor, Tensor]
"""The rows a = [x, 1] (1, R, a) and g (1, R, g) of one layer."""

WORTH = 1 << 21
"""Multiply-adds that must be saved: fewer are not worth the hooks."""

ROUNDING = 16
"""How many units of rounding of its terms a gradient may differ from g^T a."""


def saved(layer: Layer, rows: int, config: KFACConfig) -> int:
    """Multiply-adds of the two dense products, less those of so many rows with the inverses (eigenbases: the same)."""
    d_out, d_in = layer.output_dim, layer.input_dim
    a = layer.factors["A"].size
    g = layer.factors["G"].size if config.factor_sides == "both" else 0
    return d_out * d_in * (g + a) - rows * (d_out * g + d_in * a)


def worthwhile(layer: Layer, rows: int, config: KFACConfig) -> bool:
    """Whether that is worth it, after the product of the rows and the question whether they are the gradient."""
    d_out, d_in = layer.output_dim, layer.input_dim
    return saved(layer, rows, config) >= (rows + 1) * d_out * d_in + 2 * rows * (d_out + d_in) + WORTH


@dataclass
class _Call:
    """One call: its input, and the gradient of its output that the last backward pass brought."""

    x: Tensor
    g: Tensor | None = None
    handle: RemovableHandle | None = None

    def deliver(self, gradient: Tensor) -> None:
        self.g = gradient.detach()

    def drop(self) -> None:
        """Leave the graph, which may live on for long, as it keeps a loss."""
        if self.handle is not None:
            self.handle.remove()


class _LayerCalls:
    """The calls of one layer since the last step; none where they have too many rows to be of use."""

    def __init__(self, layer: LinearLayer, dtype: torch.dtype, pays: Callable[[int], bool]) -> None:
        self.layer = layer
        self._dtype = dtype
        self._pays = pays
        self._calls: list[_Call] = []
        self._rows = 0
        # Signs at random, and magnitudes in [1, 2): no column, such as that of the bias, is looked at through a zero.
        generator = torch.Generator().manual_seed(0)
        numbers = torch.rand(2, layer.input_dim, generator=generator, dtype=torch.float64)
        self._probe = (1.0 + numbers[0]) * (numbers[1] - 0.5).sign()
        self.handle = layer.module.register_forward_hook(self._after(), with_kwargs=True)

    def _after(self) -> Callable[..., None]:
        """The hook: a plain function, which copy.deepcopy takes over as it is, to be ignored by the copy."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if torch.compiler.is_compiling() or module is not self.layer.module or silenced() or in_backward():
                return
            if in_transform() or not output.requires_grad or output.dtype != self._dtype:
                return
            self._rows += self.layer.rows(output)
            if not self._pays(self._rows):
                self._drop()
                return
            call = _Call((args[0] if args else next(iter(kwargs.values()))).detach())
            self._calls.append(call)
            call.handle = output.register_hook(call.deliver)

        return hook

    def take(self) -> Rows | None:
        """The rows of the calls that a backward has reached."""
        reached = [(call.x, call.g) for call in self._calls if call.g is not None]
        if not reached:
            return None
        inputs = [self.layer.rows_with_ones(x) for x, _ in reached]
        outputs = [self.layer.output_rows(g) for _, g in reached]
        return (inputs[0], outputs[0]) if len(reached) == 1 else (torch.cat(inputs, dim=1), torch.cat(outputs, dim=1))

    def _drop(self) -> None:
        for call in self._calls:
            call.drop()
        self._calls.clear()

    def forget(self) -> None:
        """Drop the calls that no backward has reached; where there were too many rows, they stay too many."""
        for call in self._calls:
            if call.g is None:
                call.drop()
                self._rows -= math.prod(call.x.shape[:-1])
        self._calls = [call for call in self._calls if call.g is not None]

    def clear(self) -> None:
        """Forget everything; the activations can be freed."""
        self._drop()
        self._rows = 0

    def excess(self, rows: Rows, gradient: Tensor) -> Tensor:
        """How far ``gradient`` is from g^T a, over what rounding explains: a scalar, at most 1 where it is that."""
        a, g = rows
        v = self._probe.to(a)
        distance: Tensor = torch.linalg.vector_norm(gradient[0] @ v - (a[0] @ v) @ g[0])
        bound: Tensor = ROUNDING * torch.finfo(a.dtype).eps * torch.linalg.vector_norm(a) * torch.linalg.vector_norm(g)
        return distance / bound.clamp_min(torch.finfo(a.dtype).tiny)


class KeptRows:
    """The rows of some linear layers, from the training's forward and backward to the step.

    Args:
        layers: those of nn.Linear modules whose weights no other module has.
        config: the method.
        dtype: the type of the directions; layers of another one are left to the dense route.
    """

    def __init__(self, layers: Sequence[LinearLayer], config: KFACConfig, dtype: torch.dtype) -> None:
        def pays(layer: Layer) -> Callable[[int], bool]:
            return lambda rows: worthwhile(layer, rows, config)

        served = [layer for layer in layers if layer.dtype == dtype and worthwhile(layer, 1, config)]
        self._layers = {layer.name: _LayerCalls(layer, dtype, pays(layer)) for layer in served}

    def take(self, gradients: Mapping[str, Tensor], loss_scale: float) -> dict[str, Rows]:
        """Layer -> rows (a, g) with g^T a = its gradient, for the layers of which that is true; one synchronisation.

        Args:
            gradients: layer -> gradient (1, g, a) of the mean loss.
            loss_scale: the training loss over the mean one.
        """
        rows: dict[str, Rows] = {}
        for name, calls in self._layers.items():
            taken = calls.take() if name in gradients else None
            calls.clear()
            if taken is not None:
                rows[name] = taken if loss_scale == 1.0 else (taken[0], taken[1] / loss_scale)
        if not rows:
            return rows
        excess = torch.stack([self._layers[name].excess(each, gradients[name]) for name, each in rows.items()])
        return {name: each for (name, each), far in zip(rows.items(), excess.tolist(), strict=True) if far <= 1.0}

    def forget(self) -> None:
        """Drop the calls that no backward has reached."""
        for calls in self._layers.values():
            calls.forget()

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        for calls in self._layers.values():
            calls.clear()
            calls.handle.remove()
        self._layers.clear()
