"""A solve or a rank that fails: every rank makes the same step, it is counted, and nobody waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kfac_dist import fine
from kfac_dist.coarse_solver import CoarseOperator, Status, factorise
from kfac_dist.fisher import Fisher
from tests.helpers.ranks import RankPool
from tests.helpers.training import advance, build, train
from tests.test_coarse_ranks import RUNS, STEPS, run_of

# -- a solve that fails -----------------------------------------------------------------------------------------------


def failed(E: Tensor) -> CoarseOperator:
    return factorise(torch.full_like(E, float("nan")))


def not_finite(E: Tensor) -> CoarseOperator:
    return CoarseOperator(E, Status.SOLVED, 1.0, torch.full_like(E, float("nan")))


def gives_up(E: Tensor) -> CoarseOperator:
    """A singular operator, and an eigenvalue iteration that raises."""
    with mock.patch("torch.linalg.eigh", side_effect=torch.linalg.LinAlgError("did not converge")):
        return factorise(torch.ones_like(E))


def raises(E: Tensor) -> CoarseOperator:
    """What nobody thought of."""
    raise MemoryError("no room for E")


def raises_later(E: Tensor) -> CoarseOperator:
    """The second solve of a step, where there is one."""
    operator, answers = factorise(E), []

    def solve(rhs: Tensor) -> Any:
        if answers:
            raise ZeroDivisionError
        answers.append(CoarseOperator.solve(operator, rhs))
        return answers[0]

    object.__setattr__(operator, "solve", solve)
    return operator


BROKEN = 3


def broken_steps(rank: int, world_size: int, key: str, strategy: str, how: str) -> list[dict[str, Any]]:
    """The first three solves fail on rank 0, which is the only one that solves."""
    run = replace(RUNS[key], strategy=strategy)
    case, model, kfac, optimizer = build(run, world_size)
    result = []
    for step in range(STEPS):
        broken = rank == 0 and step < BROKEN
        with mock.patch("kfac_dist.two_level.factorise", globals()[how] if broken else factorise):
            gradients = advance(run, case, model, kfac, optimizer, step, rank, world_size)
        result.append({"gradients": gradients, "metrics": dict(kfac.metrics)})
    kfac.close()
    return result


@pytest.mark.parametrize(
    ("key", "strategy", "how", "world_size"),
    [
        ("cnn momentum", "mem_opt", "failed", 2),
        ("nicolaides", "comm_opt", "failed", 2),
        ("nicolaides", "mem_opt", "not_finite", 2),
        ("nicolaides", "mem_opt", "gives_up", 3),
        ("nicolaides", "comm_opt", "raises", 2),
        ("nicolaides", "mem_opt", "raises", 3),
        ("nicolaides balanced", "mem_opt", "failed", 2),
        ("nicolaides balanced", "mem_opt", "raises_later", 2),
        ("nicolaides balanced", "comm_opt", "raises_later", 3),
        ("nicolaides deflated", "comm_opt", "not_finite", 2),
    ],
)
def test_a_failed_solve_is_a_one_level_step_on_every_rank(
    ranks: RankPool, key: str, strategy: str, how: str, world_size: int
) -> None:
    one_level = train(0, 1, replace(RUNS[key], options=RUNS[key].options | {"coarse": None}))
    answers = ranks.run(world_size, broken_steps, key, strategy, how, timeout=60)
    for answer in answers:
        assert [step["metrics"]["corrected"] for step in answer] == [0, 0, 0, 1, 1]
        assert [step["metrics"]["coarse/failures"] for step in answer] == [1, 2, 3, 3, 3]
    for step in range(STEPS):
        first, *others, wanted = (
            torch.cat([g.flatten() for g in gradients.values()])
            for gradients in (*(answer[step]["gradients"] for answer in answers), one_level.gradients[step])
        )
        assert all(torch.equal(first, other) for other in others)
        difference = torch.linalg.norm(first - wanted) / torch.linalg.norm(wanted)
        assert difference < 1e-10 if step < BROKEN else difference > 1e-3


# -- eigenvectors that cannot be computed -----------------------------------------------------------------------------


def without_eigenvectors(rank: int, world_size: int) -> list[dict[str, Any]]:
    """The last rank fails in those of its layers, at the first step; factors are new every other step."""
    run = replace(run_of("mlp-categorical", "spectral"), even=True)
    case, model, kfac, optimizer = build(run, world_size)
    failing = mock.Mock(side_effect=torch.linalg.LinAlgError("did not converge"))
    result = []
    for step in range(3):
        broken = rank == world_size - 1 and step == 0
        with mock.patch("kfac_dist.fine._extreme_pairs", failing if broken else fine._extreme_pairs):
            gradients = advance(run, case, model, kfac, optimizer, step, rank, world_size)
        result.append({"gradients": gradients, "metrics": dict(kfac.metrics), "failed": failing.call_count})
    kfac.close()
    return result


@pytest.mark.parametrize("world_size", [2, 3])
def test_eigenvectors_that_cannot_be_computed_drop_out_of_the_space(ranks: RankPool, world_size: int) -> None:
    answers = ranks.run(world_size, without_eigenvectors, timeout=60)
    failed = answers[-1][-1]["failed"]
    assert failed > 0
    lost, _, whole = (step["metrics"]["coarse/rank"] for step in answers[0])
    assert lost == whole - failed * (whole // 3)  # as many for each of the three layers
    for answer in answers:
        for mine, first in zip(answer, answers[0], strict=True):
            assert mine["metrics"]["corrected"] == 1
            for name, gradient in first["gradients"].items():
                assert torch.equal(mine["gradients"][name], gradient)
                assert bool(gradient.isfinite().all())


# -- a rank whose samples are not finite ------------------------------------------------------------------------------


def overflow_on_rank_1(rank: int, world_size: int) -> list[dict[str, float]]:
    """Its sampled pass of step 0 gives no finite gradients; the next curvature batch is that of step 2."""
    run = run_of("mlp-categorical", "layer_step_residual")
    case, model, kfac, optimizer = build(replace(run, even=True), world_size)
    original, metrics = Fisher._gradients_at, []

    def overflows(self: Fisher, calls: Any, *more: Any) -> Any:
        return [g * float("inf") for g in original(self, calls, *more)]

    for step in range(3):
        broken = rank == 1 and step == 0
        with mock.patch.object(Fisher, "_gradients_at", overflows if broken else original):
            advance(replace(run, even=True), case, model, kfac, optimizer, step, rank, world_size)
        metrics.append(dict(kfac.metrics))
    kfac.close()
    return metrics


def test_samples_that_are_not_finite_stay_out(ranks: RankPool) -> None:
    """As that rank's statistics do: the coarse level goes on with what the other rank has."""
    for metrics in ranks.run(2, overflow_on_rank_1, timeout=60):
        assert [m["failed_ranks"] for m in metrics] == [1, 1, 1]
        assert [m["corrected"] for m in metrics] == [1, 1, 1]
        assert [m["coarse/failures"] for m in metrics] == [0, 0, 0]
        if "coarse/samples" in metrics[0]:  # rank 0 solves
            assert [m["coarse/samples"] for m in metrics] == [6, 6, 12]
