"""Inversions spread over the steps: who is due when, on any number of ranks, with one exchange a step, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from tests.helpers.ranks import RankPool
from tests.helpers.training import EVERY_KIND, Run, Trajectory, advance, build, layer_states, train, train_all
from tests.test_ranks_equal import assert_same
from tests.test_state import STEPS as UNTIL
from tests.test_state import steps_that_differ
from tests.test_traffic import BYTES, LAYERS, STEPS, counted, triangle

STAGGERED = {"inverse_schedule": "staggered"}
KINDS = {
    "factored": Run("mlp-categorical", options=STAGGERED),
    "eigen": Run("cnn", "empirical", options=STAGGERED | {"damping_method": "eigen", "kl_clip": 0.01}),
    "every kind": Run("every kind", empty_forward=True, options=STAGGERED | EVERY_KIND),
    "two levels": Run("mlp-categorical", options=STAGGERED | {"coarse": "layer_step"}),
}


def test_every_layer_is_inverted_in_its_turn_and_all_at_the_first_step() -> None:
    run = KINDS["factored"]
    case, model, kfac, optimizer = build(run)
    slots = kfac.assignment.slot_of
    assert slots == {"0": 0, "2": 1, "4": 2}  # the largest first, every 3 steps
    factors: list[dict[str, Any]] = []
    taken = dict.fromkeys(slots, 0)
    for step in STEPS:
        advance(run, case, model, kfac, optimizer, step)
        factors.append({name: state.factors for name, state in layer_states(kfac).items()})
        taken |= {name: step for name, slot in slots.items() if step % 3 == slot or step == 0}
        for name, state in layer_states(kfac).items():
            assert state.inverted is factors[taken[name]][name], (step, name)
    assert kfac.metrics["inverse_updates"] == 7
    kfac.close()


def test_at_an_interval_of_one_step_nothing_is_staggered() -> None:
    often = {"inverse_every_n_steps": 1, "factor_every_n_steps": 1}
    one, other = (
        train(0, 1, Run("mlp-categorical", steps=3, options=often | {"inverse_schedule": schedule}))
        for schedule in ("together", "staggered")
    )
    for name, value in one.parameters.items():
        assert torch.equal(other.parameters[name], value)


class TwoHeads(nn.Module):
    """The second head takes part only while ``both`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late = nn.Linear(3, 2), nn.Linear(3, 2)
        self.both = False

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + (self.late(x) if self.both else 0.0)


@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_a_layer_that_comes_late_is_inverted_alone_and_at_once(schedule: Any) -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    kfac = KFACPreconditioner(
        model, "empirical", factor_every_n_steps=1, inverse_every_n_steps=100, inverse_schedule=schedule
    )
    first = []
    for step in range(3):
        model.both = step == 1
        model.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        kfac.step()
        first.append(layer_states(kfac)["first"].inverted)
        assert (layer_states(kfac)["late"].inverted is not None) == (step > 0)
    assert first[0] is first[1] is first[2]
    assert kfac.metrics["inverse_updates"] == 2
    kfac.close()


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Trajectory]:
    return train_all(0, 1, KINDS)


@pytest.fixture(scope="module")
def many_ranks(ranks: RankPool) -> Callable[[int], list[dict[str, Trajectory]]]:
    done: dict[int, list[dict[str, Trajectory]]] = {}

    def get(world_size: int) -> list[dict[str, Trajectory]]:
        strategies = ("comm_opt", "mem_opt", 0.5) if world_size == 4 else ("comm_opt", "mem_opt")
        jobs = {f"{kind}/{s}": replace(run, strategy=s) for kind, run in KINDS.items() for s in strategies}
        if world_size not in done:
            done[world_size] = ranks.run(world_size, train_all, jobs, timeout=120)
        return done[world_size]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_rank(
    world_size: int,
    kind: str,
    one_rank: dict[str, Trajectory],
    many_ranks: Callable[[int], list[dict[str, Trajectory]]],
) -> None:
    answers, wanted = many_ranks(world_size), one_rank[kind]
    for key in [key for key in answers[0] if key.startswith(f"{kind}/")]:
        first = answers[0][key]
        for step, gradients in enumerate(wanted.gradients):
            assert_same(first.gradients[step], gradients, 1e-10)
            for answer in answers[1:]:
                assert all(
                    torch.equal(answer[key].gradients[step][name], first.gradients[step][name]) for name in gradients
                )
        assert first.state["counts"] == wanted.state["counts"]
        assert first.state["counts"]["inverse_updates"] == 7  # at every step it is somebody's turn


@pytest.mark.parametrize("kind", ["factored", "eigen", "every kind"])
def test_resuming_equals_going_on_bit_by_bit_at_any_step(kind: str) -> None:
    assert steps_that_differ(0, 1, replace(KINDS[kind], steps=UNTIL)) == []


def differing(rank: int, world_size: int, runs: list[Run]) -> list[list[int]]:
    return [steps_that_differ(rank, world_size, run) for run in runs]


@pytest.mark.parametrize("strategy", ["comm_opt", "mem_opt"])
def test_two_ranks_go_on_bit_by_bit(ranks: RankPool, strategy: str) -> None:
    runs = [replace(KINDS[kind], steps=UNTIL, strategy=strategy) for kind in ("factored", "eigen", "every kind")]
    assert ranks.run(2, differing, runs, timeout=120) == [[[], [], []]] * 2


def exchanges(rank: int, world_size: int, run: Run) -> list[tuple[float, float, list[int]]]:
    """By step: collectives and bytes of the inverses' phase, and the bytes of all calls of torch.distributed."""
    case, model, kfac, optimizer = build(run, world_size)
    found = []
    for step in STEPS:
        with counted() as calls:
            advance(run, case, model, kfac, optimizer, step, rank, world_size)
        metrics = kfac.metrics
        said = metrics.get("collectives/inverses", 0), metrics.get("bytes/inverses", 0)
        found.append((*said, [size for _, size in calls]))
    kfac.close()
    return found


def test_one_exchange_a_step_of_the_layers_that_are_due(ranks: RankPool) -> None:
    words = {name: triangle(a) + triangle(g) + 2 for name, (_, a, g) in LAYERS["mlp-categorical"].items()}
    sizes = [BYTES * (sum(words.values()) if step == 0 else words[("0", "2", "4")[step % 3]]) for step in STEPS]
    for answer in ranks.run(2, exchanges, KINDS["factored"]):
        assert [(count, size) for count, size, _ in answer] == [(1, size) for size in sizes]
        assert all(calls.count(size) == 1 for (_, _, calls), size in zip(answer, sizes, strict=True))
    for answer in ranks.run(2, exchanges, replace(KINDS["factored"], strategy="mem_opt")):
        assert [count for count, _, _ in answer] == [0] * len(STEPS)  # the owner alone holds them
