"""nn.LSTM, nn.GRU, nn.RNN and their cells: each weight matrix is a linear map of the rows of all time steps.

The fused kernels do not show what enters the gates. The recurrence is therefore run again in plain operations, from the
same inputs, when the gradients of the module's outputs are known; the gradients at its linear maps are the layers' g.
The reset gate of a GRU acts on one of its two maps, so that their gradients differ.

Layers are named after the weights: ``ih_l0`` for weight_ih_l0, ``hh_l1_reverse``, ``hr_l0`` (an LSTM's projection), and
``ih`` and ``hh`` of a cell. Their rows are (B, T, ..).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from kfac_dist.compat import uncompiled
from kfac_dist.config import LayerOptions
from kfac_dist.layers.base import layers
from kfac_dist.layers.linear_map import MapOfSeveral
from kfac_dist.layers.recurrence import Recurrence, places
from kfac_dist.layers.watch import Part, Record, Split, of_one_node

KINDS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


@layers.register("recurrent")
class RecurrentLayer(MapOfSeveral):
    """One weight matrix and its bias.

    Args:
        name: the map's name in the model.
        module: the recurrent module.
        suffix: what follows ``weight_`` and ``bias_`` in the names of the parameters.
    """

    module: nn.RNNBase | nn.RNNCellBase

    def __init__(self, name: str, module: nn.Module, suffix: str) -> None:
        super().__init__(name, module, weight=f"weight_{suffix}", bias=f"bias_{suffix}")
        self.suffix = suffix

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return ""
        kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
        if kind is None or type(module).forward is not kind.forward:
            return f"{type(module).__name__} is a recurrent module with a forward of its own"
        if any(module._parameters.get(f"weight_{suffix}") is None for suffix in _suffixes(module)):
            return "its weight is computed from other parameters (a parametrization)"
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
            return (
                "the dropout between its layers cannot be drawn a second time: use dropout=0, or a module for each "
                "layer with nn.Dropout between them"
            )
        return "its weight is complex" if next(module.parameters()).is_complex() else None

    @classmethod
    def adapt(cls, name: str, module: nn.Module, options: LayerOptions) -> Sequence[MapOfSeveral]:
        """See :meth:`Layer.adapt`."""
        prefix = f"{name}." if name else ""
        trained = [
            suffix
            for suffix in _suffixes(module)
            if any(
                p is not None and p.requires_grad
                for p in (module._parameters.get(f"{kind}_{suffix}") for kind in ("weight", "bias"))
            )
        ]
        return cls.together([cls(prefix + suffix, module, suffix) for suffix in trained], options)

    def watch_siblings(self, record: Record) -> list[RemovableHandle]:
        """See :meth:`Layer.watch`."""
        recurrent, maps = self.module, cast(Sequence[RecurrentLayer], self.siblings)
        names = [one.name for one in maps]

        @uncompiled
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if module is not recurrent or not record.wanted(names):
                return None
            given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
            if isinstance(given["input"], PackedSequence):
                warnings.warn(
                    f"{', '.join(names)}: a PackedSequence is not treated, and the gradient stays plain; give padded "
                    "sequences",
                    stacklevel=2,
                )
                return None
            outputs, rebuild = _flatten(output)
            if not all(tensor.requires_grad for tensor in outputs):
                return None
            if len(outputs) > 1:
                outputs = of_one_node(outputs)
            record(names, outputs, _split(maps, Recurrence(module, given["input"], given.get("hx"))))
            return rebuild(outputs)

        return [recurrent.register_forward_hook(hook, with_kwargs=True)]


def _split(maps: Sequence[RecurrentLayer], recurrence: Recurrence) -> Split:
    def split(gradients: Sequence[Tensor | None]) -> Sequence[Part]:
        found = recurrence.rows([one.suffix for one in maps], gradients)
        return [Part(one, *rows) for one, rows in zip(maps, found, strict=True)]

    return split


def _suffixes(module: Any) -> list[str]:
    """What follows ``weight_`` in the names of the parameters."""
    maps = ("ih", "hh", "hr") if getattr(module, "proj_size", 0) else ("ih", "hh")
    return [f"{one}{place}" for place in places(module) for one in maps]


def _flatten(output: Any) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Any]]:
    """The tensors that a recurrent module returns, and what puts them into its form again."""
    if isinstance(output, Tensor):
        return (output,), lambda tensors: tensors[0]
    first, second = output
    if isinstance(second, Tensor):
        return (first, second), lambda tensors: (tensors[0], tensors[1])
    return (first, *second), lambda tensors: (tensors[0], tuple(tensors[1:]))
