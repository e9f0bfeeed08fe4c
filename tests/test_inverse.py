"""Damped inverses against dense solves, the pi-correction, and what happens when a factorisation fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist import KFACPreconditioner
from kfac_dist.factors import FactorShape, second_moment_sum
from kfac_dist.inverse import (
    DenseInverse,
    DensePreconditioner,
    EigenDecomposition,
    EigenPreconditioner,
    Outcome,
    decompose,
    invert,
    pi_correction,
)
from tests.helpers.cases import cases

LAM, T = 0.07, 9.0


def positive(groups: int, d: int, seed: int, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(groups, rank or 2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows.mT @ rows / rows.shape[1]).to(dtype)


A, G = positive(2, 4, 1) * 3.0, positive(2, 3, 2) * 0.2
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def solve(matrix: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([torch.linalg.solve(matrix(n), X[n].flatten()).view_as(X[n]) for n in range(2)])


def eigen(pi: Tensor | None) -> EigenPreconditioner:
    return EigenPreconditioner(decompose(A, None)[1], decompose(G, None)[1], T, pi)


def test_trap_7_eigen_damping_is_added_once_and_to_the_product() -> None:
    found = eigen(None)
    denominators = found.denominators(LAM)
    values = found.G.values[:, :, None] * found.A.values[:, None, :]  # type: ignore[union-attr]
    assert torch.allclose(denominators, T * values + LAM, rtol=1e-14)
    wanted = solve(lambda n: T * torch.kron(G[n], A[n]) + LAM * eye(12))
    assert torch.allclose(found.apply(X, LAM), wanted, rtol=1e-11)
    for wrong in (
        solve(lambda n: T * torch.kron(G[n], A[n]) + 2 * LAM * eye(12)),
        solve(lambda n: T * torch.kron(G[n] + LAM * eye(3), A[n] + LAM * eye(4))),
        solve(lambda n: torch.kron(G[n], A[n]) + LAM * eye(12)),
    ):
        assert not torch.allclose(found.apply(X, LAM), wrong, rtol=1e-3)


def pi_of(a: Tensor, g: Tensor) -> Tensor:
    return pi_correction(*(FactorShape(len(f), f.shape[-1]).mean_diagonal(f.diagonal(dim1=1, dim2=2)) for f in (a, g)))


def test_factored_damping_and_its_constant_term() -> None:
    pi = pi_of(A, G)
    s = (LAM / T) ** 0.5  # lam / T, so that T s^2 = lam
    wanted = solve(lambda n: T * torch.kron(G[n] + s / pi[n] * eye(3), A[n] + s * pi[n] * eye(4)))
    assert torch.allclose(eigen(pi).apply(X, LAM), wanted, rtol=1e-11)
    dense = DensePreconditioner(invert(A, s * pi, None)[1].matrix, invert(G, s / pi, None)[1].matrix, T)
    assert torch.allclose(dense.apply(X, 99.0), wanted, rtol=1e-11)  # its damping stands in the inverses
    nothing = EigenPreconditioner(
        EigenDecomposition(eye(4).expand(2, 4, 4), torch.zeros(2, 4, dtype=X.dtype)),
        EigenDecomposition(eye(3).expand(2, 3, 3), torch.zeros(2, 3, dtype=X.dtype)),
        T,
        torch.ones(2, dtype=X.dtype),
    )
    assert torch.allclose(nothing.apply(X, LAM), X / LAM)  # with zero factors only lam is left, once


def test_the_input_side_alone() -> None:
    wanted = torch.stack([torch.linalg.solve(A[n] + LAM * eye(4), X[n].mT).mT for n in range(2)])
    only_a = EigenPreconditioner(decompose(A, None)[1], None, T, None)
    assert torch.allclose(only_a.apply(X, LAM), wanted, rtol=1e-11)
    assert torch.allclose(
        DensePreconditioner(invert(A, LAM, None)[1].matrix, None, T).apply(X, LAM), wanted, rtol=1e-11
    )


def test_pi_balances_the_traces_and_is_one_at_the_edges() -> None:
    pi = pi_of(A, G)
    traces = [(A[n].trace() / 4) / (G[n].trace() / 3) for n in range(2)]
    assert torch.allclose(pi, torch.stack(traces).sqrt())
    assert torch.allclose(pi_of(100 * A, G), 10 * pi)
    zero = torch.zeros(1, 3, 3, dtype=torch.float64)
    for a, g in ((zero, G[:1]), (A[:1], zero), (zero, zero), (A[:1] * float("nan"), G[:1]), (A[:1], G[:1] / 0)):
        assert torch.equal(pi_of(a, g), torch.ones(1, dtype=torch.float64))
    mixed = pi_of(A, torch.stack([zero[0], G[1]]))  # group by group
    assert torch.equal(mixed[0], torch.ones((), dtype=torch.float64))
    assert torch.equal(mixed[1], pi[1])


def test_negative_eigenvalues_are_taken_for_zero() -> None:
    factor = torch.diag(torch.tensor([2.0, -1e-3], dtype=torch.float64))[None]
    assert decompose(factor, None)[1].values.tolist() == [[0.0, 2.0]]


class Failing:
    """torch.linalg.<name>, which fails the first ``times`` calls (or always), in the function's own way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: float) -> None:
        self.original, self.times, self.dtypes = getattr(torch.linalg, name), times, list[torch.dtype]()
        self.raises = name == "eigh"
        monkeypatch.setattr(torch.linalg, name, self)

    def __call__(self, matrices: Tensor) -> Any:
        self.dtypes.append(matrices.dtype)
        if len(self.dtypes) > self.times:
            return self.original(matrices)
        if self.raises:
            raise torch.linalg.LinAlgError("did not converge")
        factor, info = self.original(matrices)
        return factor, torch.ones_like(info)


