"""Module hooks: what went into a layer, and where the gradient of what came out of it will arrive.

The capture owns its hook handles. It records in training only (gradients enabled and an output that requires one),
never during the recomputation of a checkpointed forward, and only while ``active``. A layer's output is remembered by
its gradient edge, not as a tensor: an in-place activation behind the layer would move the tensor in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.compat import GradientEdge, gradient_edge, in_backward, in_transform, uncompiled
from kfac_dist.layers import Layer, Part
from kfac_dist.layers.watch import Split, silenced


@dataclass(frozen=True)
class Call:
    """One call of one module: the edges of its outputs in the graph, and which forward it was part of.

    ``edges`` is empty where a hook on the outputs delivers the gradients: the graph holds the hook and the hook this
    call, so with an edge, which holds the graph, nobody could ever free it. ``forward`` counts the outputs recorded
    before this call, so that it is the index of the output it led to; ``number`` tells all calls apart.
    """

    edges: tuple[GradientEdge, ...]
    split: Split
    forward: int
    number: int

    def parts(self, gradients: Sequence[Tensor | None]) -> Sequence[Part]:
        """What the call was to each of its layers; nothing where none of its outputs leads to the logits."""
        return self.split(gradients) if any(g is not None for g in gradients) else ()


class Capture:
    """Records the calls of ``layers`` and the outputs of one module (it fulfils :class:`kfac_dist.layers.Record`).

    Args:
        layers: the layers to watch.
        output_module: the module whose output is the logits.
        on_gradients: called with a call and the gradients of its outputs during every training backward (the empirical
            Fisher); None: gradients are asked for later, at the edges.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        output_module: nn.Module,
        on_gradients: Callable[[Call, Sequence[Tensor | None]], None] | None = None,
    ) -> None:
        self.active = False
        self.calls: list[Call] = []
        self.outputs: list[Tensor] = []
        self.other_outputs: set[str] = set()
        self.layers_ran = False
        self._numbers = count()
        self.recomputed: set[str] = set()
        self._on_gradients = on_gradients
        self._handles = [handle for layer in layers for use in (layer, *layer.uses) for handle in use.watch(self)]
        # Outputs recorded when a call of the output module began, for each of its calls that still runs.
        self._running: list[int] = []
        self._handles.append(output_module.register_forward_pre_hook(self._output_pre_hook(output_module)))
        self._handles.append(output_module.register_forward_hook(self._output_hook(output_module)))

    def _recording(self) -> bool:
        return self.active and torch.is_grad_enabled() and not silenced() and not in_transform()

    def wanted(self, names: Sequence[str]) -> bool:
        """See :class:`kfac_dist.layers.Record`."""
        if not self._recording():
            return False
        if in_backward():
            self.recomputed.update(names)
            return False
        return True

    def __call__(self, names: Sequence[str], outputs: Sequence[Tensor], split: Split) -> None:
        """See :class:`kfac_dist.layers.Record`."""
        if not all(output.requires_grad for output in outputs):
            return
        self.layers_ran = True
        on_gradients = self._on_gradients
        edges = tuple(gradient_edge(output) for output in outputs) if on_gradients is None else ()
        call = Call(edges, split, len(self.outputs), next(self._numbers))
        if on_gradients is None:
            self.calls.append(call)
        elif len(outputs) == 1:
            outputs[0].register_hook(lambda gradient: on_gradients(call, [gradient.detach()]))
        else:  # they leave one node; a hook that waited for all of them would hold the graph that holds it
            node = outputs[0].grad_fn
            assert node is not None
            node.register_prehook(
                lambda gradients: on_gradients(call, [g if g is None else g.detach() for g in gradients])
            )

    # The hooks are plain functions, which copy.deepcopy takes over as they are: a copy of the model (weight averaging
    # makes one) then calls them with its own modules, and they ignore it.

    def _output_pre_hook(self, output_module: nn.Module) -> Callable[..., None]:
        @uncompiled
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is output_module and not silenced() and not in_transform():
                self._running.append(len(self.outputs))

        return hook

    def _output_hook(self, output_module: nn.Module) -> Callable[..., None]:
        @uncompiled
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if module is not output_module or not self._running or silenced() or in_transform():
                return
            # DDP calls the root of a LightningModule around its training_step, which calls it again: the inner call
            # returns the logits, and the outer one the loss, in whatever form (perhaps after clear()).
            outer = len(self.outputs) > self._running.pop()
            if outer or not self._recording() or in_backward():
                return
            if isinstance(output, Tensor) and output.dim() > 0 and output.requires_grad:
                # Only a pass of our own needs the graph; a forward that no backward follows is freed otherwise.
                self.outputs.append(output if self._on_gradients is None else output.detach())
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
