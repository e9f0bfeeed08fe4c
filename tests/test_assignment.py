from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.assignment import Assignment, LayerCost, assign, nearest_divisor, refresh_slots
from kfac_dist.balance import makespan_lower_bound

dimensions = st.integers(1, 300)
layer_lists = st.lists(st.tuples(dimensions, dimensions, st.integers(1, 4)), max_size=12).map(
    lambda shapes: [LayerCost(f"layer{i}", a, g, n) for i, (a, g, n) in enumerate(shapes)]
)
sides = st.sampled_from(["both", "input"])

# 784-1000-500-250-30 and back, the bias column included.
AUTOENCODER = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
VISION_TRANSFORMER = [(769, 2304), (769, 768), (769, 3072), (3073, 768)] * 12 + [(769, 768), (769, 1000)]


def layers(shapes: list[tuple[int, int]]) -> list[LayerCost]:
    return [LayerCost(f"layer{i}", a, g) for i, (a, g) in enumerate(shapes)]


def autoencoder() -> list[LayerCost]:
    return layers([(a + 1, g) for a, g in itertools.pairwise(AUTOENCODER)])


def inversion_jobs(assignment: Assignment) -> list[int]:
    kinds = ("A", "G") if assignment.sides == "both" else ("A",)
    return [cost.inversion(side) for cost in assignment.costs for side in kinds]  # type: ignore[arg-type]


@given(layer_lists, st.integers(1, 24), st.floats(0.01, 1), sides)
def test_each_factor_has_one_owner_in_its_layers_column(costs, world, fraction, kinds):
    assignment = assign(costs, world, nearest_divisor(world, fraction), 10, kinds)
    expected = {(c.name, side) for c in costs for side in (("A", "G") if kinds == "both" else ("A",))}
    assert set(assignment.owner) == expected
    for (name, _), rank in assignment.owner.items():
        assert assignment.preconditions(name, rank)
    for cost in costs:
        holders = [rank for rank in range(world) if assignment.preconditions(cost.name, rank)]
        assert holders == list(assignment.columns[assignment.column_of[cost.name]])


@given(layer_lists, st.integers(1, 24), st.floats(0.01, 1), sides)
def test_loads_add_up_to_the_work(costs, world, fraction, kinds):
    assignment = assign(costs, world, nearest_divisor(world, fraction), 10, kinds)
    assert sum(map(assignment.inversion_load, range(world))) == sum(inversion_jobs(assignment))
    preconditioning = sum(map(assignment.preconditioning_load, range(world)))
    assert preconditioning == assignment.gradient_workers * sum(c.preconditioning(kinds) for c in costs)


@given(st.integers(1, 60), st.floats(0.001, 1))
def test_columns_and_rows_partition_the_ranks_and_cross_once(world, fraction):
    workers = nearest_divisor(world, fraction)
    assignment = assign(autoencoder(), world, workers)
    for partition in (assignment.columns, assignment.rows):
        assert sorted(rank for part in partition for rank in part) == list(range(world))
    assert {len(column) for column in assignment.columns} == {workers}
    assert all(len(set(row) & set(column)) == 1 for row in assignment.rows for column in assignment.columns)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 20])
def test_comm_opt_is_one_column_and_mem_opt_one_rank_per_layer(world):
    costs = autoencoder()
    comm_opt = assign(costs, world, nearest_divisor(world, 1.0))
    assert comm_opt.columns == (tuple(range(world)),)
    assert comm_opt.rows == tuple((rank,) for rank in range(world))
    assert all(comm_opt.preconditions(c.name, rank) for c in costs for rank in range(world))
    mem_opt = assign(costs, world, nearest_divisor(world, 1 / world))
    assert mem_opt.columns == tuple((rank,) for rank in range(world))
    assert mem_opt.rows == (tuple(range(world)),)
    assert all(mem_opt.owner[c.name, "A"] == mem_opt.owner[c.name, "G"] == mem_opt.column_of[c.name] for c in costs)


def test_more_ranks_than_factors_leave_one_factor_per_rank():
    assignment = assign(layers([(5, 4), (4, 3)]), 7, 7)
    assert sorted(assignment.owner.values()) == [0, 1, 2, 3]
    assert [assignment.inversion_load(rank) for rank in range(7)] == [125, 64, 64, 27, 0, 0, 0]


def test_known_grid_of_two_columns():
    # Per-rank loads a g (a + g) + (a^3 + g^3) / 2 with W = 2: 3000, 375 and 24; the first column takes the largest.
    assignment = assign(layers([(10, 10), (5, 5), (2, 2)]), 4, 2)
    assert assignment.columns == ((0, 1), (2, 3))
    assert assignment.rows == ((0, 2), (1, 3))
    assert assignment.column_of == {"layer0": 0, "layer1": 1, "layer2": 1}
    assert assignment.owner == {
        ("layer0", "A"): 0,
        ("layer0", "G"): 1,
        ("layer1", "A"): 2,
        ("layer1", "G"): 3,
        ("layer2", "A"): 2,
        ("layer2", "G"): 3,
    }


