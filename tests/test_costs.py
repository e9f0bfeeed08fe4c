"""Forecast bytes, collectives and memory against counted ones; times against what they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from kfac_dist import CoarseConfig
from kfac_dist.assignment import assign
from kfac_dist.costs import Machine, Method, forecast, inversions, memory, preconditioning, strategies, traffic
from kfac_dist.networks import Network, linear, networks
from tests.helpers.ranks import RankPool
from tests.helpers.training import Run, advance, build, held_inverses, layer_states

WORD, LAYERS = 8, 3  # float64; of "mlp-categorical"
MOMENTUM = CoarseConfig(space="layer_step_momentum", damping=1.0)
RUNS = {
    "comm_opt": (Run("mlp-categorical"), {}),
    "mem_opt": (Run("mlp-categorical", strategy="mem_opt"), {}),
    "half": (Run("mlp-categorical", strategy=0.5), {}),
    "eigen": (Run("cnn", options={"damping_method": "eigen"}), {"eigen": True}),
    "input side": (Run("cnn", "empirical", "mem_opt", options={"factor_sides": "input"}), {"sides": "input"}),
    "blocks": (Run("cnn", options={"max_factor_dim": 9}), {}),
    "coarse": (
        Run("mlp-categorical", options={"coarse": CoarseConfig(damping=1.0)}),
        {"coarse": LAYERS, "eigen": False},
    ),
    "momentum": (Run("mlp-categorical", options={"coarse": MOMENTUM}), {"coarse": 2 * LAYERS}),
}
CELLS = [*((2, key) for key in RUNS), (4, "half")]
MACHINE = Machine(gemm=1e12, cholesky=1e11, eigh=1e10, memory=1e11, bandwidth=1e9, latency=1e-5, operation=1e-6)


def counted(rank: int, world_size: int) -> dict[str, Any]:
    """Run -> phase -> (collectives, bytes), what is held, and what was forecast."""
    result = {}
    for key in RUNS if world_size == 2 else ("half",):
        run, settings = RUNS[key]
        case, model, kfac, optimizer = build(run, world_size)
        talks: dict[str, tuple[int, int]] = {}
        for step in range(3):  # factors every 2 steps, inverses every 3: in the end the averages have moved on
            advance(run, case, model, kfac, optimizer, step, rank, world_size)
            for name, value in kfac.metrics.items():
                if name.startswith("bytes/") and name != "bytes/gradients":
                    phase = name.removeprefix("bytes/")
                    talks[phase] = (round(kfac.metrics[f"collectives/{phase}"]), round(value))
        states = layer_states(kfac).values()
        averages = [factor for state in states for factor in state.factors.sides().values()]
        inverted = [factor for state in states for factor in state.inverted.sides().values()]
        held = {
            "factors": sum(t.nbytes for t in averages),
            "inverted": sum(t.nbytes for t in inverted if not any(t is other for other in averages)),
            "inverses": sum(t.nbytes for t in held_inverses(kfac).values()),
        }
        method = Method(factor_every=2, inverse_every=3, word=WORD, **settings)
        expected = traffic(kfac.assignment, method, rank), memory(kfac.assignment, method, rank)
        result[key] = talks, held, *expected
        kfac.close()
    return result


@pytest.fixture(scope="module")
def measured(ranks: RankPool) -> dict[int, list[dict[str, Any]]]:
    return {world_size: ranks.run(world_size, counted) for world_size in (2, 4)}


@pytest.mark.parametrize(("world_size", "key"), CELLS)
def test_collectives_and_bytes_are_those_that_a_run_counts(
    key: str, world_size: int, measured: dict[int, list[dict[str, Any]]]
) -> None:
    for answer in measured[world_size]:
        talks, _, expected, _ = answer[key]
        assert talks == expected


@pytest.mark.parametrize(("world_size", "key"), CELLS)
def test_memory_is_that_of_the_tensors_that_are_held(
    key: str, world_size: int, measured: dict[int, list[dict[str, Any]]]
) -> None:
    for answer in measured[world_size]:
        _, held, _, expected = answer[key]
        assert held == {name: expected[name] for name in held}


def test_the_coarse_run_has_a_coarse_level(measured: dict[int, list[dict[str, Any]]]) -> None:
    assert {"coarse", "factors", "inverses"} == measured[2][0]["coarse"][0].keys()


WORLDS = [2, 3, 4, 8, 16, 64, 1024]


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "gpt2_small", "bert_large"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_inversions_are_within_a_tenth_of_their_lower_bound_in_large_worlds(name: str, world_size: int) -> None:
    assert inversions(assign(networks[name]().costs, world_size, world_size, 100)).ratio <= 1.10


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "gpt2_small"])
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("every", [10, 100])
def test_so_are_both_phases_under_mem_opt_but_for_tables_of_tokens(name: str, world_size: int, every: int) -> None:
    # A table is dear to precondition and costs nothing to invert: beside one, both bounds cannot be met together.
    costs = [cost for cost in networks[name]().costs if max(cost.input_dim, cost.output_dim) < 50_000]
    assignment = assign(costs, world_size, 1, every)
    assert inversions(assignment).ratio <= 1.10
    assert preconditioning(assignment).ratio <= 1.10


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_bytes_of_a_rank_grow_with_the_world_by_its_checksums_alone(fraction: float) -> None:
    costs, method = networks["resnet50"]().costs, Method()
    small, large = (traffic(assign(costs, ranks, max(1, int(fraction * ranks)), 100), method) for ranks in (4, 1024))
    assert large["factors"] == (1, small["factors"][1] + 2 * 4 * (1024 - 4))
    assert large["factors"][1] < 1.001 * small["factors"][1]
    assert {phase: count for phase, (count, _) in large.items()} == dict.fromkeys(large, 1)
    assert large.get("directions") == small.get("directions")
    if fraction == 1.0:
        assert large["inverses"] == small["inverses"]


def test_every_rank_of_a_large_world_holds_its_share_and_the_shares_make_the_whole() -> None:
    costs, method = networks["gpt2_small"]().costs, Method()
    assignment = assign(costs, 1024, 32, 100)
    whole = memory(assign(costs, 1, 1, 100), method)["inverses"]
    assert sum(memory(assignment, method, column[0])["inverses"] for column in assignment.columns) == whole
    for rank in (0, 31, 500, 1023):
        column = rank // 32
        assert memory(assignment, method, rank) == memory(assignment, method, 32 * column)


@pytest.mark.parametrize("strategy", ["comm_opt", "mem_opt", 0.25])
def test_one_rank_of_1024_counts_what_is_forecast(strategy: str | float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake process group: nobody else is there, so values are wrong by design, but bytes are not."""
    monkeypatch.setattr("kfac_dist.one_level.check_replicas", lambda *_: None)
    dist.init_process_group("fake", store=FakeStore(), rank=700, world_size=1024)
    try:
        run = Run("mlp-categorical", strategy=strategy)
        case, model, kfac, _ = build(run, 1024)
        logits = model(case.x[:4])
        kfac.accumulate()
        case.sum_loss(logits, case.y[:4]).backward()
        kfac.step(lr=0.1)
        said = dict(kfac.metrics)
        expected = traffic(kfac.assignment, Method(word=WORD), 700)
        assert {name: value for name, value in said.items() if name.startswith("bytes/")} == {
            f"bytes/{phase}": size for phase, (_, size) in expected.items()
        } | {"bytes/gradients": said["bytes/gradients"]}
        kfac.close()
    finally:
        dist.destroy_process_group()
    assert ("inverses" in expected, "directions" in expected) == (strategy != "mem_opt", strategy != "comm_opt")


