"""Checkpoints: bitwise resumption, any world size, no collectives, all or nothing."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner
from tests.helpers.ranks import RankPool
from tests.helpers.training import EVERY_KIND, Run, advance, build, train
from tests.test_ranks_equal import assert_same, decreasing
from tests.test_traffic import counted

STEPS = 8
KINDS = {
    "factored": Run("mlp-categorical", steps=STEPS),
    "eigen": Run("cnn", steps=STEPS, options={"damping_method": "eigen", "kl_clip": 0.01}),
    "schedule": Run("mlp-gaussian", "empirical", steps=STEPS, options={"damping": decreasing}),
    "input side": Run("shared", steps=STEPS, options={"factor_sides": "input", "loss_reduction": 0.5}),
    "every kind": Run("every kind", steps=STEPS, options=EVERY_KIND),
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def segment(
    rank: int, world_size: int, run: Run, start: int, stop: int, saved: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Steps start .. stop - 1 from a saved state, or from the beginning; the new state, and the last gradients."""
    case, model, kfac, optimizer = build(run, world_size)
    if saved is not None:
        kfac.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        with counted() as calls:
            kfac.load_state_dict(saved["kfac"])
        assert calls == []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(start, stop):
        gradients = advance(run, case, model, kfac, optimizer, step, rank, world_size)
    with counted() as calls:
        state = {"model": kfac.model.state_dict(), "optimizer": optimizer.state_dict(), "kfac": kfac.state_dict()}
    assert calls == []
    kfac.close()
    return copy.deepcopy(state), gradients


def steps_that_differ(rank: int, world_size: int, run: Run) -> list[int]:
    """The steps from which a resumed run does not end, bit by bit, as the uninterrupted one did."""
    case, model, kfac, optimizer = build(run, world_size)
    saved = []
    for step in range(STEPS):
        parts = {"model": kfac.model.state_dict(), "optimizer": optimizer.state_dict(), "kfac": kfac.state_dict()}
        saved.append(through_a_file(parts))
        wanted = advance(run, case, model, kfac, optimizer, step, rank, world_size)
    end = copy.deepcopy(kfac.model.state_dict()), kfac.state_dict()
    kfac.close()
    different = []
    for step, state in enumerate(saved):
        result, gradients = segment(rank, world_size, run, step, STEPS, state)
        found = result["model"], result["kfac"]
        if not (same_bits(found, end) and same_bits(gradients, wanted)):
            different.append(step)
    return different


def same_bits(one: Any, other: Any) -> bool:
    try:
        assert_state_equal(one, other)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_going_on_bit_by_bit(kind: str) -> None:
    """At every step: before, at and between updates of the factors (every 2) and inversions (every 3)."""
    assert steps_that_differ(0, 1, KINDS[kind]) == []


def all_kinds(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, list[int]]:
    return {kind: steps_that_differ(rank, world_size, replace(run, **changes)) for kind, run in KINDS.items()}


@pytest.mark.parametrize("changes", [{"strategy": "comm_opt"}, {"strategy": "mem_opt"}, {"ddp": True, "even": True}])
def test_two_ranks_go_on_bit_by_bit(ranks: RankPool, changes: dict[str, Any]) -> None:
    assert ranks.run(2, all_kinds, changes) == [{kind: [] for kind in KINDS}] * 2


def segments(rank: int, world_size: int, jobs: list[tuple]) -> list:
    return [segment(rank, world_size, *job) for job in jobs]


def test_resuming_at_other_world_sizes_and_strategies(ranks: RankPool) -> None:
    """1 -> 2 -> 3 -> 1, and comm_opt -> mem_opt -> a half -> comm_opt."""
    plan = ((1, 2, "comm_opt"), (2, 4, "mem_opt"), (3, 7, 0.5), (1, STEPS, "comm_opt"))
    states: dict[str, dict[str, Any] | None] = dict.fromkeys(KINDS)
    start = 0
    for world_size, stop, strategy in plan:
        jobs = [(replace(run, strategy=strategy), start, stop, states[kind]) for kind, run in KINDS.items()]
        answers = ranks.run(world_size, segments, jobs) if world_size > 1 else [segments(0, 1, jobs)]
        for number, kind in enumerate(KINDS):
            saved = [answer[number][0] for answer in answers]
            for other in saved[1:]:  # every rank would have written the same file
                assert_state_equal(other["kfac"], saved[0]["kfac"])
            states[kind] = through_a_file(saved[0])
        start = stop
    for kind, run in KINDS.items():
        wanted, found = train(0, 1, run), states[kind]
        assert found is not None
        weights = {name: found["model"][name] for name in wanted.parameters}  # which has shared ones once
        assert_same(weights, wanted.parameters, 1e-10)
        assert found["kfac"]["counts"] == wanted.state["counts"]


def assert_state_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_state_equal(mine, theirs)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_state_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def save_on_rank_zero_alone(rank: int, world_size: int) -> bool:
    run = Run("mlp-categorical", strategy="mem_opt", steps=6)
    case, model, kfac, optimizer = build(run, world_size)
    for step in range(4):
        advance(run, case, model, kfac, optimizer, step, rank, world_size)
        if rank == 0:
            kfac.state_dict()
    kfac.close()
    return True


def test_one_rank_may_save_alone(ranks: RankPool) -> None:
    assert ranks.run(3, save_on_rank_zero_alone, timeout=30) == [True] * 3


def test_a_saved_state_is_a_snapshot() -> None:
    run = KINDS["factored"]
    case, model, kfac, optimizer = build(run)
    advance(run, case, model, kfac, optimizer, 0)
    state = kfac.state_dict()
    kept = copy.deepcopy(state)
    for step in range(1, 5):
        advance(run, case, model, kfac, optimizer, step)
    assert_state_equal(state, kept)
    kfac.load_state_dict(state)  # back in time, in a preconditioner that has gone on
    assert_state_equal(kfac.state_dict(), kept)


def test_the_state_has_only_plain_things_and_no_inverses() -> None:
    run = KINDS["eigen"]
    case, model, kfac, optimizer = build(run)
    for step in range(2):
        advance(run, case, model, kfac, optimizer, step)

    def leaves(value: Any) -> list[Any]:
        return [leaf for part in value.values() for leaf in leaves(part)] if isinstance(value, dict) else [value]

    state = kfac.state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {torch.Tensor, int, float, str, type(None)}
    for layer in kfac.layers:
        part = state["layers"][layer.name]
        assert set(part) == {"updates", "factors", "inverted"}
        assert part["factors"]["A"].shape == (layer.groups, layer.input_dim, layer.input_dim)
        assert part["factors"]["G"].shape == (layer.groups, layer.output_dim, layer.output_dim)


def test_a_fresh_preconditioner_saves_and_loads_too() -> None:
    model = nn.Linear(3, 2)
    state = through_a_file(KFACPreconditioner(model, likelihood="gaussian").state_dict())
    kfac = KFACPreconditioner(model, likelihood="gaussian")
    kfac.load_state_dict(state)
    assert_state_equal(kfac.state_dict(), state)
