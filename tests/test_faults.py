"""Numbers that are not finite, on one rank of several: they are dropped and counted, and the training is what it would
have been without that step; a factorisation that raises costs that inverse and nothing else."""

from __future__ import annotations

import copy
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig
from tests.helpers.cases import Case
from tests.helpers.ranks import RankPool
from tests.helpers.training import EVERY_KIND, Run, advance, build, layer_states, part_of

GOOD = 2  # steps before the fault, and after it
NAN, INF = float("nan"), float("inf")


def options(**more: Any) -> dict[str, Any]:
    """With the exact Fisher nothing depends on the number of the step, so that one can be left out."""
    return {"fisher_samples": "exact", "factor_every_n_steps": 1, "inverse_every_n_steps": 1} | more


RUNS = {
    "one level": Run("mlp-categorical", options=options(kl_clip=1e-3)),
    "owners": Run("mlp-categorical", strategy="mem_opt", options=options(damping_method="eigen")),
    "two levels": Run("mlp-categorical", options=options(coarse=CoarseConfig(space="layer_step", max_samples=None))),
    "empirical": Run("mlp-categorical", fisher="empirical", options=options()),
    "every kind": Run("every kind", fisher="empirical", options=options(**EVERY_KIND)),
}
COUNTS = ("factor_updates", "dropped_statistics", "failed_ranks")


def averages(kfac: Any) -> list[Tensor]:
    return [side.clone() for state in layer_states(kfac).values() for side in state.factors.sides().values()]


def faulty_step(kind: str, case: Case, model: nn.Module, kfac: Any, part: Tensor, scale: float, broken: bool) -> None:
    """The forward, the backward and ``kfac.step`` of a step in which the ``broken`` rank makes a mistake."""
    x = case.x[part].clone()
    if broken and kind.startswith("batch"):
        x[0].view(-1)[0] = NAN if kind == "batch nan" else INF
    logits = model(x)
    kfac.accumulate(sample_ids=part, loss_divisor=1 / scale)
    loss = case.sum_loss(logits, case.y[part]) * (scale / len(part))
    if broken and kind.startswith("loss"):
        loss = loss * (NAN if kind == "loss nan" else INF)
    loss.backward()
    if broken and kind == "layer":
        list(model.parameters())[2].grad.view(-1)[0] = NAN
    if kind == "sums":  # finite on every rank, but not together
        for moment in kfac._fisher.statistics.sums("A").values():
            moment[0, 0, 0] = 1.2e308
    kfac.step(lr=0.1)


def with_fault(rank: int, world_size: int, key: str, kinds: list[str]) -> dict[str, Any]:
    """Good steps, one with a fault on the last rank, whose gradients a scaler would throw away, and good steps."""
    found = {}
    for kind in kinds:
        case, model, kfac, optimizer = build(RUNS[key], world_size)
        for step in range(GOOD):
            advance(RUNS[key], case, model, kfac, optimizer, step, rank, world_size)
        before = averages(kfac)
        if kind != "none":
            optimizer.zero_grad()
            part, scale = part_of(Run("", even=True), rank, world_size, 0)
            faulty_step(kind, case, model, kfac, part, scale, broken=rank == world_size - 1)
        metrics = dict(kfac.metrics)
        after = averages(kfac)
        for step in range(GOOD, 2 * GOOD):
            advance(RUNS[key], case, model, kfac, optimizer, step, rank, world_size)
        found[kind] = {
            "kept": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "counts": tuple(int(metrics[name]) for name in COUNTS),
            "coarse failures": metrics.get("coarse/failures"),
            "gradient": metrics["grad_norm"],
            "averages": averages(kfac),
            "parameters": copy.deepcopy(list(model.state_dict().values())),
            "last": dict(kfac.metrics),
        }
        kfac.close()
    return found


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for here, there in zip(found, wanted, strict=True):
        assert torch.linalg.norm(here - there) <= 1e-10 * torch.linalg.norm(there)


KINDS = ["loss nan", "loss inf", "layer", "batch nan", "batch inf", "sums"]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("key", list(RUNS))
def test_the_training_goes_on_as_if_the_step_had_not_been(ranks: RankPool, key: str, world_size: int) -> None:
    reference = with_fault(0, 1, key, ["none"])["none"]
    for answer in ranks.run(world_size, with_fault, key, KINDS):
        for kind, found in answer.items():
            assert found["kept"], kind
            failed = int(kind.startswith("batch") or (RUNS[key].fisher == "empirical" and kind.startswith("loss")))
            assert found["counts"] == (GOOD, 1, failed), kind
            assert (found["gradient"] == found["gradient"] and found["gradient"] < INF) == (kind == "sums")
            if key == "two levels":
                assert found["coarse failures"] == int(kind != "sums")
            assert found["last"]["factor_updates"] == 2 * GOOD
            assert_close(found["averages"], reference["averages"])
            assert_close(found["parameters"], reference["parameters"])


def not_a_number_in(rank: int, world_size: int, name: str) -> dict[str, float]:
    """Sampled targets from logits that are not numbers, on the last rank, in the first step of all."""
    run = Run(name, options={"factor_every_n_steps": 1, "inverse_every_n_steps": 1})
    case, model, kfac, optimizer = build(run, world_size)
    part, scale = part_of(Run("", even=True), rank, world_size, 0)
    faulty_step("batch nan", case, model, kfac, part, scale, broken=rank == world_size - 1)
    counts = {name: kfac.metrics[name] for name in COUNTS}
    optimizer.zero_grad()
    advance(run, case, model, kfac, optimizer, 1, rank, world_size)
    assert all(bool(side.isfinite().all()) for side in averages(kfac))
    kfac.close()
    return counts


