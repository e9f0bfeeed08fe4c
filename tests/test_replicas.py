"""Ranks without DDP: gradients that differ, replicas that drift, and one rank with numbers that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import DistributionConfig, KFACPreconditioner
from kfac_dist.comm import make_communicator
from kfac_dist.replicas import average_gradients, check_replicas
from tests.helpers.ranks import RankPool


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator, dtype=dtype), torch.randint(0, 2, (6,), generator=generator)


def one_step(kfac: KFACPreconditioner, x: Tensor, y: Tensor) -> None:
    kfac.model.zero_grad()
    logits = kfac.model(x)
    kfac.accumulate(sample_ids=torch.arange(6))
    F.cross_entropy(logits, y).backward()
    kfac.step()


def make(model: nn.Module, average: bool = False, **options: Any) -> KFACPreconditioner:
    return KFACPreconditioner(
        model,
        likelihood="categorical",
        factor_every_n_steps=1,
        distribution=DistributionConfig(average_gradients=average),
        **options,
    )


def message_of(kfac: KFACPreconditioner, x: Tensor, y: Tensor) -> str:
    try:
        one_step(kfac, x, y)
    except RuntimeError as error:
        return str(error)
    finally:
        kfac.close()
    return "no error"


def drifting(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    found["same batches"] = message_of(make(net()), *batch(0))
    found["other batches"] = message_of(make(net()), *batch(rank))
    found["averaged"] = message_of(make(net(), average=True), *batch(rank))
    model = net()
    with torch.no_grad():
        model[2].bias += 0.1 * rank
    found["other parameters"] = message_of(make(model, average=True), *batch(rank))
    model = net()
    with torch.no_grad():
        model[0].weight *= 1 + 1e-7 * rank  # what different kernels on different ranks may do
    found["rounding"] = message_of(make(model, average=True), *batch(rank))
    return found


def test_drift_is_an_error_on_every_rank_that_says_the_cure(ranks: RankPool) -> None:
    answers = ranks.run(2, drifting)
    assert answers[0] == answers[1]
    found = answers[0]
    assert {key: found[key] for key in ("same batches", "averaged", "rounding")} == dict.fromkeys(
        ("same batches", "averaged", "rounding"), "no error"
    )
    assert found["other batches"].startswith("the gradients differ between the ranks (their norms: rank 0: ")
    assert "DistributedDataParallel" in found["other batches"]
    assert "DistributionConfig(average_gradients=True)" in found["other batches"]
    assert found["other parameters"].startswith("the parameters differ between the ranks")
    assert "broadcast rank 0's, or seed alike" in found["other parameters"]


def test_which_rank_differs_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0: 1, rank 1: 1, rank 2: 1\.5"):
        check_replicas([(1.0, 3.0), (1.0, 3.0), (1.5, 3.0)], gradients_averaged=False)
    check_replicas([(1.0, 3.0), (1.0, 3.0), (1.5, 3.0)], gradients_averaged=True)
    check_replicas([(0.0, 3.0), (0.0, 3.0)], gradients_averaged=False)
    check_replicas([(1.0, 3.0), (1.00005, 3.0)], gradients_averaged=False)


def averaged(rank: int, world_size: int) -> list[Any]:
    """Parameters: everywhere a gradient, only on rank 1, nowhere, and one in half precision."""
    parameters = [nn.Parameter(torch.full((2, 3), float(i))) for i in range(3)]
    parameters.append(nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))
    world = make_communicator("torch")
    parameters[0].grad = torch.arange(6.0).view(2, 3).t().contiguous().t() * (rank + 1)
    held = parameters[0].grad
    if rank == 1:
        parameters[1].grad = torch.ones(2, 3)
    parameters[3].grad = torch.full((4,), 2.0 * rank, dtype=torch.bfloat16)
    average_gradients(parameters, world)
    same_tensor = parameters[0].grad is held
    calls = dict(world.traffic.collectives)
    world.close()
    return [same_tensor, calls, [p.grad for p in parameters]]


def test_gradients_are_averaged_in_one_collective(ranks: RankPool) -> None:
    for same_tensor, calls, gradients in ranks.run(2, averaged):
        assert same_tensor  # in place: buckets and views of them stay valid
        assert calls == {"gradients": 1}
        assert torch.equal(gradients[0], torch.arange(6.0).view(2, 3) * 1.5)
        assert torch.equal(gradients[1], torch.full((2, 3), 0.5))  # a missing gradient counts as zero
        assert gradients[2] is None
        assert torch.equal(gradients[3], torch.ones(4, dtype=torch.bfloat16))


def uncovered(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    plain = {}
    for r in range(world_size):
        x, y = batch(r)
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model[1].parameters()))
        for name, gradient in zip(("1.weight", "1.bias"), gradients, strict=True):
            plain[name] = plain.get(name, 0) + gradient / world_size
    kfac = make(model, average=True, skip_layers="LayerNorm")
    one_step(kfac, *batch(rank))
    kfac.close()
    return plain, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_what_kfac_does_not_cover_is_averaged_too(ranks: RankPool) -> None:
    first, second = ranks.run(2, uncovered)
    for name, wanted in first[0].items():
        assert torch.allclose(first[1][name], wanted, rtol=1e-12)
    assert first[1].keys() == second[1].keys() == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def factors_of(kfac: KFACPreconditioner) -> list[Tensor]:
    return [layer["factors"][side].clone() for layer in kfac.state_dict()["layers"].values() for side in "AG"]


def with_accidents(rank: int, world_size: int) -> dict[str, Any]:
    """Good; gradients of the last rank NaN; its statistics overflow; those of all ranks; good again (float32)."""
    kfac = make(net(torch.float32), average=world_size > 1, damping_method="eigen")
    last = rank == world_size - 1
    counts = ("factor_updates", "dropped_statistics", "failed_ranks")
    found: dict[str, Any] = {}
    for kind in ("good", "gradients", "statistics", "all", "recovered"):
        x, y = batch(rank, torch.float32)
        if (kind == "statistics" and last) or kind == "all":
            x = x * 1e25  # its square is beyond float32, its gradient is not
        kfac.model.zero_grad()
        logits = kfac.model(x)
        kfac.accumulate(sample_ids=torch.arange(6) + 6 * rank)
        F.cross_entropy(logits, y).backward()
        assert all(p.grad.isfinite().all() for p in kfac.model.parameters())  # type: ignore[union-attr]
        if kind == "gradients" and last:
            kfac.model[2].bias.grad[0] = float("nan")
        kfac.step()
        found[kind] = ({key: int(kfac.metrics[key]) for key in counts}, factors_of(kfac))
    found["finite"] = all(bool(p.grad.isfinite().all()) for p in kfac.model.parameters())  # type: ignore[union-attr]
    kfac.close()
    return found


def check_accidents(found: dict[str, Any], world_size: int) -> None:
    def count(updates: int, dropped: int, failed: int) -> dict[str, int]:
        return {"factor_updates": updates, "dropped_statistics": dropped, "failed_ranks": failed}

    assert found["good"][0] == count(1, 0, 0)
    assert found["gradients"][0] == count(1, 1, 0)
    assert equal(found["gradients"][1], found["good"][1])  # the average is as it was
    if world_size == 1:  # nobody is left
        assert found["statistics"][0] == count(1, 2, 1)
        assert equal(found["statistics"][1], found["good"][1])
    else:  # the others' statistics are taken
        assert found["statistics"][0] == count(2, 1, 1)
        assert not equal(found["statistics"][1], found["good"][1])
    dropped = 3 if world_size == 1 else 2
    assert found["all"][0] == count(found["statistics"][0]["factor_updates"], dropped, 1 + world_size)
    assert equal(found["all"][1], found["statistics"][1])
    assert found["recovered"][0] == count(found["all"][0]["factor_updates"] + 1, dropped, 1 + world_size)
    assert not equal(found["recovered"][1], found["all"][1])
    assert all(factor.isfinite().all() for factor in found["recovered"][1])
    assert found["finite"]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_numbers_that_are_not_finite_are_dropped_and_counted_alone() -> None:
    check_accidents(with_accidents(0, 1), 1)


def test_numbers_that_are_not_finite_are_dropped_and_counted_by_all(ranks: RankPool) -> None:
    answers = ranks.run(3, with_accidents)
    for answer in answers:
        check_accidents(answer, 3)
        for kind in ("good", "statistics", "recovered"):
            assert equal(answer[kind][1], answers[0][kind][1])


def first_step_without(rank: int, world_size: int) -> str:
    kfac = make(net())
    F.cross_entropy(kfac.model(batch(0)[0]), batch(0)[1]).backward()
    try:
        kfac.step()
    except RuntimeError as error:
        return str(error)
    finally:
        kfac.close()
    return "no error"


def test_a_factor_step_without_any_sample_is_an_error_on_every_rank(ranks: RankPool) -> None:
    for message in ranks.run(2, first_step_without):
        assert message.startswith("no rank accumulated a sample on this factor step: call kfac.accumulate()")
