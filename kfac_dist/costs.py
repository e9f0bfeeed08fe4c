"""What K-FAC costs a rank: bytes sent, bytes held, and a forecast of the step time. Pure Python.

Bytes and collectives are exact, and counted in tests; times are a model with five measured rates:
    products        flops / gemm
    factorisations  sum of the cubes of the orders / cholesky (or / eigh)
    passes          bytes read or written / memory
    collectives     2 (P - 1) / P bytes / bandwidth + 2 ceil(log2 P) latency, a ring among P ranks
    operations      each layer's small ones, by their number
Nothing is taken to overlap, so that what overlaps in fact is a gain over the forecast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfac_dist.assignment import Assignment, LayerCost, Sides, assign, nearest_divisor
from kfac_dist.balance import makespan_lower_bound
from kfac_dist.networks import LayerWork, Network

OPERATIONS = {"forward and backward": 6, "factors": 20, "inverses": 20, "precondition": 12}
"""Small operations per layer and phase."""

PASSES = {"update": 5, "precondition": 9, "factors": 8, "inverses": 6}
"""How often the parameters (update, precondition) or the factors (factors, inverses) are read or written."""


@dataclass(frozen=True)
class Method:
    """K-FAC's settings, as far as costs go.

    Attributes:
        factor_every: steps between updates of the factors.
        inverse_every: steps between inversions.
        eigen: eigendecompositions are held, rather than inverses.
        sides: "both", or "input" where only A exists.
        draws: backward passes for sampled targets; 0 for the empirical Fisher.
        word: bytes of a number.
        coarse: dimension of the coarse space; 0 for one level.
        coarse_every: steps between coarse solves.
        coarse_samples: samples that are kept for it, over all ranks.
        by_rows: on one rank, directions are made of a batch's rows where that is less work (as they are on a CPU).
    """

    factor_every: int = 10
    inverse_every: int = 100
    eigen: bool = False
    sides: Sides = "both"
    draws: int = 1
    word: int = 4
    coarse: int = 0
    coarse_every: int = 1
    coarse_samples: int = 256
    by_rows: bool = False


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.

    Attributes:
        gemm: flops per second of matrix products.
        cholesky: n^3 per second of a Cholesky inverse of order n.
        eigh: n^3 per second of a symmetric eigendecomposition.
        memory: bytes per second, read or written.
        bandwidth: bytes per second into and out of a rank.
        latency: seconds of one hop of a collective.
        operation: seconds of a small operation.
    """

    gemm: float
    cholesky: float
    eigh: float
    memory: float
    bandwidth: float
    latency: float
    operation: float

    @classmethod
    def from_rates(cls, flops: float, bandwidth: float) -> Machine:
        """An accelerator with these two: the other rates by proportions that are usual, not measured."""
        return cls(flops, flops / 20, flops / 400, flops / 10, bandwidth, 10e-6, 5e-6)

    def collective(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce of ``size`` bytes."""
        if ranks == 1 or not size:
            return 0.0
        return 2 * (ranks - 1) / ranks * size / self.bandwidth + 2 * math.ceil(math.log2(ranks)) * self.latency


# -- bytes ------------------------------------------------------------------------------------------------------------


def inverse_words(cost: LayerCost, method: Method) -> int:
    """Words of a layer's inverses, or of its eigenvectors and eigenvalues."""
    blocks = cost.blocks(method.sides).values()
    return cost.groups * sum(number * (order**2 + order * method.eigen) for order, number in blocks)


def packed_words(cost: LayerCost, sides: Sides) -> int:
    """Words of a layer's factors, of which upper triangles are stored and sent."""
    return cost.groups * sum(number * order * (order + 1) // 2 for order, number in cost.blocks(sides).values())


def traffic(assignment: Assignment, method: Method, rank: int = 0) -> dict[str, tuple[int, int]]:
    """Phase -> collectives and payload bytes on a step on which it takes place; phases that send nothing are absent."""
    costs, word, ranks = assignment.costs, method.word, assignment.world_size
    sent: dict[str, tuple[int, int]] = {}
    if ranks > 1:
        header = 7 + len(costs) + 2 * ranks
        sent["factors"] = 1, word * (header + sum(packed_words(cost, method.sides) for cost in costs))
    mine = [cost for cost in costs if assignment.preconditions(cost.name, rank)]
    if assignment.gradient_workers > 1 and mine:
        words = inverse_words if method.eigen else lambda cost, method: packed_words(cost, method.sides)
        sent["inverses"] = 1, word * sum(words(cost, method) + len(cost.blocks(method.sides)) for cost in mine)
    if assignment.gradient_workers < ranks:
        sent["directions"] = 1, word * sum(cost.groups * cost.input_dim * cost.output_dim for cost in costs)
    if ranks > 1 and method.coarse:
        m = method.coarse  # float64: [Y Y^T | Y w | count] to rank 0, [status | beta] back
        sent["coarse"] = 2, 8 * (m * (m + 1) // 2 + m + 1 + m + 1)
    return sent


def memory(assignment: Assignment, method: Method, rank: int = 0) -> dict[str, int]:
    """What is held between steps -> bytes: averages, the averages of the last inversion, inverses, the row's buffer."""
    factors = method.word * sum(packed_words(cost, method.sides) for cost in assignment.costs)
    mine = [cost for cost in assignment.costs if assignment.preconditions(cost.name, rank)]
    return {
        "factors": factors,
        "inverted": factors if method.inverse_every > method.factor_every else 0,
        "inverses": method.word * sum(inverse_words(cost, method) for cost in mine),
        "directions": traffic(assignment, method, rank).get("directions", (0, 0))[1],
    }


# -- work -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """How one phase's work lies on the ranks, in units of the assignment.

    Attributes:
        longest: the most loaded rank's.
        bound: no schedule has less; with more than one rank per column, of the same work without that constraint.
        total: of all jobs.
        largest: the longest job.
    """

    longest: float
    bound: float
    total: float
    largest: float

    @property
    def ratio(self) -> float:
        """How far the schedule is above the bound."""
        return self.longest / self.bound if self.bound else 1.0


def inversions(assignment: Assignment) -> Load:
    """Of one inversion of everything; a job is a factor or, under mem_opt, a layer."""
    ranks, sides = assignment.world_size, assignment.sides
    jobs: list[float] = []
    loads = [0.0] * ranks
    for cost in assignment.costs:
        each = {side: float(cost.inversion(side)) for side in cost.blocks(sides)}
        jobs += [sum(each.values())] if assignment.gradient_workers == 1 else each.values()
        for side, job in each.items():
            loads[assignment.owner[cost.name, side]] += job
    return Load(max(loads), makespan_lower_bound(jobs, ranks), sum(jobs), max(jobs, default=0.0))


def preconditioning(assignment: Assignment) -> Load:
    """Of one step; a job is a layer, and a worker a column, all of whose ranks do the same."""
    jobs = [float(cost.preconditioning(assignment.sides)) for cost in assignment.costs]
    loads = [0.0] * len(assignment.columns)
    for cost, job in zip(assignment.costs, jobs, strict=True):
        loads[assignment.column_of[cost.name]] += job
    return Load(max(loads), makespan_lower_bound(jobs, len(loads)), sum(jobs), max(jobs, default=0.0))


# -- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """One way to spread the work over so many ranks.

    Attributes:
        assignment: who does what.
        traffic: phase -> (collectives, bytes) when it takes place, of the rank that sends most.
        memory: what -> bytes, of the rank that holds most.
        inversions: the balance of the inversions.
        preconditioning: the balance of the preconditioning.
        phases: phase -> seconds when it takes place.
        sgd: seconds of a plain step.
        method: the settings.
    """

    assignment: Assignment
    traffic: dict[str, tuple[int, int]]
    memory: dict[str, int]
    inversions: Load
    preconditioning: Load
    phases: dict[str, float]
    sgd: float
    method: Method

    @property
    def every(self) -> dict[str, int]:
        """Phase -> steps between two of them."""
        method = self.method
        return {
            "factors": method.factor_every,
            "inverses": method.inverse_every,
            "directions": 1,
            "precondition": 1,
            "coarse": method.coarse_every,
        }

    @property
    def step(self) -> float:
        """Seconds of a step, on average."""
        return self.sgd + sum(seconds / self.every[phase] for phase, seconds in self.phases.items())

    @property
    def bytes_per_step(self) -> float:
        """What K-FAC sends, on average; the gradients of data parallelism are not among it."""
        return sum(size / self.every[phase] for phase, (_, size) in self.traffic.items())

    @property
    def collectives_per_step(self) -> float:
        """K-FAC's collectives, on average."""
        return sum(count / self.every[phase] for phase, (count, _) in self.traffic.items())


def forecast(
    network: Network, method: Method, machine: Machine, world_size: int, workers: int, batch: int | None = None
) -> Forecast:
    """What a training on ``world_size`` ranks with ``workers`` gradient workers per layer would cost.

    Args:
        network: what is trained.
        method: K-FAC's settings.
        machine: the rates of a rank.
        world_size: number of ranks.
        workers: ranks that hold a layer's inverses, a divisor of the world size.
        batch: samples per rank; None: the network's own.
    """
    assignment = assign(network.costs, world_size, workers, method.inverse_every, method.sides)
    heads = [column[0] for column in assignment.columns]
    sent = max((traffic(assignment, method, rank) for rank in heads), key=lambda each: each.get("inverses", (0, 0)))
    held = max((memory(assignment, method, rank) for rank in heads), key=lambda each: each["inverses"])
    invert, precondition = inversions(assignment), preconditioning(assignment)
    batch = network.batch if batch is None else batch
    word, layers = method.word, len(network.layers)
    steps = {name: machine.operation * number * layers for name, number in OPERATIONS.items()}
    ranks_of = {"factors": world_size, "inverses": workers, "directions": world_size // workers, "coarse": world_size}
    talk = {name: machine.collective(size, ranks_of[name]) for name, (_, size) in sent.items()}

    sgd = 3 * network.flops * batch / machine.gemm + steps["forward and backward"]
    sgd += word * network.parameters * PASSES["update"] / machine.memory
    sgd += machine.collective(word * network.parameters, world_size)
    busy = precondition.longest / precondition.total if precondition.total else 0.0
    products = (4 if method.eigen else 2) * precondition.longest
    if method.by_rows and world_size == 1:
        products -= sum(_saved_by_rows(layer, method, batch) for layer in network.layers)
    phases = {
        "precondition": products / machine.gemm
        + word * network.parameters * PASSES["precondition"] * busy / machine.memory
        + steps["precondition"] * busy
    }
    moments = sum(_moment_flops(layer, method.sides) for layer in network.layers) * batch
    phases["factors"] = (
        (moments + method.draws * network.flops * batch) / machine.gemm
        + held["factors"] * PASSES["factors"] / machine.memory
        + steps["factors"]
        + talk.get("factors", 0.0)
    )
    rate = machine.eigh if method.eigen else machine.cholesky
    phases["inverses"] = (
        invert.longest / rate
        + held["inverses"] * PASSES["inverses"] / machine.memory
        + steps["inverses"] * (invert.longest / invert.total if invert.total else 0.0)
        + talk.get("inverses", 0.0)
    )
    if "directions" in talk:
        phases["directions"] = talk["directions"]
    if method.coarse:
        kept = math.ceil(method.coarse_samples / world_size)
        phases["coarse"] = network.flops * kept * max(1, round(method.coarse / layers)) / machine.gemm
        phases["coarse"] += method.coarse**3 / machine.cholesky + 2 * talk.get("coarse", 0.0)
        phases["coarse"] += steps["precondition"]
    return Forecast(assignment, sent, held, invert, precondition, phases, sgd, method)


def _saved_by_rows(layer: LayerWork, method: Method, batch: int) -> float:
    """Flops that an nn.Linear with dense factors saves where its direction is made of the rows of ``batch`` samples."""
    cost, rows = layer.cost, layer.rows * batch
    if not layer.plain or any(number > 1 for _, number in cost.blocks(method.sides).values()):
        return 0.0
    squares = sum(order**2 for order, _ in cost.blocks(method.sides).values())
    dense = cost.preconditioning(method.sides)
    return max(0.0, 2.0 * (dense - rows * (squares + cost.input_dim * cost.output_dim)))


def _moment_flops(layer: LayerWork, sides: Sides) -> float:
    """Of a a^T and g g^T, per sample: diagonal and one-hot ones cost next to nothing."""
    rows = 1.0 if layer.joint else layer.rows
    return (
        2.0 * rows * layer.cost.groups * sum(number * order**2 for order, number in layer.cost.blocks(sides).values())
    )


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def strategies(
    network: Network, method: Method, machine: Machine, world_size: int, batch: int | None = None
) -> dict[str, Forecast]:
    """By name: comm_opt, mem_opt and "best", the number of workers with the shortest step; of equals, the fewest."""
    found = {w: forecast(network, method, machine, world_size, w, batch) for w in divisors(world_size)}
    best = min(found, key=lambda w: (found[w].step, w))
    return {
        "comm_opt": found[world_size],
        "mem_opt": found[nearest_divisor(world_size, 1 / world_size)],
        "best": found[best],
    }