@pytest.mark.parametrize("name", ["mlp-categorical", "mlp-bernoulli", "mlp-gaussian", "cnn"])
def test_sampling_from_logits_that_are_not_numbers_keeps_nobody_waiting(ranks: RankPool, name: str) -> None:
    for counts in ranks.run(3, not_a_number_in, name):
        assert counts == {"factor_updates": 0, "dropped_statistics": 1, "failed_ranks": 1}


# -- a gradient scaler ------------------------------------------------------------------------------------------------


def with_scaler(rank: int, world_size: int, fisher: str) -> dict[str, Any]:
    """DDP and a GradScaler; after the good steps the scaled loss of the last rank overflows, once."""
    run = Run("mlp-categorical", fisher=fisher, even=True, ddp=True, options=options(kl_clip=1e-3))
    case, model, kfac, optimizer = build(run, world_size)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000)
    scales = []
    for overflow, step in ((False, 0), (False, 1), (True, 0), (False, 2), (False, 3)):
        part, _ = part_of(run, rank, world_size, step)
        optimizer.zero_grad()
        logits = model(case.x[part])
        kfac.accumulate(sample_ids=part)
        loss = case.loss(logits, case.y[part])
        scaler.scale(loss * 1e300 if overflow and rank == world_size - 1 else loss).backward()
        scaler.unscale_(optimizer)
        kfac.step(lr=optimizer, grad_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    result = {"metrics": dict(kfac.metrics), "scales": scales, "averages": averages(kfac)}
    kfac.close()
    return result | {"parameters": list(kfac.model.state_dict().values())}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_an_overflow_step_of_a_gradient_scaler_leaves_no_trace(ranks: RankPool, fisher: str, world_size: int) -> None:
    run = Run("mlp-categorical", fisher=fisher, even=True, options=options(kl_clip=1e-3))
    case, model, kfac, optimizer = build(run)
    for step in range(2 * GOOD):
        advance(run, case, model, kfac, optimizer, step)
    for found in ranks.run(world_size, with_scaler, fisher):
        assert found["scales"] == [2.0**60, 2.0**60, 2.0**59, 2.0**59, 2.0**59]
        assert (found["metrics"]["factor_updates"], found["metrics"]["dropped_statistics"]) == (2 * GOOD, 1)
        assert_close(found["averages"], averages(kfac))
        assert_close(found["parameters"], list(model.state_dict().values()))


# -- a factorisation that raises --------------------------------------------------------------------------------------


def raising(rank: int, world_size: int, strategy: str, name: str, at: int) -> dict[str, Any]:
    """In step ``at`` the last rank runs out of memory in all its factorisations."""
    method = "eigen" if name == "eigh" else "factored"
    run = Run("mlp-categorical", strategy=strategy, options=options(damping_method=method))
    case, model, kfac, optimizer = build(run, world_size)
    found: dict[str, Any] = {"gradients": [], "fallbacks": []}
    for step in range(at + 2):
        works = getattr(torch.linalg, name)
        broken = rank == world_size - 1 and step == at
        failing = mock.Mock(side_effect=MemoryError("no room") if broken else works)
        with warnings.catch_warnings(record=True) as warned, mock.patch(f"torch.linalg.{name}", failing):
            warnings.simplefilter("always")
            gradients = advance(run, case, model, kfac, optimizer, step, rank, world_size)
        if broken:
            assert failing.call_count % 3 == 0  # three attempts for each of its factors
            assert {str(w.message).partition(":")[0] for w in warned} == {
                "a factorisation raised MemoryError('no room')"
            }
            found["failed"] = failing.call_count // 3
        if step == at:
            found["averages"] = averages(kfac)
        found["gradients"].append(gradients)
        found["fallbacks"].append(int(kfac.metrics["inverse_fallbacks"]))
    kfac.close()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("strategy", "name", "at"), [("comm_opt", "cholesky_ex", 0), ("comm_opt", "eigh", 1), ("mem_opt", "cholesky_ex", 1)]
)
def test_a_factorisation_that_raises_on_one_rank_is_counted_by_all(
    ranks: RankPool, strategy: str, name: str, at: int, world_size: int
) -> None:
    answers = ranks.run(world_size, raising, strategy, name, at)
    failed = answers[-1]["failed"]
    assert failed > 0
    wanted = raising_nowhere(strategy, name, at)
    for answer in answers:
        assert answer["fallbacks"] == [0] * (at + 1) + [failed]  # the count travels with the next statistics
        assert_close(answer["averages"], wanted)
        for mine, first in zip(answer["gradients"], answers[0]["gradients"], strict=True):
            assert all(torch.equal(mine[key], first[key]) and bool(mine[key].isfinite().all()) for key in first)


def raising_nowhere(strategy: str, name: str, at: int) -> list[Tensor]:
    """The averages after step ``at`` on one rank, where nothing fails."""
    run = Run("mlp-categorical", options=options(damping_method="eigen" if name == "eigh" else "factored"))
    case, model, kfac, optimizer = build(run)
    for step in range(at + 1):
        advance(run, case, model, kfac, optimizer, step)
    kfac.close()
    return averages(kfac)