FLOATS = positive(2, 4, 5, dtype=torch.float32)
ATTEMPTS = [torch.float32, torch.float64, torch.float64]


@pytest.mark.parametrize(("times", "outcome"), [(0, Outcome.NATIVE), (1, Outcome.FLOAT64), (2, Outcome.JITTER)])
def test_retreats_that_still_factorise(times: int, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.linalg.inv(FLOATS.double() + 0.1 * eye(4))
    spy = Failing(monkeypatch, "cholesky_ex", times)
    found, inverse = invert(FLOATS, 0.1, None)
    assert (found, spy.dtypes) == (outcome, ATTEMPTS[: times + 1])
    assert inverse.matrix.dtype == torch.float32
    assert torch.allclose(inverse.matrix.double(), exact, rtol=1e-3)
    spy = Failing(monkeypatch, "eigh", times)
    found, basis = decompose(FLOATS, None)
    assert (found, spy.dtypes) == (outcome, ATTEMPTS[: times + 1])
    assert basis.vectors.dtype == basis.values.dtype == torch.float32
    rebuilt = basis.vectors @ torch.diag_embed(basis.values) @ basis.vectors.mT
    assert torch.allclose(rebuilt, FLOATS, rtol=1e-4, atol=1e-5)


def test_last_good_then_a_scaled_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    good, basis = invert(FLOATS, 0.1, None)[1], decompose(FLOATS, None)[1]
    Failing(monkeypatch, "cholesky_ex", float("inf"))
    Failing(monkeypatch, "eigh", float("inf"))
    assert invert(2 * FLOATS, 0.1, good) == (Outcome.LAST_GOOD, good)
    assert decompose(2 * FLOATS, basis) == (Outcome.LAST_GOOD, basis)
    for last in (None, basis):  # an inverse of the other kind is no help
        outcome, inverse = invert(FLOATS, 0.1, last)
        assert outcome is Outcome.IDENTITY
        mean = (FLOATS.diagonal(dim1=1, dim2=2) + 0.1).mean(1)
        assert torch.allclose(inverse.matrix, torch.eye(4) / mean[:, None, None])
    outcome, identity = decompose(FLOATS, None)
    assert outcome is Outcome.IDENTITY
    assert torch.equal(identity.vectors, torch.eye(4).expand(2, 4, 4))
    assert torch.allclose(identity.values, FLOATS.diagonal(dim1=1, dim2=2).mean(1)[:, None].expand(2, 4))


def test_a_factor_that_is_not_finite_becomes_an_identity() -> None:
    broken = FLOATS * float("nan")
    assert torch.equal(invert(broken, 0.1, None)[1].matrix, torch.eye(4).expand(2, 4, 4))
    outcome, basis = decompose(broken, None)
    assert (outcome, basis.values.unique().tolist()) == (Outcome.IDENTITY, [1.0])
    assert invert(broken, 0.1, DenseInverse(FLOATS))[0] is Outcome.LAST_GOOD


def test_singular_factors_are_inverted_in_float32() -> None:
    """One sample in 30 dimensions, and a zero one: nothing but damping holds them up."""
    thin = positive(1, 30, 9, rank=1, dtype=torch.float32) * 1e4
    for factor in (thin, torch.zeros(1, 30, 30)):
        outcome, inverse = invert(factor, 1e-3, None)
        assert torch.isfinite(inverse.matrix).all()
        assert outcome in (Outcome.NATIVE, Outcome.FLOAT64, Outcome.JITTER)


@pytest.mark.parametrize(("method", "name"), [("factored", "cholesky_ex"), ("eigen", "eigh")])
def test_training_goes_on_with_the_last_inverses_and_counts(
    method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases()["mlp-categorical"]
    model = case.model()
    kfac = KFACPreconditioner(
        model,
        likelihood="categorical",
        damping_method=method,  # type: ignore[arg-type]
        factor_every_n_steps=1,
        inverse_every_n_steps=2,
    )

    def step() -> tuple[list[Tensor], float]:
        model.zero_grad()
        logits = model(case.x)
        kfac.accumulate(sample_ids=torch.arange(12))
        case.loss(logits, case.y).backward()
        kfac.step()
        return [p.grad for p in model.parameters()], kfac.metrics["inverse_fallbacks"]  # type: ignore[misc]

    good, count = step()
    assert count == 0
    step()
    with monkeypatch.context() as patch:
        Failing(patch, name, float("inf"))
        kept, _ = step()  # an inverse step on which all six factorisations fail
    assert all(torch.equal(a, b) for a, b in zip(kept, good, strict=True))
    _, count = step()  # the count travels with the next statistics
    assert count == 6
    fresh, count = step()
    assert count == 6
    assert all(torch.isfinite(g).all() for g in fresh)
    assert not all(torch.equal(a, b) for a, b in zip(fresh, good, strict=True))


@pytest.mark.parametrize(("blocks_a", "blocks_g"), [(1, 1), (2, 1), (1, 3), (3, 2), (7, 5), (4, 5)])
def test_block_diagonal_factors_are_dense_ones_with_zeros_outside_their_blocks(blocks_a: int, blocks_g: int) -> None:
    """Orders 7 and 5, so that the last block of every partition but the finest is padded."""
    a, g = FactorShape(2, 7, blocks_a), FactorShape(2, 5, blocks_g)
    rows = {"A": normal(2, 30, 7, seed=3), "G": normal(2, 30, 5, seed=4)}
    gradient = normal(2, 5, 7, seed=5)
    stored = {side: second_moment_sum(rows[side], blocks=shape.blocks) / 30 for side, shape in (("A", a), ("G", g))}
    diagonals = {side: factor.diagonal(dim1=1, dim2=2) for side, factor in stored.items()}
    assert stored["A"].shape == a.stored
    dense = {}
    for side, shape in (("A", a), ("G", g)):
        full = rows[side].mT @ rows[side] / 30
        place = torch.arange(shape.dim) // shape.size
        dense[side] = full * (place[:, None] == place[None, :])
        assert torch.allclose(shape.mean_diagonal(diagonals[side]), full.diagonal(dim1=1, dim2=2).mean(-1))
    pi = pi_correction(a.mean_diagonal(diagonals["A"]), g.mean_diagonal(diagonals["G"]))
    assert torch.allclose(pi, pi_of(dense["A"], dense["G"]))
    s = (LAM / T) ** 0.5
    found = {
        "factored": EigenPreconditioner(decompose(stored["A"], None)[1], decompose(stored["G"], None)[1], T, pi),
        "eigen": EigenPreconditioner(decompose(stored["A"], None)[1], decompose(stored["G"], None)[1], T, None),
        "dense": DensePreconditioner(
            invert(stored["A"], s * pi, None)[1].matrix, invert(stored["G"], s / pi, None)[1].matrix, T
        ),
        "input": DensePreconditioner(invert(stored["A"], LAM, None)[1].matrix, None, T),
    }
    for n in range(2):
        A_n, G_n, eye_a, eye_g = dense["A"][n], dense["G"][n], eye(7), eye(5)
        matrix = {
            "eigen": T * torch.kron(G_n, A_n) + LAM * torch.kron(eye_g, eye_a),
            "factored": T * torch.kron(G_n + s / pi[n] * eye_g, A_n + s * pi[n] * eye_a),
            "input": torch.kron(eye_g, A_n + LAM * eye_a),
        }
        matrix["dense"] = matrix["factored"]
        for name, preconditioner in found.items():
            wanted = torch.linalg.solve(matrix[name], gradient[n].flatten()).view(5, 7)
            direction = preconditioner.apply(gradient, LAM)[n]
            assert torch.allclose(direction, wanted, rtol=1e-10, atol=1e-12), name


def test_the_fewest_blocks_within_the_limit() -> None:
    for dim, limit in ((7, 3), (1001, 512), (50257, 8192), (5, 5), (5, 1), (6, 4)):
        shape = FactorShape.limited(2, dim, limit)
        assert shape.size <= limit
        assert (shape.blocks - 1) * shape.size < dim <= shape.blocks * shape.size
        assert shape.blocks <= -(-dim // limit)
