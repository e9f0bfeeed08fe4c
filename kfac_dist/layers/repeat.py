"""A module's forward once more, as a function of some of its parameters: gradients of single samples, and products J v.

A repetition changes nothing: it computes with copies of the buffers, and the hooks of the capture ignore it. It is made
without autocast, in the type of the parameters, and with an attention that can be differentiated in every mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_dist.layers.watch import silence

CHUNK = 32
"""Samples whose gradients exist at once."""


class Repetition:
    """The forward of ``module`` at fixed parameter values.

    Args:
        module: a module of one input, whose forward repeats exactly.
        names: the parameters that are varied, by their (dotted) names in the module.
        values: the values of ALL its parameters by name, which nobody changes.
        batched: whether ``torch.func.vmap`` takes the module; else samples are treated one by one.
        forward_mode: whether forward-mode differentiation takes it; else J v is made of two backward passes.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], values: Mapping[str, Tensor], batched: bool, forward_mode: bool
    ) -> None:
        self.module = module
        self.names = tuple(names)
        self.values = values
        self.batched = batched
        self.forward_mode = forward_mode
        self.dtype = values[self.names[0]].dtype

    def _function(self, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        """The output for ``x``, of the varied parameters."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        given = x.to(self.dtype) if x.is_floating_point() else x

        def output(varied: dict[str, Tensor]) -> Tensor:
            with silence(), sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
                out: Tensor = functional_call(self.module, {**self.values, **buffers, **varied}, (given,))
            return out

        return output

    def _varied(self) -> dict[str, Tensor]:
        return {name: self.values[name] for name in self.names}

    def outputs(self, x: Tensor) -> Tensor:
        """The outputs of samples (B, ..), each of them computed alone."""
        if self.batched:
            return vmap(lambda row: self._function(row[None])(self._varied())[0])(x)
        return torch.cat([self._function(row[None])(self._varied()) for row in x])

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """J^T g of the whole batch, (p,), by ordinary autograd."""
        with torch.enable_grad():
            varied = {name: value.detach().requires_grad_() for name, value in self._varied().items()}
            out = self._function(x)(varied)
            found = torch.autograd.grad(out, list(varied.values()), g.to(out.dtype), allow_unused=True)
        filled = zip(found, varied.values(), strict=True)
        return torch.cat([(torch.zeros_like(v) if f is None else f).reshape(-1) for f, v in filled])

    def gradients(self, x: Tensor, g: Tensor) -> Iterator[Tensor]:
        """The gradients (chunk, p) of samples (B, rows, ..), chunk by chunk."""
        for xs, gs in zip(x.split(CHUNK), g.split(CHUNK), strict=True):
            if self.batched:
                yield vmap(self._alone)(xs, gs)
            else:
                yield torch.stack([self.gradient(*pair) for pair in zip(xs, gs, strict=True)])

    def _alone(self, x: Tensor, g: Tensor) -> Tensor:
        out, pull = vjp(self._function(x), self._varied())[:2]
        (found,) = pull(g.to(out.dtype))
        return torch.cat([found[name].reshape(-1) for name in self.names])

    def along(self, x: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
        """J v for the whole batch, shaped like the output."""
        function = self._function(x)
        if self.forward_mode:
            along: Tensor = jvp(function, (self._varied(),), (dict(direction),))[1]
            return along
        with torch.enable_grad():  # J^T w is linear in w, and J v is the derivative of its product with v
            varied = {name: value.detach().requires_grad_() for name, value in self._varied().items()}
            out = function(varied)
            w = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, list(varied.values()), w, create_graph=True, allow_unused=True)
            pairs = zip(pulled, direction.values(), strict=True)
            product = sum(((p * v).sum() for p, v in pairs if p is not None), start=0.0 * w.sum())
            (found,) = torch.autograd.grad(product, w)
        return found