def test_neither_phase_waits_for_the_other_ones_balance():
    # "square" inverts cheaply and preconditions dearly; "long" the other way round. Apart, both phases are at or near
    # their bounds, whatever the interval; "square" and "small" on one rank would precondition half as long again.
    costs = [LayerCost("long", 100, 1), LayerCost("square", 50, 50), LayerCost("small", 40, 40)]
    for every in (1, 1000):
        assert assign(costs, 2, 1, every).column_of == {"long": 1, "square": 0, "small": 1}


@given(layer_lists, st.integers(1, 12), sides)
def test_assignment_is_deterministic_and_ties_go_by_index(costs, world, kinds):
    assert assign(costs, world, 1, 7, kinds) == assign(list(costs), world, 1, 7, kinds)
    equal = [LayerCost(f"layer{i}", 3, 3) for i in range(world)]
    assert list(assign(equal, world, 1).column_of.values()) == list(range(world))


@given(layer_lists, st.integers(1, 20), sides)
def test_every_layer_has_one_slot_and_no_slot_is_needlessly_long(costs, every, kinds):
    slots = refresh_slots(costs, every, kinds)
    assert list(slots) == [cost.name for cost in costs]
    assert all(0 <= slot < every for slot in slots.values())
    jobs = [sum(cost.inversion(side) for side in cost.blocks(kinds)) for cost in costs]
    loads = [sum(job for job, slot in zip(jobs, slots.values(), strict=True) if slot == s) for s in range(every)]
    used = min(len(costs), every)
    assert sum(load > 0 for load in loads) == used
    if costs:
        assert max(loads) <= sum(jobs) / used + max(jobs) * (1 - 1 / used)  # Graham's bound, longest first or not


def test_fewer_layers_than_steps_are_spread_evenly():
    assert list(refresh_slots(autoencoder(), 100).values()) == [24, 37, 62, 87, 99, 74, 49, 12]
    assert sorted(refresh_slots(autoencoder(), 10).values()) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert set(refresh_slots(autoencoder(), 1).values()) == {0}
    assert refresh_slots([], 5) == {}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_is_inverted_at_one_step_is_spread_over_the_ranks(world):
    costs = autoencoder()
    together, staggered = (assign(costs, world, world, 4, staggered=value) for value in (False, True))
    assert set(together.slot_of.values()) == {0}
    assert staggered.slot_of == refresh_slots(costs, 4)
    for slot in range(4):
        members = [cost for cost in costs if staggered.slot_of[cost.name] == slot]
        jobs = [cost.inversion(side) for cost in members for side in ("A", "G")]
        loads = [0] * world
        for cost in members:
            for side in ("A", "G"):
                loads[staggered.owner[cost.name, side]] += cost.inversion(side)
        assert sum(loads) == sum(jobs)
        assert max(loads) <= 4 / 3 * optimal_makespan(jobs, world)


def optimal_makespan(jobs: list[int], workers: int) -> int:
    return min(
        max(sum(job for job, at in zip(jobs, places, strict=True) if at == w) for w in range(workers))
        for places in itertools.product(range(workers), repeat=len(jobs))
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_lower_bound_holds_and_longest_first_keeps_grahams_bound(orders, workers):
    assignment = assign([LayerCost(f"l{i}", order, 1) for i, order in enumerate(orders)], workers, workers, 1, "input")
    jobs = inversion_jobs(assignment)
    optimum = optimal_makespan(jobs, workers)
    makespan = max(map(assignment.inversion_load, range(workers)))
    assert makespan_lower_bound(jobs, workers) <= optimum * (1 + 1e-12)
    assert optimum <= makespan <= (4 / 3 - 1 / (3 * workers)) * optimum * (1 + 1e-12)


@pytest.mark.parametrize("world", [2, 4, 8, 16])
@pytest.mark.parametrize("shapes", [VISION_TRANSFORMER, [(513, 512)] * 40], ids=["vision_transformer", "equal_layers"])
def test_inversions_are_near_the_lower_bound(shapes, world):
    assignment = assign(layers(shapes), world, world)
    makespan = max(map(assignment.inversion_load, range(world)))
    assert makespan <= 1.03 * makespan_lower_bound(inversion_jobs(assignment), world)


@pytest.mark.parametrize(
    ("world", "fraction", "workers"),
    [(1, 0.5, 1), (4, 1.0, 4), (4, 0.25, 1), (4, 0.5, 2), (3, 0.5, 1), (3, 2 / 3, 3), (4, 0.75, 4), (6, 0.25, 2)],
)
def test_gradient_workers_are_the_nearest_divisor(world, fraction, workers):
    assert nearest_divisor(world, fraction) == workers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assign(autoencoder(), 4, 3), "gradient_workers=3 must be .* divide world_size=4"),
        (lambda: assign(autoencoder(), 4, 4, 0), "inverse_every_n_steps=0 must be at least 1"),
        (lambda: assign([LayerCost("a", 1, 1)] * 2, 1, 1), r"unique; twice: \['a'\]"),
        (lambda: LayerCost("a", 0, 1), "'a': input_dim=0 must be at least 1"),
        (lambda: nearest_divisor(0, 1.0), "world_size=0 must be at least 1"),
        (lambda: nearest_divisor(4, 0.0), "fraction=0.0 must be above 0"),
    ],
)
def test_bad_arguments_say_the_bound(call, message):
    with pytest.raises(ValueError, match=message):
        call()
