"""The step family: zeta itself is in the space, so the coarse level chooses step sizes in the metric of F.

"layer_step" generalises the exact rescaling of Martens and Grosse 2015, section 7, to one step size per layer, and
"layer_step_momentum" their (alpha, mu). "scalar" and "scalar_momentum" are that rescaling itself, one coefficient per
vector for the whole network: the baselines. None of them needs F v in parameter space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kfac_dist.coarse.base import FineLevel, StepSpace, Vector, coarse_spaces

FEW = 64
"""Samples that are enough where no vector is made of them (benchmarks/coarse_interval.md)."""


@coarse_spaces.register("layer_step")
class LayerStep(StepSpace):
    """V_i = zeta_i: the optimal step size of every layer; m = L."""

    least_samples = FEW

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        return {name: [zeta] for name, zeta in fine.directions.items()}


@coarse_spaces.register("layer_step_momentum")
class LayerStepMomentum(StepSpace):
    """V_i = [zeta_i, delta_i], delta the direction handed out before: a step size and a momentum per layer; m = 2 L.

    The learning-rate-free mode: the outer optimizer is SGD(lr=1, momentum=0).
    """

    uses_momentum = True
    fixed_count = 2
    least_samples = FEW

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        delta = fine.momentum
        return {
            name: [zeta] if delta is None or name not in delta else [zeta, delta[name]]
            for name, zeta in fine.directions.items()
        }


@coarse_spaces.register("scalar")
class Scalar(LayerStep):
    """V = zeta, one optimal step size for the whole network; m = 1."""

    spans_network = True


@coarse_spaces.register("scalar_momentum")
class ScalarMomentum(LayerStepMomentum):
    """V = [zeta, delta]: the (alpha, mu) of Martens and Grosse 2015, section 7; m = 2."""

    spans_network = True
