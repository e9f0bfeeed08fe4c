"""Rows instead of weight gradients: a Linear layer's inputs and output gradients, kept by the training's own backward.

A forward hook puts a node of its own in the place of the layer's in the graph. Its backward passes on the gradient of
the input x, computes none of weight and bias, and hands over x and the gradient g of the output: the gradient of the
parameters is g^T [x, 1], and whoever wants it dense can still form it.

Whether ``backward()`` was called or ``torch.autograd.grad`` (the sampled-target pass, a gradient penalty) is told by a
leaf of one number beside x: only ``backward()`` accumulates into leaves.

While rows are held, ``weight.grad`` is a mark, a sparse zero. So all that is done to gradients in between is seen:
``zero_grad`` removes the mark, and the rows with it; a gradient that reaches the parameters on another way (a penalty
on the weights, say) makes a dense gradient of the rows first, to which it is added; any other change is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.compat import in_transform
from kfac_dist.layers.linear import LinearLayer
from kfac_dist.layers.watch import silenced


class _Delivery:
    """What the backward of one call has brought, until it is known that it was ``backward()``."""

    x: Tensor
    g: Tensor


class _Linear(torch.autograd.Function):
    """The output that was computed already, as a function of x alone (and differentiable again, also by the weight)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, output: Tensor, weight: list[Tensor], delivery: _Delivery) -> Tensor:
        ctx.save_for_backward(x, *weight)  # in a list it is no input: there is no edge to it
        ctx.delivery = delivery
        return output.data  # neither an input itself nor a view of one: in-place activations may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.delivery.x, ctx.delivery.g = x, g
        at_input = (g @ weight.to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return at_input, g.new_zeros(()), None, None, None


class LayerRows:
    """The rows of one Linear layer in the window that is open.

    Args:
        layer: one whose parameters no other module has.
        pays: whether so many rows are cheaper than the gradient; calls with more leave the gradient to autograd.
    """

    def __init__(self, layer: LinearLayer, pays: Callable[[int], bool]) -> None:
        self.layer = layer
        self._pays = pays
        self._a: list[Tensor] = []
        self._g: list[Tensor] = []
        self._mark: Tensor | None = None
        # First of all hooks, so that nobody is handed an output with the other graph.
        self._handles = [layer.module.register_forward_hook(self._after(), with_kwargs=True, prepend=True)]
        self._handles += [parameter.register_hook(self._before_dense()) for parameter in layer.parameters]

    @property
    def count(self) -> int:
        """Rows that are held."""
        return sum(g.shape[1] for g in self._g)

    # The hooks are plain functions, which copy.deepcopy takes over as they are, to be ignored by the copy.

    def _after(self) -> Callable[..., Tensor | None]:
        parameters = self.layer.parameters

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if torch.compiler.is_compiling() or module is not self.layer.module or silenced() or in_transform():
                return None
            same = all(mine is now for mine, now in zip(parameters, self.layer.parameters, strict=True))
            if not same or not torch.is_grad_enabled() or not all(p.requires_grad for p in parameters):
                return None
            if not self._pays(self.count + self.layer.rows(output)):
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            delivery = _Delivery()
            leaf = output.new_zeros((), requires_grad=True)
            leaf.register_hook(lambda _: self._add(delivery.x, delivery.g))
            given: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
                x, leaf, output.detach(), [self.layer.weight], delivery
            )
            return given

        return hook

    def _before_dense(self) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.fold()

        torch.utils.hooks.unserializable_hook(hook)  # it marks the function itself
        return hook

    # -- rows -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _add(self, x: Tensor, g: Tensor) -> None:
        layer = self.layer
        if not self._marked():
            if any(p.grad is not None and p.grad is not self._mark for p in layer.parameters):
                self._add_dense(x, g)
                return
            self._a.clear()
            self._g.clear()
            self._mark = _mark(layer.weight)
            layer.weight.grad = self._mark
        # A copy: the caller may overwrite its batch before the step, and autograd gives up the activations.
        self._a.append(layer.rows_with_ones(x) if layer.has_bias else layer.input_rows(x).clone())
        self._g.append(layer.output_rows(g.detach()))

    def _marked(self) -> bool:
        """Whether the rows still stand for the gradient.

        Raises:
            RuntimeError: something else than ``zero_grad`` was done to it.
        """
        grad = self.layer.weight.grad
        if grad is None or grad is not self._mark or grad._nnz() == 0:
            return False
        if grad._version:
            raise RuntimeError(
                f"layer {self.layer.name!r}: its gradient was changed between backward() and step() (clipped, or "
                'unscaled), where preconditioning="samples" has none: do it after step(), to the directions, or use '
                'preconditioning="gradients"'
            )
        return True

    def _add_dense(self, x: Tensor, g: Tensor) -> None:
        layer = self.layer
        with torch.autocast(g.device.type, enabled=False):
            gradient = layer.parameter_gradient(x.to(layer.dtype), g.detach().to(layer.dtype))
        for parameter, part in zip(layer.parameters, layer.parts(gradient), strict=True):
            if parameter.grad is None or parameter.grad.is_sparse:
                parameter.grad = part.contiguous()
            else:
                parameter.grad += part

    @torch.no_grad()
    def fold(self) -> None:
        """Form the dense gradient of the rows that are held, into ``param.grad``."""
        a, g = self.take() or (None, None)
        if a is not None and g is not None:
            self._add_dense(a[..., : a.shape[-1] - self.layer.has_bias], g)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The rows a = [x, 1] (1, R, a) and g (1, R, g), which are no longer held; None where there are none.

        Without rows ``param.grad`` is the gradient, as ever.
        """
        a, g = self._a, self._g
        self._a, self._g = [], []
        if not self._marked():
            if self._mark is not None and self.layer.weight.grad is self._mark:  # zero_grad(set_to_none=False)
                self.layer.weight.grad = None
            return None
        self.layer.weight.grad = self._mark = None
        return (a[0], g[0]) if len(a) == 1 else (torch.cat(a, dim=1), torch.cat(g, dim=1))

    def close(self) -> None:
        """Remove the hooks; rows that are held become a gradient. Idempotent."""
        self.fold()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _mark(weight: Tensor) -> Tensor:
    """A sparse zero of the weight's shape, with one entry, which ``zero_()`` would take away."""
    where = torch.zeros(weight.dim(), 1, dtype=torch.long, device=weight.device)
    return torch.sparse_coo_tensor(where, weight.new_zeros(1), weight.shape, check_invariants=False)
