from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import public_codes
from benchmarks.approximate_operator import growth, tselepidis
from benchmarks.corrections import (
    Corrected,
    LayerSamples,
    Memory,
    exact_on,
    koroko,
    samples_of,
)
from benchmarks.public_codes import flat
from benchmarks.states import DAMPING, NETS, State, direction, visited
from kfac_dist import CoarseConfig
from tests.helpers.coarse_runs import relative

NONE: frozenset[str] = frozenset()
PUBLISHED = {
    "nicolaides": CoarseConfig(space="nicolaides", max_samples=None),
    "spectral, largest": CoarseConfig(space="spectral", variant="largest", max_samples=None),
    "residual": CoarseConfig(space="residual", max_samples=None),
    "krylov": CoarseConfig(space="krylov", vectors_per_layer=2, variant="nicolaides", max_samples=None),
    "tselepidis": CoarseConfig(space="tselepidis", max_samples=None),
}
KOROKO = ("rhs", "layout", "kron", "p_i", "locations", "both", "twice")
CHANGED_BY = {
    "nicolaides": {"rhs", "locations", "both"},
    "spectral, largest": {"rhs", "layout", "kron", "p_i", "locations", "both"},
    "residual": {"rhs", "layout", "p_i", "locations", "both", "twice"},
    "krylov": {"rhs", "layout", "p_i", "locations", "both", "twice"},
}


@cache
def seen(net: str) -> tuple[list[LayerSamples], State, dict[str, Tensor]]:
    """One early state, its samples, and what the preconditioner makes of them in every space."""
    state = next(visited(net, 1, 48, 2))
    return samples_of(state), state, {space: direction(state, coarse) for space, coarse in PUBLISHED.items()}


def made(net: str, space: str, *deviations: str) -> Corrected:
    if space == "tselepidis":
        return tselepidis(seen(net)[0], DAMPING, frozenset(deviations), Memory())
    return koroko(seen(net)[0], space, DAMPING, frozenset(deviations), Memory())


def correction(found: Corrected) -> Tensor:
    return flat(found.direction) - flat(found.fine)


def squared_error(state: State, d: Tensor) -> float:
    """||d - d*||^2 in the norm of F_l but for ||d*||^2, which the differences below do not need."""
    return state.fisher.energy(d, DAMPING) - float(2 * d @ state.gradient)


@pytest.mark.parametrize("net", NETS)
def test_the_samples_are_those_of_the_dense_fisher(net: str) -> None:
    layers, state, _ = seen(net)
    U = torch.cat([torch.einsum("bto,bti->oib", layer.g, layer.a).flatten(0, 1) for layer in layers])
    assert relative(U / len(state.x) ** 0.5, state.fisher.U) < 1e-12


@pytest.mark.parametrize("space", PUBLISHED)
@pytest.mark.parametrize("net", NETS)
def test_without_deviations_it_is_the_preconditioners_correction(net: str, space: str) -> None:
    wanted = seen(net)[2][space]
    assert relative(flat(made(net, space).direction), wanted) < 1e-10


@pytest.mark.parametrize("deviation", KOROKO)
@pytest.mark.parametrize("space", CHANGED_BY)
def test_each_deviation_changes_the_correction_where_it_applies(space: str, deviation: str) -> None:
    net = "CNN 6-8-8-10"
    change = relative(correction(made(net, space, deviation)), correction(made(net, space)))
    assert (change > 1e-3) == (deviation in CHANGED_BY[space])


@pytest.mark.parametrize("deviation", ["lambda", "over_B", "in_place", "no_T", "both"])
def test_each_deviation_of_the_approximate_operator_changes_the_correction(deviation: str) -> None:
    net, memory, right = "CNN 6-8-8-10", Memory(), Memory()
    for _ in range(3):  # averages: what they were matters
        found = tselepidis(seen(net)[0], DAMPING, frozenset({deviation}), memory)
        wanted = tselepidis(seen(net)[0], DAMPING, NONE, right)
    change = relative(flat(found.direction) - flat(found.fine), flat(wanted.direction) - flat(wanted.fine))
    assert (change > 1e-3) == (deviation != "both")  # the fine level is not in R_0 grad


