"""``.grad`` after ``step()`` against the dense float64 reference."""

from __future__ import annotations

import copy

import pytest
import torch

from kfac_dist import KFACPreconditioner
from tests.helpers.cases import Case, cases
from tests.helpers.conformance import agree
from tests.helpers.dense import JOINT, cotangents, gradient_matrix, kfac_direction, kronecker_factors, treated

TOLERANCE = 1e-9
ALL = cases()


def directions(case: Case, **options: object) -> dict[str, torch.Tensor]:
    model = case.model()
    kfac = KFACPreconditioner(model, seed=3, uncovered="diagonal", **options)
    ids = torch.arange(100, 100 + len(case.x))
    logits = model(case.x)
    kfac.accumulate(sample_ids=ids)
    case.loss(logits, case.y).backward()
    kfac.step()
    kfac.close()
    return {name: gradient_matrix(module) for name, module in treated(model).items()}


def reference(case: Case, lam: float, method: str, sides: str, fisher: str, samples: int | str) -> dict:
    model = case.model()
    case.loss(model(case.x), case.y).backward()
    ids = torch.arange(100, 100 + len(case.x))
    factors = kronecker_factors(
        case,
        copy.deepcopy(model),
        case.x,
        lambda z: cotangents(case, z, case.y, fisher, samples, 3, 0, ids),
        sides=sides,
    )
    found = {}
    for name, module in treated(model).items():
        gradient = gradient_matrix(module)
        if isinstance(module, JOINT):  # one factor: nothing to balance, and nothing that inputs alone tell
            found[name] = gradient if sides == "input" else kfac_direction(*factors[name], gradient, lam, "eigen")
        else:
            found[name] = kfac_direction(*factors[name], gradient, lam, method, sides)
    return found


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.linalg.norm(found[name] - value) <= TOLERANCE * torch.linalg.norm(value), name
        assert value.abs().max() > 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("samples", [1, 3, "exact", "empirical"])
@pytest.mark.parametrize(("method", "sides"), [("eigen", "both"), ("factored", "both"), ("eigen", "input")])
def test_direction_is_the_dense_solution(name: str, samples: int | str, method: str, sides: str) -> None:
    case, lam = ALL[name], 0.03
    empirical = samples == "empirical"
    likelihood, draws = ("empirical", 1) if empirical else (case.likelihood, samples)
    found = directions(
        case, likelihood=likelihood, fisher_samples=draws, damping=lam, damping_method=method, factor_sides=sides
    )
    wanted = reference(case, lam, method, sides, "empirical" if empirical else "true", draws)
    assert_equal(found, wanted)
    for layer, direction in found.items():
        size = wanted[layer].abs().max()
        agree(f"net: {name}", f"direction, {method}", direction / size, wanted[layer] / size, 1e-8)


@pytest.mark.parametrize("method", ["eigen", "factored"])
def test_a_schedule_acts_in_its_own_step_between_inversions(method: str) -> None:
    case = ALL["cnn"]
    model = case.model()
    kfac = KFACPreconditioner(
        model, likelihood="empirical", damping=lambda step: 0.5 / (step + 1), damping_method=method
    )
    for step in range(3):
        model.zero_grad()
        case.loss(model(case.x), case.y).backward()
        kfac.step()
        found = {name: gradient_matrix(module) for name, module in treated(model).items()}
        assert kfac.metrics["damping"] == 0.5 / (step + 1)
        assert_equal(found, reference(case, 0.5 / (step + 1), method, "both", "empirical", 1))
    assert kfac.metrics["inverse_updates"] == 1


def test_constant_and_scheduled_damping_agree() -> None:
    case = ALL["cnn"]
    constant = directions(case, likelihood="categorical", damping=0.1)
    assert_equal(directions(case, likelihood="categorical", damping=lambda step: 0.1), constant)


@pytest.mark.parametrize("reduction", ["sum", "mean_all", 0.25])
@pytest.mark.parametrize("likelihood", ["true", "empirical"])
def test_direction_does_not_depend_on_how_the_loss_is_reduced(reduction: str | float, likelihood: str) -> None:
    case = ALL["mlp-bernoulli"]
    scale = {"sum": len(case.x), "mean_all": 1 / case.y.shape[1]}.get(reduction, reduction)
    kind = case.likelihood if likelihood == "true" else "empirical"
    wanted = directions(case, likelihood=kind)
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood=kind, seed=3, loss_reduction=reduction)
    logits = model(case.x)
    kfac.accumulate(sample_ids=torch.arange(100, 112))
    (scale * case.loss(logits, case.y)).backward()
    kfac.step()
    assert_equal({name: gradient_matrix(module) for name, module in treated(model).items()}, wanted)


def test_trap_2_bias_is_the_last_column_before_flattening() -> None:
    """[W.flatten(), b] viewed as a matrix gives another direction: the reference would notice."""
    case = ALL["mlp-categorical"]
    model = case.model()
    case.loss(model(case.x), case.y).backward()
    module = model[0]
    right = gradient_matrix(module)
    wrong = torch.cat([module.weight.grad.flatten(), module.bias.grad]).view_as(right)
    ids = torch.arange(100, 112)
    A, G, T = kronecker_factors(
        case, copy.deepcopy(model), case.x, lambda z: cotangents(case, z, case.y, "true", 1, 3, 0, ids)
    )["0"]
    found = directions(case, likelihood="categorical", damping=0.03, damping_method="eigen")["0"]
    assert torch.allclose(found, kfac_direction(A, G, T, right, 0.03), rtol=0, atol=1e-9)
    assert not torch.allclose(found, kfac_direction(A, G, T, wrong, 0.03), rtol=0, atol=1e-3)
