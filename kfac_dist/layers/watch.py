"""How a layer's calls are heard of: the interface between the hooks of a layer family and the capture of statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_dist.compat import uncompiled

if TYPE_CHECKING:
    from kfac_dist.layers.base import Layer


class Part(NamedTuple):
    """What one call was to one layer: its input and the gradient of its output, samples outermost in both."""

    layer: Layer
    x: Tensor
    g: Tensor


_state = threading.local()


@contextmanager
def silence() -> Iterator[None]:
    """Hooks of this thread record nothing inside: a forward is only repeated."""
    before = silenced()
    _state.silent = True
    try:
        yield
    finally:
        _state.silent = before


def silenced() -> bool:
    """Whether hooks have to ignore what goes on."""
    return getattr(_state, "silent", False)


Split = Callable[[Sequence[Tensor | None]], Sequence[Part]]
"""From the gradients of a call's outputs (None where an output does not lead to the logits) to the layers' parts."""


class Record(Protocol):
    """Takes calls down while a curvature batch is being captured."""

    def wanted(self, names: Sequence[str]) -> bool:
        """Whether the call that goes on is to be taken down; ``names`` are the layers that it concerns."""

    def __call__(self, names: Sequence[str], outputs: Sequence[Tensor], split: Split) -> None:
        """Take down a call that is wanted: the tensors whose gradients are needed, and what to do with them.

        Several tensors must be the outputs of one node of the graph, in their order (:func:`of_one_node`).
        """


class _OneNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # None stays None
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients


def of_one_node(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of ``tensors`` whose gradients arrive together, at one node of the graph."""
    copies: tuple[Tensor, ...] = _OneNode.apply(*tensors)  # type: ignore[no-untyped-call]
    return copies


def watch_calls(
    layer: Layer,
    record: Record,
    part: Callable[[Tensor, Tensor], Part] | None = None,
    prepare: Callable[[Tensor], Tensor] = torch.detach,
) -> list[RemovableHandle]:
    """One forward hook, for a layer that is a module of one input and one output.

    ``part`` makes the call's part of the input and the output's gradient; None: of both as they are. ``prepare`` turns
    the input into what is recorded of it, right after the call.

    The hook is a plain function, which copy.deepcopy takes over as it is: a copy of the model (weight averaging makes
    one) then calls it with a module of its own, and it ignores that.
    """
    made = part or (lambda x, g: Part(layer, x, g))

    @uncompiled
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if module is not layer.module or not record.wanted([layer.name]):
            return
        x = prepare(args[0] if args else next(iter(kwargs.values())))
        record([layer.name], [output], lambda gradients: [made(x, gradients[0])])  # type: ignore[arg-type]

    return [layer.module.register_forward_hook(hook, with_kwargs=True)]