@pytest.mark.parametrize("deviation", ["average", "iterations"])
def test_averages_remember_the_state_before(deviation: str) -> None:
    memory = Memory()
    found = []
    for state in visited("MLP 64-20-20-20-10", 2, 48, 2):
        layers = samples_of(state)
        fresh = koroko(layers, "residual", DAMPING, NONE, Memory())
        found.append(
            relative(
                flat(koroko(layers, "residual", DAMPING, frozenset({deviation}), memory).direction),
                flat(fresh.direction),
            )
        )
    assert found[0] == 0
    assert found[1] > 1e-3


@pytest.mark.parametrize("space", CHANGED_BY)
@pytest.mark.parametrize("net", NETS)
def test_the_published_correction_keeps_its_promise(net: str, space: str) -> None:
    found, state = made(net, space), seen(net)[1]
    before, after = (squared_error(state, flat(parts)) for parts in (found.fine, found.direction))
    assert before - after == pytest.approx(found.promised, rel=1e-7)


@pytest.mark.parametrize("net", NETS)
def test_the_additive_form_changes_the_error_as_the_closed_formula_says(net: str) -> None:
    """c^T E^-1 c - 2 c^T E^-1 R_0 r with c = R_0 grad."""
    state, found = seen(net)[1], made(net, "nicolaides", "rhs")
    sizes = [layer.gradient.numel() for layer in seen(net)[0]]
    V = torch.block_diag(*(torch.ones(size, 1, dtype=torch.float64) for size in sizes))
    F_l, zeta = state.fisher.damped(DAMPING), flat(found.fine)
    c, r = V.T @ state.gradient, V.T @ (state.gradient - F_l @ zeta)
    E = V.T @ F_l @ V
    change = float(c @ torch.linalg.solve(E, c) - 2 * c @ torch.linalg.solve(E, r))
    before = squared_error(state, zeta)
    assert squared_error(state, flat(found.direction)) - before == pytest.approx(change, rel=1e-7)
    assert change > 0


def test_off_diagonal_sums_grow_by_the_recurrence_of_adding_the_old_triangle() -> None:
    found = growth(seen("MLP 64-20-20-20-10")[0], DAMPING, 5)
    wanted, updates = [1.0], 1  # in units of the right sum; the first inversion follows the first update
    for _ in range(4):
        kept = 1.0
        for k in range(updates, updates + 10):
            kept *= min(1 - 1 / (k + 1), 0.95)
        wanted.append(1 + kept * (wanted[-1] - 1) + wanted[-1])
        updates += 10
    assert [sums for sums, _ in found] == pytest.approx(wanted)
    assert found[0][1] > -1e-12
    assert found[-1][1] < -0.1  # E is indefinite


def test_the_exact_gradient_of_a_sub_batch() -> None:
    layers, state, _ = seen("CNN 6-8-8-10")
    index = torch.randint(len(state.x), (8,), generator=torch.Generator().manual_seed(0))
    U = state.fisher.U[:, index] * (len(state.x) / 8) ** 0.5
    wanted = torch.linalg.solve(U @ U.T + DAMPING * torch.eye(len(U)).double(), state.gradient)
    assert relative(flat(exact_on(layers, DAMPING, 8, NONE)), wanted) < 1e-10
    assert relative(flat(exact_on(layers, DAMPING, 8, frozenset({"draws"}))), wanted) > 1e-2


def test_smoke(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    public_codes.main(["--smoke", "--output", str(tmp_path / "page.md")])
    assert torch.get_num_threads() == threads
    text = (tmp_path / "page.md").read_text()
    tables = [part for part in text.split("\n## ")[1:] if part.split("\n")[0] in NETS]
    assert len(tables) == len(NETS)
    for part in tables:
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        assert {len(line) for line in lines} == {len(public_codes.HEAD)}
        convolutions = part.startswith("CNN")
        assert len(lines) - 2 == len(public_codes.rows(convolutions))
        published = [line for line in lines if line[1] == "(as published)" and line[0] in public_codes.KOROKO]
        assert [line[7] for line in published] == ["0/1"] * 4
