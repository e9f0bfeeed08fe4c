"""The float64 solve on rank 0: definite, nearly singular, indefinite, broken and empty operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfac_dist.coarse_solver import CoarseOperator, Status, factorise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_eigenvalues(values: list[float], seed: int = 0) -> Tensor:
    """A dense symmetric matrix with these eigenvalues."""
    Q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T


def solve(E: Tensor, rhs: Tensor) -> tuple[CoarseOperator, Status, Tensor]:
    operator = factorise(E)
    status, beta = operator.solve(rhs)
    return operator, status, beta


@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_a_definite_operator_is_solved(m: int) -> None:
    E = with_eigenvalues([10.0 ** (3 * i / m) for i in range(m)])
    for seed in range(3):  # one factorisation, many right-hand sides
        rhs = normal(m, seed=seed)
        operator, status, beta = solve(E, rhs)
        assert status == operator.status == Status.SOLVED
        assert torch.allclose(E @ beta, rhs, rtol=0, atol=1e-9)
    assert torch.allclose(operator.inverse, operator.inverse.mT, rtol=1e-12, atol=1e-12)
    assert 1.0 <= operator.condition <= 1e5


@pytest.mark.parametrize("spread", [1e8, 1e14])
def test_columns_of_very_different_sizes_are_no_difficulty(spread: float) -> None:
    """Jacobi scaling: the condition number is that of the matrix with a unit diagonal."""
    E = with_eigenvalues([1.0, 2.0, 3.0, 4.0])
    d = torch.tensor([1.0, spread**0.5, spread**-0.5, 1.0], dtype=torch.float64)
    operator, status, beta = solve(E * d[:, None] * d, normal(4))
    assert status == Status.SOLVED
    assert operator.condition < 20
    assert torch.allclose(beta * d, torch.linalg.solve(E, normal(4) / d), rtol=1e-10, atol=0)


@pytest.mark.parametrize("smallest", [1e-14, 0.0])
def test_a_nearly_singular_operator_gets_a_pseudo_inverse(smallest: float) -> None:
    """On the kept subspace the solution is exact: nothing explodes along the lost direction."""
    E = with_eigenvalues([smallest, 1.0, 1.3, 2.0])
    rhs = E @ normal(4)  # in the range
    operator, status, beta = solve(E, rhs)
    assert status == operator.status == Status.PSEUDO
    assert torch.allclose(E @ beta, rhs, rtol=0, atol=1e-10)
    assert beta.norm() < 10 * rhs.norm()
    assert operator.condition < 1e12


def test_an_indefinite_operator_keeps_its_positive_part() -> None:
    """Tselepidis' approximation can be one: there is no solution with a negative energy."""
    E = with_eigenvalues([-0.5, 0.7, 1.0, 1.5])
    E /= E.diagonal().sqrt()[:, None] * E.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(E)
    assert values[0] < 0 < values[1]
    rhs = normal(4)
    operator, status, beta = solve(E, rhs)
    assert status == Status.PSEUDO
    kept = vectors[:, 1:]
    assert torch.allclose(beta, kept @ ((kept.T @ rhs) / values[1:]), rtol=0, atol=1e-12)
    assert float(rhs @ operator.inverse @ rhs) >= 0


def test_a_singular_operator_with_harmless_pivots() -> None:
    """Rank 3 of 4, and yet the smallest pivot of its Cholesky factor is 2e-6: pivots do not tell the condition."""
    Y = normal(4, 3, seed=634)
    E, rhs = Y @ Y.T, Y @ normal(3, seed=635)
    d = E.diagonal().rsqrt()
    assert torch.linalg.cholesky(E * d[:, None] * d).diagonal().min() > 1e-6
    _, status, beta = solve(E, rhs)
    assert status == Status.PSEUDO
    assert torch.allclose(E @ beta, rhs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(0, 0), (0, 2)])
def test_an_operator_that_is_not_finite_fails(value: float, where: tuple[int, int]) -> None:
    E = torch.eye(3).double()
    E[where] = value
    operator, status, beta = solve(E, torch.ones(3).double())
    assert status == operator.status == Status.FAILED
    assert torch.equal(beta, torch.zeros(3).double())
    assert torch.isfinite(operator.matrix).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_right_hand_side_that_is_not_finite_fails(value: float) -> None:
    operator = factorise(torch.eye(2).double())
    status, beta = operator.solve(torch.tensor([1.0, value]).double())
    assert status == Status.FAILED
    assert torch.equal(beta, torch.zeros(2).double())
    assert operator.solve(torch.ones(2).double())[0] == Status.SOLVED  # the factorisation is as good as before


def test_an_eigenvalue_iteration_that_gives_up_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    _, status, beta = solve(torch.ones(3, 3).double(), torch.ones(3).double())
    assert status == Status.FAILED
    assert not beta.any()


def test_dropped_columns_have_a_zero_solution() -> None:
    """A zero row and column is a vector that dropped out of the basis; the others are solved as if it was not there."""
    E = torch.zeros(5, 5).double()
    kept = torch.tensor([0, 2, 3])
    E[kept[:, None], kept] = with_eigenvalues([1.0, 2.0, 3.0])
    rhs = normal(5)
    operator, status, beta = solve(E, rhs)
    assert status == Status.SOLVED
    assert torch.equal(beta[[1, 4]], torch.zeros(2).double())
    assert torch.allclose(beta[kept], torch.linalg.solve(E[kept[:, None], kept], rhs[kept]), rtol=1e-10, atol=0)
    assert not operator.inverse[[1, 4]].any()
    assert not operator.inverse[:, [1, 4]].any()


def test_an_empty_space_is_solved_by_nothing() -> None:
    _, status, beta = solve(torch.zeros(3, 3).double(), torch.zeros(3).double())
    assert status == Status.SOLVED
    assert not beta.any()


def test_trap_9_the_argument_is_left_alone() -> None:
    """Symmetrising in place would write into the caller's buffer, and grow it if the buffer is an average."""
    E = with_eigenvalues([1.0, 2.0, 5.0])
    E[0, 1] += 1e-3
    before = E.clone()
    operator = factorise(E)
    assert torch.equal(E, before)
    assert torch.equal(operator.matrix, operator.matrix.mT)
    assert torch.allclose(operator.matrix, 0.5 * (before + before.T), rtol=0, atol=1e-15)


@given(m=st.integers(1, 8), rank=st.integers(0, 8), seed=st.integers(0, 10**6), log=st.integers(-12, 12))
def test_any_semidefinite_operator(m: int, rank: int, seed: int, log: int) -> None:
    """E = Y Y^T of any rank and scale: finite, symmetric, and beta minimises the energy over the kept subspace."""
    Y = normal(m, max(1, min(rank, m)), seed=seed) * 10.0**log * (rank > 0)
    E, rhs = Y @ Y.T, Y @ normal(Y.shape[1], seed=seed + 1)
    _, status, beta = solve(E, rhs)
    assert status in (Status.SOLVED, Status.PSEUDO)
    assert torch.isfinite(beta).all()
    assert torch.linalg.norm(E @ beta - rhs) <= 1e-5 * torch.linalg.norm(rhs)
    assert float(rhs @ beta) >= 0
