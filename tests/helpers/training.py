"""A few training steps on a global batch that is cut among the ranks, with an outer SGD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist import DistributionConfig, KFACPreconditioner
from kfac_dist.state import LayerState
from tests.helpers.cases import Case, cases

BATCH = 12
UNEVEN = {
    1: [(12,)],
    2: [(5, 7), (12, 0), (6, 6)],
    3: [(2, 6, 4), (7, 0, 5), (4, 4, 4)],
    4: [(1, 5, 2, 4), (3, 3, 6, 0), (0, 4, 0, 8)],
}
"""World size -> samples per rank, step by step in turn; every BATCH of them."""
EVERY_KIND: dict[str, Any] = {"uncovered": "diagonal", "max_factor_dim": 8, "damping": 0.3}
"""Options that cover all of the case "every kind", some of it in blocks."""


@dataclass(frozen=True)
class Run:
    """What is trained and how; ``options`` go to the preconditioner."""

    case: str
    fisher: str = "true"
    strategy: str | float = "comm_opt"
    steps: int = 7
    even: bool = False
    ddp: bool = False
    empty_forward: bool = False
    timeout: float = 600.0
    options: dict[str, Any] = field(default_factory=dict)

    def distribution(self, world_size: int) -> DistributionConfig:
        common: dict[str, Any] = {"average_gradients": world_size > 1 and not self.ddp, "timeout": self.timeout}
        if isinstance(self.strategy, str):
            return DistributionConfig(strategy=self.strategy, **common)  # type: ignore[arg-type]
        return DistributionConfig(strategy="hybrid", gradient_worker_fraction=self.strategy, **common)


@dataclass
class Trajectory:
    """By step: gradients after ``step()`` and metrics; at the end: parameters, inverses and the state."""

    gradients: list[dict[str, Tensor]]
    metrics: list[dict[str, float]]
    parameters: dict[str, Tensor]
    inverses: dict[tuple[str, str, str], Tensor]
    state: dict[str, Any]


def layer_states(kfac: KFACPreconditioner) -> dict[str, LayerState]:
    """The only look that the tests take behind the preconditioner's face."""
    return kfac._one.states


def held_inverses(kfac: KFACPreconditioner) -> dict[tuple[str, str, str], Tensor]:
    """(layer, side, part) -> tensor, of what this rank holds."""
    return {
        (name, side, part): value
        for name, state in layer_states(kfac).items()
        for side, inverse in state.inverses.items()
        for part, value in vars(inverse).items()
    }


def part_of(run: Run, rank: int, world_size: int, step: int) -> tuple[Tensor, float]:
    """The global indices of this rank's samples, and the factor P B_q / B of its mean loss."""
    table = UNEVEN[world_size]
    sizes = [BATCH // world_size] * world_size if run.even else table[step % len(table)]
    start = step * BATCH + sum(sizes[:rank])
    return torch.arange(start, start + sizes[rank]), world_size * sizes[rank] / BATCH


def build(run: Run, world_size: int = 1) -> tuple[Case, nn.Module, KFACPreconditioner, torch.optim.Optimizer]:
    case = cases(BATCH * max(run.steps, 7))[run.case]
    model = case.model()
    if run.ddp:
        model = nn.parallel.DistributedDataParallel(model)
    options = {"damping": 0.03, "factor_every_n_steps": 2, "inverse_every_n_steps": 3, "seed": 3} | run.options
    kfac = KFACPreconditioner(
        model,
        likelihood="empirical" if run.fisher == "empirical" else case.likelihood,
        distribution=run.distribution(world_size),
        **options,
    )
    return case, model, kfac, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def advance(
    run: Run,
    case: Case,
    model: nn.Module,
    kfac: KFACPreconditioner,
    optimizer: torch.optim.Optimizer,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """One training step; returns ``param.grad`` as ``kfac.step`` left it."""
    part, scale = part_of(run, rank, world_size, step)
    optimizer.zero_grad()
    if len(part) or run.empty_forward:
        logits = model(case.x[part])
        total = run.options.get("loss_reduction") == "sum"  # what DDP averages are then sums: no weights
        kfac.accumulate(sample_ids=part, loss_divisor=1 / scale if scale and not total else 1)
        weight = 1.0 if total else scale / max(len(part), 1)
        (case.sum_loss(logits, case.y[part]) * weight).backward()
    kfac.step(lr=optimizer)
    gradients = {name: p.grad.clone() for name, p in kfac.model.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients


def train(rank: int, world_size: int, run: Run) -> Trajectory:
    """All steps of ``run`` on one rank."""
    case, model, kfac, optimizer = build(run, world_size)
    gradients, metrics = [], []
    for step in range(run.steps):
        gradients.append(advance(run, case, model, kfac, optimizer, step, rank, world_size))
        metrics.append(dict(kfac.metrics))
    parameters = {name: p.detach().clone() for name, p in kfac.model.named_parameters()}
    result = Trajectory(gradients, metrics, parameters, held_inverses(kfac), kfac.state_dict())
    kfac.close()
    return result


def train_all(rank: int, world_size: int, runs: dict[str, Run]) -> dict[str, Trajectory]:
    """One job of the pool for many runs."""
    return {name: train(rank, world_size, run) for name, run in runs.items()}


def train_with_closures(
    rank: int, world_size: int, case: Case, kfac: KFACPreconditioner, numbers: range, *, always: bool = True
) -> tuple[list[dict[str, float]], list[Tensor], dict[str, Any]]:
    """Steps at lr = 1 for a damping that follows the loss: metrics by step, parameters and the state.

    Every rank's loss is weighted by its share of the samples. ``always``: also where the step does not ask for it.
    """
    model, metrics = kfac.model, []
    for number in numbers:
        sizes = UNEVEN[world_size][number % len(UNEVEN[world_size])]
        first = number * BATCH + sum(sizes[:rank])
        part = torch.arange(first, first + sizes[rank])

        def loss(part: Tensor = part) -> Tensor:
            if not len(part):
                return torch.tensor(float("nan"))  # the mean over no samples
            return case.sum_loss(model(case.x[part]), case.y[part]) * (world_size / BATCH)

        model.zero_grad()
        if len(part):
            logits = model(case.x[part])
            kfac.accumulate(sample_ids=part)
            (case.sum_loss(logits, case.y[part]) * (world_size / BATCH)).backward()
        kfac.step(closure=loss if always or kfac.wants_loss else None)
        metrics.append(dict(kfac.metrics))
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    state = kfac.state_dict()
    kfac.close()
    return metrics, [p.detach() for p in model.parameters()], state
