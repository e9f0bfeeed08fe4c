"""The fine level: factors and inverses of every layer, spread over the ranks on KAISA's grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from kfac_dist.assignment import Assignment, LayerCost, Side, assign, nearest_divisor
from kfac_dist.comm import Communicator
from kfac_dist.config import DistributionConfig, KFACConfig
from kfac_dist.curvature import Health, InverseExchange, Reduced, factor_shapes, reduce_statistics
from kfac_dist.directions import DirectionExchange
from kfac_dist.factors import statistics_dtype
from kfac_dist.fine_damping import FineDamping
from kfac_dist.kept_rows import Rows
from kfac_dist.layers import Layer, covered_parameters
from kfac_dist.replicas import check_replicas, norm
from kfac_dist.state import LayerState
from kfac_dist.statistics import Statistics


def layer_cost(layer: Layer) -> LayerCost:
    """What the layer costs, for the assignment."""
    sizes = {side: (shape.size, shape.blocks) for side, shape in layer.factors.items()}
    return LayerCost(layer.name, layer.input_dim, layer.output_dim, layer.groups, sizes)


def wants_eigenbases(config: KFACConfig) -> bool:
    """Whether the damping has to act at use; a constant one can stand inside the inverses: half the products a step."""
    exact = config.damping_method == "eigen" and config.factor_sides == "both"
    return exact or callable(config.damping) or config.damping == "adaptive"


def assignment_of(
    layers: Sequence[Layer], config: KFACConfig, distribution: DistributionConfig, world_size: int
) -> Assignment:
    """Who inverts and who preconditions, at any world size; no communicator is needed."""
    fractions = {"comm_opt": 1.0, "mem_opt": 1.0 / world_size, "hybrid": distribution.gradient_worker_fraction}
    workers = nearest_divisor(world_size, fractions[distribution.strategy] or 1.0)
    costs = [layer_cost(layer) for layer in layers]
    staggered = config.inverse_schedule == "staggered"
    return assign(costs, world_size, workers, config.inverse_every_n_steps, config.factor_sides, staggered=staggered)


def factor_dtype(layers: Sequence[Layer]) -> torch.dtype:
    """The type of all factors: at least float32, and float64 where a layer is."""
    dtype = torch.float32
    for layer in layers:
        dtype = torch.promote_types(dtype, statistics_dtype(layer.dtype))
    return dtype


class OneLevel:
    """Block-diagonal K-FAC: statistics in, preconditioned gradients out.

    Args:
        layers: the layers that are preconditioned.
        config: the method.
        distribution: how the work is spread.
        world: the communicator of all ranks.
        eigen: hold eigendecompositions in any case (a coarse space asks for them).
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        config: KFACConfig,
        distribution: DistributionConfig,
        world: Communicator,
        *,
        eigen: bool = False,
    ) -> None:
        self.layers = layers
        self.config = config
        self.world = world
        self.device = layers[0].device
        self.dtype = factor_dtype(layers)
        self.damping = FineDamping(config)
        self.states = {layer.name: LayerState() for layer in layers}
        self.loss_scale = 1.0
        self.rebuild = False
        self.counts = dict.fromkeys(
            ("factor_updates", "inverse_updates", "dropped_statistics", "failed_ranks", "inverse_fallbacks"), 0
        )
        self._own_fallbacks = 0
        self._average_gradients = distribution.average_gradients
        self._distribute(distribution, eigen)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The factors that are kept."""
        return ("A", "G") if self.config.factor_sides == "both" else ("A",)

    def factor_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Side -> shape of the layer's stored factor."""
        return {side: shape.stored for side, shape in factor_shapes(layer, self.sides).items()}

    def _distribute(self, distribution: DistributionConfig, eigen: bool) -> None:
        """Decide who inverts and who preconditions, and make the communicators of this rank's column and row."""
        config, world = self.config, self.world
        self.assignment = assignment_of(self.layers, config, distribution, world.size)
        column = world.split(self.assignment.columns)
        row = world.split(self.assignment.rows)
        self.eigen = eigen or wants_eigenbases(config)
        self._inverses = InverseExchange(
            self.layers,
            self.sides,
            self.assignment,
            world.rank,
            column,
            eigen=self.eigen,
            factored=config.damping_method == "factored",
        )
        self.exchange = DirectionExchange(self.layers, self.assignment, world.rank, row, self.dtype)

    # -- factors --------------------------------------------------------------------------------------------------

    def factors_due(self, step: int) -> bool:
        """Every n steps, and at every step until there is a first update."""
        never = all(state.updates == 0 for state in self.states.values())
        return never or step % self.config.factor_every_n_steps == 0

    def update_factors(
        self, statistics: Statistics, local: Sequence[Tensor] = (), own: Sequence[nn.Parameter] = ()
    ) -> bool:
        """Sums and counts of all ranks -> this window's factors -> the moving average; False where it was dropped.

        Args:
            statistics: of this rank.
            local: what the gradients are made of that are not yet averaged.
            own: their parameters.

        Raises:
            RuntimeError: no rank has samples, or the replicas drifted apart.
        """
        parameters = covered_parameters(self.layers)
        apart = {id(parameter) for parameter in own}
        gradient_norm = norm([p.grad for p in parameters if p.grad is not None and id(p) not in apart])
        health = Health(
            statistics=statistics.finite(),
            gradients=gradient_norm < float("inf") and norm(local) < float("inf"),
            fallbacks=self._own_fallbacks,
            checksums=(gradient_norm, norm(parameters)),
        )
        reduced = reduce_statistics(self.layers, self.sides, statistics, health, self.world, self.dtype)
        statistics.release()  # as large as the inverses, which come next
        self._own_fallbacks = 0
        self.counts["inverse_fallbacks"] += reduced.fallbacks
        self.counts["failed_ranks"] += reduced.failed_ranks
        nothing = reduced.failed_ranks and not reduced.samples
        if reduced.bad_gradient_ranks or nothing or not reduced.finite:
            self.counts["dropped_statistics"] += 1
            return False
        check_replicas(reduced.checksums, self._average_gradients)
        if not reduced.samples:
            raise RuntimeError(
                "no rank accumulated a sample on this factor step: call kfac.accumulate() after every forward and "
                "before loss.backward(), with the model in training and gradients enabled"
            )
        self.counts["factor_updates"] += 1
        self.loss_scale = self._scale_of_loss(reduced)
        for name, state in self.states.items():
            if name in reduced.factors:
                state.update(reduced.factors[name], self.config.factor_decay)
            else:
                state.detach()
        return True

    def _scale_of_loss(self, reduced: Reduced) -> float:
        """c, where the training loss is c times the mean over samples of the negative log-likelihood."""
        reduction = self.config.loss_reduction
        if reduction == "mean":
            return 1.0
        if reduction == "sum":
            return reduced.summed / self.world.size
        if reduction == "mean_all":
            return reduced.samples / reduced.elements
        return float(reduction)

    # -- inverses -------------------------------------------------------------------------------------------------

    def _to_invert(self, step: int) -> list[str]:
        """The layers whose turn it is, and those with their first factors."""
        slot, slot_of = step % self.config.inverse_every_n_steps, self.assignment.slot_of
        states = self.states.items()
        return [name for name, s in states if s.updates and (s.inverted is None or slot_of[name] == slot)]

    def inverses_due(self, step: int) -> bool:
        """Whether it is some layer's turn, once in n steps, or a layer has its first factors, or a state was loaded."""
        return self.rebuild or bool(self._to_invert(step))

    def update_inverses(self, step: int, damping: float) -> None:
        """Invert the current factors of the layers that are due and, after a state was loaded, rebuild all others."""
        names = self._to_invert(step)
        self.counts["inverse_updates"] += bool(names)
        for name in names:
            if len(names) < len(
                self.states
            ):  # the next averages will lie elsewhere, and these be all that is left here
                self.states[name].detach()
            self.states[name].inverted = self.states[name].factors
        states = self.states if self.rebuild else {name: self.states[name] for name in names}
        outcomes = self._inverses.refresh(states, damping, self.dtype)
        self._own_fallbacks += sum(bool(outcome) for outcome in outcomes)
        self.rebuild = False

    # -- directions -----------------------------------------------------------------------------------------------

    def gradients(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Layer -> gradient matrix in units of the mean loss, for the layers that can be preconditioned now."""
        gradients: dict[str, Tensor] = {}
        for layer in self.layers:
            if layer.name in without:
                continue
            gradient = layer.gradient() if self.states[layer.name].inverted is not None else None
            if gradient is not None:
                gradient = gradient.to(self.dtype)
                gradients[layer.name] = gradient if self.loss_scale == 1.0 else gradient / self.loss_scale
        return gradients

    def precondition(
        self, gradients: Mapping[str, Tensor], damping: float, rows: Mapping[str, Rows] | None = None
    ) -> dict[str, Tensor]:
        """Layer -> zeta, on every rank; from the ``rows`` of the layers whose gradient they make."""
        return self.exchange.precondition(gradients, self.states, damping, rows)
