"""Who inverts which factor, and who preconditions which layer: a cost model, and schedules by it.

The ranks form KAISA's grid (Pauloski et al. 2021, section 3.1): W gradient workers make one column; a layer belongs to
one column, whose ranks all hold its inverses and precondition its gradient. Ranks at the same place of their columns
make one row, along which preconditioned gradients travel. W = world size is "comm_opt", W = 1 is "mem_opt".

Pure Python: costs are in multiply-adds up to a common constant, ranks are 0 .. world_size - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kfac_dist.balance import Phase, balance, longest_first

Side = Literal["A", "G"]
Sides = Literal["both", "input"]


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Attributes:
        name: the layer's name, unique in a model.
        input_dim: order a of the factor A of one group, the bias column included.
        output_dim: order g of the factor G of one group.
        groups: number of independent groups (grouped convolutions), each with its own A and G.
        factors: side -> (order, number) of its diagonal blocks; None: both factors are dense. A layer may lack G.
    """

    name: str
    input_dim: int
    output_dim: int
    groups: int = 1
    factors: Mapping[Side, tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        for field in ("input_dim", "output_dim", "groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"layer {self.name!r}: {field}={getattr(self, field)} must be at least 1")

    def blocks(self, sides: Sides = "both") -> Mapping[Side, tuple[int, int]]:
        """Side -> (order, number) of its blocks per group, for the sides that exist."""
        every = self.factors or {"A": (self.input_dim, 1), "G": (self.output_dim, 1)}
        return {side: block for side, block in every.items() if side in _sides(sides)}

    def inversion(self, side: Side) -> int:
        """Cost of inverting A or G once: the cube of the order of each block, per group; 0 without that factor."""
        order, number = self.blocks().get(side, (0, 0))
        return self.groups * number * order**3

    def preconditioning(self, sides: Sides = "both") -> int:
        """Cost of G^-1 grad A^-1, paid every step: a g (a + g) per group, and a^2 g with A alone.

        In the bracket blocks count with their order.
        """
        orders = (order for order, _ in self.blocks(sides).values())
        return self.groups * self.input_dim * self.output_dim * sum(orders)


@dataclass(frozen=True)
class Assignment:
    """The grid and its loads.

    Attributes:
        world_size: number of ranks.
        gradient_workers: ranks per column, W.
        columns: world_size / W columns of W contiguous ranks.
        rows: W rows of world_size / W ranks, one of each column.
        column_of: layer name -> index of its column.
        owner: (layer name, "A" | "G") -> the rank that inverts that factor, a rank of the layer's column.
        costs: the layers, in their order.
        slot_of: layer name -> the step, counted modulo the inversion interval, at which its inverses are renewed.
        sides: "both", or "input" where only A exists.
    """

    world_size: int
    gradient_workers: int
    columns: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    column_of: dict[str, int]
    owner: dict[tuple[str, Side], int]
    costs: tuple[LayerCost, ...]
    slot_of: dict[str, int]
    sides: Sides = "both"

    def preconditions(self, layer: str, rank: int) -> bool:
        """Whether ``rank`` holds the inverses of ``layer`` and preconditions its gradient."""
        return rank // self.gradient_workers == self.column_of[layer]  # columns are contiguous

    def inversion_load(self, rank: int) -> int:
        """Cost of the factors that ``rank`` inverts between two inversions of the same layer."""
        return sum(
            cost.inversion(side)
            for cost in self.costs
            for side in cost.blocks(self.sides)
            if self.owner[cost.name, side] == rank
        )

    def preconditioning_load(self, rank: int) -> int:
        """Cost of the layers that ``rank`` preconditions at every step."""
        return sum(cost.preconditioning(self.sides) for cost in self.costs if self.preconditions(cost.name, rank))


def _sides(sides: Sides) -> tuple[Side, ...]:
    return ("A", "G") if sides == "both" else ("A",)


def nearest_divisor(world_size: int, fraction: float) -> int:
    """The number of gradient workers: the divisor of ``world_size`` nearest to ``fraction * world_size``.

    Any world size works; of two divisors that are equally near, the larger one is taken.

    Raises:
        ValueError: ``world_size`` is below 1 or ``fraction`` is outside (0, 1].
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 1")
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    # Rounding keeps 0.3 * 10 = 3.0000000000000004 from deciding a tie.
    return min(divisors, key=lambda d: (round(abs(d - fraction * world_size), 9), -d))


def refresh_slots(costs: Sequence[LayerCost], every: int, sides: Sides = "both") -> dict[str, int]:
    """Layer name -> the one of ``every`` steps at which it is inverted, so that the steps are about equally long.

    A layer is the unit, as pi is made of both of its factors. Fewer layers than steps are spread evenly, and leave the
    first step, on which factors are often due as well, to those. The world size has no say: any number of ranks takes
    the same steps.
    """
    used = min(len(costs), every)
    places = longest_first([sum(map(cost.inversion, cost.blocks(sides))) for cost in costs], used)
    return {cost.name: ((place + 1) * every - 1) // used for cost, place in zip(costs, places, strict=True)}


def assign(
    costs: Sequence[LayerCost],
    world_size: int,
    gradient_workers: int,
    inverse_every_n_steps: int = 1,
    sides: Sides = "both",
    *,
    staggered: bool = False,
) -> Assignment:
    """Spread the layers over the columns and their factors over the ranks of the column.

    Preconditioning, at every step, and inverting, every ``inverse_every_n_steps``, both end when the last rank has
    done its share, so the columns are balanced in both. What is inverted at one step is spread over the ranks of its
    column. Deterministic: every rank computes the same answer without talking.

    Args:
        costs: the layers, in the same order on every rank.
        world_size: number of ranks.
        gradient_workers: W, a divisor of ``world_size`` (see :func:`nearest_divisor`).
        inverse_every_n_steps: steps between two inversions.
        sides: "both", or "input" where only A exists.
        staggered: invert some layers at each of these steps, instead of all at the first.

    Raises:
        ValueError: W does not divide the world size, or two layers have one name.
    """
    if world_size < 1 or gradient_workers < 1 or world_size % gradient_workers:
        raise ValueError(
            f"gradient_workers={gradient_workers} must be at least 1 and divide world_size={world_size}; "
            "nearest_divisor(world_size, fraction) gives one that does"
        )
    if inverse_every_n_steps < 1:
        raise ValueError(f"inverse_every_n_steps={inverse_every_n_steps} must be at least 1")
    names = [cost.name for cost in costs]
    if len(set(names)) < len(names):
        raise ValueError(f"layer names must be unique; twice: {sorted({n for n in names if names.count(n) > 1})}")
    starts = range(0, world_size, gradient_workers)
    columns = tuple(tuple(range(start, start + gradient_workers)) for start in starts)
    preconditioning = [cost.preconditioning(sides) for cost in costs]
    inversions = [sum(map(cost.inversion, _sides(sides))) / gradient_workers for cost in costs]
    phases = [Phase(preconditioning, inverse_every_n_steps), Phase(inversions)]
    column_of = dict(zip(names, balance(phases, len(columns)), strict=True))
    slot_of = refresh_slots(costs, inverse_every_n_steps, sides) if staggered else dict.fromkeys(names, 0)
    owner: dict[tuple[str, Side], int] = {}
    for index, column in enumerate(columns):
        before = [0.0] * gradient_workers
        members = [cost for cost in costs if column_of[cost.name] == index]
        for slot in sorted({slot_of[cost.name] for cost in members}):
            factors = [(cost, side) for cost in members if slot_of[cost.name] == slot for side in cost.blocks(sides)]
            places = longest_first([cost.inversion(side) for cost, side in factors], gradient_workers, before)
            for (cost, side), place in zip(factors, places, strict=True):
                owner[cost.name, side] = column[place]
                before[place] += cost.inversion(side)
    rows = tuple(zip(*columns, strict=True))
    return Assignment(world_size, gradient_workers, columns, rows, column_of, owner, tuple(costs), slot_of, sides)