# -- times ------------------------------------------------------------------------------------------------------------

SMALL = Network("small", (linear("0", 99, 100, rows=4), linear("1", 99, 50)), batch=10)


def test_one_rank_by_hand() -> None:
    machine = Machine(gemm=1e9, cholesky=1e8, eigh=1e7, memory=1e30, bandwidth=1.0, latency=1.0, operation=0.0)
    plan = forecast(SMALL, Method(factor_every=10, inverse_every=100), machine, 1, 1)
    flops = 2 * (4 * 100 * 100 + 100 * 50) * 10
    moments = 2 * (4 * (100**2 + 100**2) + 100**2 + 50**2) * 10
    assert plan.sgd == pytest.approx(3 * flops / 1e9)
    assert plan.phases == pytest.approx(
        {
            "precondition": 2 * (100 * 100 * 200 + 100 * 50 * 150) / 1e9,
            "factors": (flops + moments) / 1e9,
            "inverses": (3 * 100**3 + 50**3) / 1e8,
        }
    )
    assert plan.step == pytest.approx(
        plan.sgd + plan.phases["precondition"] + plan.phases["factors"] / 10 + plan.phases["inverses"] / 100
    )
    assert plan.bytes_per_step == plan.collectives_per_step == 0


def test_rows_take_the_place_of_dense_products_on_one_rank_where_they_are_fewer() -> None:
    network = Network("net", (linear("wide", 99, 50), linear("narrow", 4, 3)), batch=10)
    machine = Machine(1e9, 1e9, 1e9, 1e12, 1e9, 0.0, 0.0)
    dense, rows = (forecast(network, Method(by_rows=by_rows), machine, 1, 1) for by_rows in (False, True))
    saved = 2 * (100 * 50 * 150 - 10 * (100**2 + 50**2 + 100 * 50))  # and 10 rows are too many for the narrow layer
    assert dense.phases["precondition"] - rows.phases["precondition"] == pytest.approx(saved / 1e9)
    several = [forecast(network, Method(by_rows=by_rows), machine, 2, 2).phases for by_rows in (False, True)]
    assert several[0] == several[1]


def test_a_collective_takes_the_ring_s_time() -> None:
    machine = Machine(gemm=1, cholesky=1, eigh=1, memory=1, bandwidth=100.0, latency=0.5, operation=0)
    assert machine.collective(1000, 1) == 0.0
    assert machine.collective(1000, 4) == pytest.approx(2 * 0.75 * 10 + 2 * 2 * 0.5)
    assert machine.collective(1000, 5) == pytest.approx(2 * 0.8 * 10 + 2 * 3 * 0.5)


def test_the_best_fraction_is_at_least_as_good_as_both_ends() -> None:
    for world_size in (1, 8, 12):
        found = strategies(networks["vit_b_16"](), Method(), MACHINE, world_size)
        assert found["best"].step <= min(found["comm_opt"].step, found["mem_opt"].step)
        assert found["comm_opt"].assignment.gradient_workers == world_size
        assert found["mem_opt"].assignment.gradient_workers == 1


def test_a_slow_network_asks_for_all_inverses_and_a_fast_one_for_shared_work() -> None:
    network, method = networks["vit_b_16"](), Method(inverse_every=1000)
    slow = Machine(gemm=1e13, cholesky=1e12, eigh=1e11, memory=1e12, bandwidth=1e8, latency=1e-5, operation=0.0)
    fast = Machine(gemm=1e11, cholesky=1e10, eigh=1e9, memory=1e12, bandwidth=1e12, latency=1e-7, operation=0.0)
    assert strategies(network, method, slow, 8)["best"].assignment.gradient_workers == 8
    assert strategies(network, method, fast, 8)["best"].assignment.gradient_workers == 1
