"""From gradients to preconditioned directions, on every rank or on the owners and then everywhere.

Words: nothing under "comm_opt"; else the sum of a g over the layers, in one exchange among the ranks of a row, which
hold one member of every column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.assignment import Assignment
from kfac_dist.comm import Communicator
from kfac_dist.fused import FusedBuffer
from kfac_dist.kept_rows import Rows
from kfac_dist.layers import Layer
from kfac_dist.state import LayerState


class DirectionExchange:
    """zeta_i = (G (x) A + damping)^-1 grad_i for every layer, on every rank.

    Args:
        layers: all layers.
        assignment: which ranks precondition which layer.
        rank: this process's rank in the world.
        row: the communicator of this rank's row.
        dtype: the type of the directions.
    """

    def __init__(
        self, layers: Sequence[Layer], assignment: Assignment, rank: int, row: Communicator, dtype: torch.dtype
    ) -> None:
        self._mine = {layer.name for layer in layers if assignment.preconditions(layer.name, rank)}
        self._row = row
        self._shapes = {layer.name: layer.shape for layer in layers}
        self._buffer: FusedBuffer | None = None
        if row.size > 1:
            sizes = {name: shape[0] * shape[1] * shape[2] for name, shape in self._shapes.items()}
            self._buffer = FusedBuffer(sizes, dtype, layers[0].device)  # type: ignore[arg-type]

    def precondition(
        self,
        gradients: Mapping[str, Tensor],
        states: Mapping[str, LayerState],
        damping: float,
        rows: Mapping[str, Rows] | None = None,
    ) -> dict[str, Tensor]:
        """Layer -> direction (groups, g, a), for the layers of ``gradients``; the same on every rank.

        Args:
            gradients: layer -> gradient (groups, g, a).
            states: layer -> its inverses.
            damping: lam.
            rows: layer -> the rows of which a gradient is made, where the direction is to be made of them, too.
        """
        rows, directions = rows or {}, dict[str, Tensor]()
        for name, gradient in gradients.items():
            preconditioner = states[name].preconditioner
            if preconditioner is None:
                continue
            if name in rows:
                direction = preconditioner.apply_to_rows(*rows[name], damping)
            else:
                direction = preconditioner.apply(gradient, damping)
            # A product's rows may begin at cache lines: norms and inner products take a multiple of this copy then.
            directions[name] = direction.contiguous()
        return self.share(directions, gradients)

    def share(self, directions: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """What the ranks of this row hold together: the tensors of all ``names`` from those of this rank's layers."""
        if self._buffer is None:
            return dict(directions)
        self._buffer.flat.zero_()
        for name, direction in directions.items():
            self._buffer[name].copy_(direction.reshape(-1))
        self._row.all_reduce(self._buffer.flat, phase="directions")
        # Clones: the buffer is used again at the next step, and callers may keep a direction.
        return {name: self._buffer[name].view(self._shapes[name]).clone() for name in names}
