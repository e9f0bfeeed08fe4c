"""nn.Embedding: rows of a table, which is a linear map of one-hot vectors.

Theta is the transposed table (1, d, V). One-hot vectors have no second moments but their squares, so A is DIAGONAL (how
often each token occurs) and no V x V matrix exists. The row of ``padding_idx``, which torch never trains, is no part of
Theta, and the places that show it are no rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_dist.factors import FactorShape, second_moment_sum
from kfac_dist.layers.base import Layer, layers, parameter_refusal
from kfac_dist.layers.linear_map import LinearMap
from kfac_dist.layers.watch import Part, Record, watch_calls


@layers.register("embedding")
class EmbeddingLayer(Layer):
    """nn.Embedding over tokens of any shape."""

    module: nn.Embedding

    def __init__(self, name: str, module: nn.Embedding) -> None:
        super().__init__(name, module)
        self.factors["A"] = FactorShape(1, self.input_dim, self.input_dim)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        if not isinstance(module, nn.Embedding):
            return ""
        if type(module).forward is not nn.Embedding.forward:
            return f"{type(module).__name__} is an Embedding with a forward of its own"
        if module.sparse:
            return "its gradient is sparse: build it with sparse=False"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True makes its gradient none of the loss: build it without"
        if module.max_norm is not None:
            return (
                "max_norm changes its weight in the forward, on every rank for the tokens seen there: build it without "
                "and clip the rows after the optimizer's step (weight.data.renorm_(2, 0, max_norm))"
            )
        if module.num_embeddings == 1 and module.padding_idx is not None:
            return "its only row is that of padding_idx"
        return parameter_refusal(module)

    @classmethod
    def use_of(cls, owner: Layer, module: nn.Module) -> Layer | None:
        """See :meth:`Layer.use_of`."""
        assert isinstance(module, nn.Embedding)  # as this family treats it
        if isinstance(owner, LinearMap):
            return _TableUse(owner, module)
        same = isinstance(owner, cls) and owner.module.padding_idx == module.padding_idx
        return super().use_of(owner, module) if same else None

    # -- Theta ----------------------------------------------------------------------------------------------------

    def weight_to_matrix(self, weight: Tensor) -> Tensor:
        """(V, d) as (1, d, V), without the row of ``padding_idx``."""
        return self._trained(weight).mT[None]

    def matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """The inverse, with zeros in the row of ``padding_idx``."""
        table, padding = matrix[0].mT, self.module.padding_idx
        if padding is None:
            return table
        return torch.cat([table[:padding], table.new_zeros(1, table.shape[1]), table[padding:]])

    def _trained(self, table: Tensor) -> Tensor:
        """The rows of (V, ..) that Theta has."""
        padding = self.module.padding_idx
        return table if padding is None else torch.cat([table[:padding], table[padding + 1 :]])

    # -- one call -------------------------------------------------------------------------------------------------

    def watch(self, record: Record) -> list[RemovableHandle]:
        """See :meth:`Layer.watch`; what arrives where a token is padding reaches no parameter."""

        def part(x: Tensor, g: Tensor) -> Part:
            kept = self.row_weights(x)
            return Part(self, x, g if kept is None else g * kept.view(*x.shape, 1))

        return watch_calls(self, record, part)

    def row_weights(self, x: Tensor) -> Tensor | None:
        """See :meth:`Layer.row_weights`."""
        return None if self.module.padding_idx is None else x.reshape(-1) != self.module.padding_idx

    def leading(self, x: Tensor) -> int:
        """See :meth:`Layer.leading`: all of the indices."""
        return x.dim()

    def shared(self, x: Tensor, samples: int) -> bool:
        """Indices without a batch dimension: known by their shape or, where that is no proof, by their running on.

        As many flat indices as samples are taken for one of each.
        """
        tokens = x.reshape(-1)
        if samples == 1 or (len(tokens) == samples and x.dim() == 1):
            return False
        if x.shape[0] == 1 or len(tokens) % samples:
            return True
        return torch.equal(tokens, torch.arange(len(tokens), device=x.device) + tokens[:1])

    def input_rows(self, x: Tensor) -> Tensor:
        """The one-hot vectors, (1, R, V): what the moment counts without them, and nothing for a large V."""
        one_hot = F.one_hot(x.reshape(-1), self.module.num_embeddings).to(self.dtype)
        return self._trained(one_hot.mT).mT[None]

    def output_rows(self, g: Tensor) -> Tensor:
        """(.., d) as (1, R, d)."""
        return g.reshape(1, -1, g.shape[-1])

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`."""
        return F.embedding(x, self.matrix_to_weight(theta))

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        rows = g.reshape(-1, g.shape[-1])
        return self.weight_to_matrix(self._sums(x.reshape(-1), rows))

    def input_moment(
        self, x: Tensor, dtype: torch.dtype, weights: Tensor | None = None, samples: int | None = None
    ) -> Tensor:
        """See :meth:`Layer.input_moment`: counts and, with ``samples``, squares of the shares within each of them."""
        tokens = x.reshape(-1)
        values = torch.ones(len(tokens), dtype=dtype, device=x.device)
        if weights is not None:
            values = weights.to(values)
        if samples is not None:
            sample = torch.arange(samples, device=x.device).repeat_interleave(len(tokens) // samples)
            pairs, place = torch.unique(sample * self.module.num_embeddings + tokens, return_inverse=True)
            counts = values.new_zeros(len(pairs)).index_add_(0, place, values)
            locations = values.view(samples, -1).sum(1).clamp_min(1.0)
            tokens = pairs % self.module.num_embeddings
            values = (counts / locations[pairs // self.module.num_embeddings]).square()
        counted = self._sums(tokens, values[:, None])
        return self._trained(counted).reshape(-1, 1, 1)

    def _sums(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """For every token the sum of its rows, (V, d)."""
        return rows.new_zeros(self.module.num_embeddings, rows.shape[1]).index_add_(0, tokens, rows)


class _TableUse(EmbeddingLayer):
    """The calls of an embedding whose table is the weight of a linear map, as calls of the map's layer.

    Theta is the map's, [W | b] with a row per token, and a call's gradient is onehot [g, 0]^T: the counts go to the
    map's G, which is diagonal for that, and the gradients to its A. The row of padding has no part in these calls.
    """

    input_side = "G"

    def __init__(self, owner: LinearMap, module: nn.Embedding) -> None:
        self._owner = owner
        super().__init__(owner.name, module)
        owner.factors["G"] = FactorShape(1, owner.output_dim, owner.output_dim)
        self.factors = owner.factors

    def _trained(self, table: Tensor) -> Tensor:
        padding = self.module.padding_idx
        return table if padding is None else table.index_fill(0, torch.tensor(padding, device=table.device), 0.0)

    def weight_to_matrix(self, weight: Tensor) -> Tensor:
        """(V, d) as a Theta of the map."""
        return F.pad(self._trained(weight), (0, int(self._owner.has_bias)))[None]

    def matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """The table of a Theta of the map."""
        return self._trained(matrix[0, :, : self.module.embedding_dim])

    def rows(self, g: Tensor) -> int:
        """See :meth:`Layer.rows`."""
        return g.numel() // g.shape[-1]

    def output_moment(self, g: Tensor, dtype: torch.dtype, samples: int | None = None) -> Tensor:
        """See :meth:`Layer.output_moment`: a part of the map's A."""
        rows = self.output_rows(g).to(dtype)
        if samples is not None:
            rows = rows.view(1, samples, -1, rows.shape[2]).sum(2)
        return second_moment_sum(F.pad(rows, (0, int(self._owner.has_bias))), blocks=self.factors["A"].blocks)
