"""The operator of Tselepidis et al. 2020: K-FAC's approximation of the blocks between layers, summed up.

E_ij ~ sum(A_ij) sum(G_ij) T_ij with A_ij = mean a_i a_j^T and G_ij = mean g_i g_j^T over samples and locations. The sum
of all entries of A_ij is the mean of (1^T a_i)(1^T a_j), so only those scalars are formed, never the matrices. Layers
with unlike numbers of locations meet at the smaller one, the finer map averaged down to it.

Where an embedding's table is the weight of a linear map, only the calls of the map count.

A layer whose block has one factor (a norm) has no A and G to multiply: its coarse vector is zero.

The operator is an approximation and may be indefinite; it is here for comparison. The exact one of the constant vectors
("nicolaides") costs less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_dist.coarse.base import CoarseSpace, FineLevel, RankOne, Vector, coarse_spaces, constant_vector
from kfac_dist.layers import Layer
from kfac_dist.samples import KeptCall, Samples

POOLING: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
"""By the number of dimensions of a map; maps of unlike numbers are flattened first."""


@coarse_spaces.register("tselepidis")
class Tselepidis(CoarseSpace):
    """V_i = 1 / sqrt(p_i), m = L, with the approximate operator; meant for the additive correction."""

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        self._names = list(fine.shapes)
        self._factored = [i for i, name in enumerate(self._names) if name not in fine.joint]
        self._sizes = torch.tensor([float(g * o * i) for g, o, i in fine.shapes.values()], dtype=torch.float64)
        vectors = {name: constant_vector(shape, fine.gradients[name]) for name, shape in fine.shapes.items()}
        return {name: [v if name not in fine.joint else RankOne(0.0 * v.g, 0.0 * v.a)] for name, v in vectors.items()}

    def local_moment(self, Y: Tensor, samples: Samples) -> Tensor:
        """Sums of (1^T a_i)(1^T a_j), of (1^T g_i)(1^T g_j), and of T_ij over samples; (3, m, m)."""
        names = [self._names[i] for i in self._factored]
        moment = torch.zeros(3, len(names), len(names), dtype=torch.float64, device=Y.device)
        for batch in samples.batches:
            calls = {
                name: [call for call in batch.calls if call.layer.name == name and call.layer.input_side == "A"]
                for name in names
            }
            inputs = [_maps([_input_sums(call) for call in calls[name]], batch.size) for name in names]
            outputs = [
                [_maps([_output_sums(call, d) for call in calls[name]], batch.size) for name in names]
                for d in range(batch.draws)
            ]
            _add_cross_sums(moment[0], inputs, moment[2])
            for draw in outputs:
                _add_cross_sums(moment[1], draw, None)
        whole = moment.new_zeros(3, len(self._names), len(self._names))
        here = torch.tensor(self._factored, device=Y.device)
        whole[:, here[:, None], here[None, :]] = moment
        return whole

    def operator(self, moment: Tensor, samples: float) -> Tensor:
        """(S_A / (B T)) (S_G / (B T)) T, divided by sqrt(p_i p_j) for the unit vectors."""
        locations = (moment[2] / samples).clamp_min(1.0)
        raw = (moment[0] / (samples * locations)) * (moment[1] / (samples * locations)) * locations
        scale = self._sizes.to(raw).rsqrt()
        return raw * scale[:, None] * scale[None, :]


def _input_sums(call: KeptCall) -> Tensor:
    """1^T a at every location, with the constant of the bias: (n, *locations)."""
    layer = call.layer
    ones = torch.ones(layer.groups, 1, layer.input_dim, dtype=call.gradients[0].dtype, device=call.x.device)
    return _locations(layer, layer.forward_with(call.x, ones))


def _output_sums(call: KeptCall, draw: int) -> Tensor:
    """1^T g at every location: (n, *locations)."""
    return _locations(call.layer, call.gradients[draw])


def _locations(layer: Layer, values: Tensor) -> Tensor:
    """Sum over channels, which lie where the layer's output has them: last for rows of features, second for maps."""
    if values.dim() == 2 or layer.weight.dim() == 2:
        return values.sum(-1).double()
    return values.sum(1).double()


def _maps(calls: Sequence[Tensor], size: int) -> Tensor:
    """One map per sample, (n, *size) or (n, T): several calls of a layer follow each other as further locations."""
    if len(calls) == 1 and calls[0].dim() - 1 in POOLING and len(calls[0]) == size:
        return calls[0]
    return torch.cat([call.reshape(size, -1) for call in calls], dim=1)


def _resized(values: Tensor, like: Tensor) -> Tensor:
    """The map averaged down to the locations of ``like``: (n, T)."""
    if values.shape == like.shape:
        return values.flatten(1)
    if values.dim() == like.dim():
        return POOLING[values.dim() - 1](values, like.shape[1:]).flatten(1)
    return F.adaptive_avg_pool1d(values.flatten(1)[:, None], like[0].numel())[:, 0]


def _add_cross_sums(total: Tensor, maps: Sequence[Tensor], locations: Tensor | None) -> None:
    """Add sum over samples and locations of s_i s_j; pairs meet at the coarser of their two maps.

    One product per distinct number of locations, not one per pair of layers.
    """
    lengths = torch.tensor([values[0].numel() for values in maps])
    for length in lengths.unique().tolist():
        finer = [i for i, values in enumerate(maps) if values[0].numel() >= length]
        like = next(values for values in maps if values[0].numel() == length)
        stacked = torch.stack([_resized(maps[i], like).flatten() for i in finer])
        here = torch.tensor(finer, device=total.device)
        meets = torch.minimum(lengths[finer][:, None], lengths[finer][None, :]) == length
        products = (stacked @ stacked.mT) * meets.to(stacked)
        total[here[:, None], here[None, :]] += products
        if locations is not None:
            locations[here[:, None], here[None, :]] += meets.to(locations) * length * maps[0].shape[0]
