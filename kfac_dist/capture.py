"""Module hooks: what went into a layer, and where the gradient of what came out of it will arrive.

The capture owns its hook handles. It records in training only (gradients enabled and an output that requires one),
never during the recomputation of a checkpointed forward, and only while ``active``. A layer's output is remembered by
its gradient edge, not as a tensor: an in-place activation behind the layer would move the tensor in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from kfac_dist.compat import GradientEdge, gradient_edge, in_backward
from kfac_dist.layers import Layer


@dataclass(frozen=True)
class Call:
    """One call of one layer: its detached input, the edge of its output in the graph, and which forward it was part of.

    ``edge`` is None where a hook on the output delivers the gradient: the graph holds the hook and the hook this call,
    so with an edge, which holds the graph, nobody could ever free it. ``forward`` counts the outputs recorded before
    this call, so that it is the index of the output it led to; ``number`` tells all calls apart.
    """

    layer: Layer
    x: Tensor
    edge: GradientEdge | None
    forward: int
    number: int


class Capture:
    """Records the calls of ``layers`` and the outputs of one module.

    Args:
        layers: the layers to watch.
        output_module: the module whose output is the logits.
        on_gradient: called with a call and the gradient of its output during every training backward (the empirical
            Fisher); None: gradients are asked for later, at the edges.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        output_module: nn.Module,
        on_gradient: Callable[[Call, Tensor], None] | None = None,
    ) -> None:
        self.active = False
        self.calls: list[Call] = []
        self.outputs: list[Tensor] = []
        self.other_outputs: set[str] = set()
        self.layers_ran = False
        self._numbers = count()
        self.recomputed: set[str] = set()
        self._on_gradient = on_gradient
        self._handles = [
            layer.module.register_forward_hook(self._layer_hook(layer), with_kwargs=True) for layer in layers
        ]
        # Outputs recorded when a call of the output module began, for each of its calls that still runs.
        self._running: list[int] = []
        self._handles.append(output_module.register_forward_pre_hook(self._output_pre_hook(output_module)))
        self._handles.append(output_module.register_forward_hook(self._output_hook(output_module)))

    def _recording(self) -> bool:
        return self.active and torch.is_grad_enabled()

    # The hooks are plain functions, which copy.deepcopy takes over as they are: a copy of the model (weight averaging
    # makes one) then calls them with its own modules, and they ignore it.

    def _layer_hook(self, layer: Layer) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if module is not layer.module or not self._recording():
                return
            if in_backward():
                self.recomputed.add(layer.name)
                return
            if not output.requires_grad:
                return
            self.layers_ran = True
            x = args[0] if args else kwargs["input"]
            edge = gradient_edge(output) if self._on_gradient is None else None
            call = Call(layer, x.detach(), edge, len(self.outputs), next(self._numbers))
            if self._on_gradient is None:
                self.calls.append(call)
            else:
                on_gradient = self._on_gradient
                output.register_hook(lambda gradient: on_gradient(call, gradient.detach()))

        return hook

    def _output_pre_hook(self, output_module: nn.Module) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple) -> None:
            if module is output_module:
                self._running.append(len(self.outputs))

        return hook

    def _output_hook(self, output_module: nn.Module) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if module is not output_module or not self._running:
                return
            # DDP calls the root of a LightningModule around its training_step, which calls it again: the inner call
            # returns the logits, and the outer one the loss, in whatever form (perhaps after clear()).
            outer = len(self.outputs) > self._running.pop()
            if outer or not self._recording() or in_backward():
                return
            if isinstance(output, Tensor) and output.dim() > 0 and output.requires_grad:
                # Only a pass of our own needs the graph; a forward that no backward follows is freed otherwise.
                self.outputs.append(output if self._on_gradient is None else output.detach())
            else:
                shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
                self.other_outputs.add(f"{type(output).__name__}{shape}")

        return hook

    def clear(self) -> None:
        """Forget what was recorded; the graph it held on to can be freed."""
        self.calls.clear()
        self.outputs.clear()
        self.other_outputs.clear()
        self._running.clear()
        self.layers_ran = False

    def close(self) -> None:
        """Remove every hook; idempotent."""
        self.active = False
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
