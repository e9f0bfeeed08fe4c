"""Coefficients that make a basis orthonormal: random, dependent, zero and badly scaled columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfac_dist.restrict import block_diagonal, orthonormal_coefficients

EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(V: Tensor) -> Tensor:
    return V.mT @ V


def kept(C: Tensor, G: Tensor) -> Tensor:
    """The diagonal of C^T G C, (n, k): one for an independent column, zero for one that dropped out."""
    product = C.mT @ G @ C
    assert torch.allclose(product, torch.diag_embed(product.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)
    return product.diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_independent_columns_become_orthonormal(k: int) -> None:
    V = normal(4, 30, k)
    C = orthonormal_coefficients(gram(V), EPS)
    assert torch.allclose(gram(V @ C), torch.eye(k).double().expand(4, k, k), rtol=0, atol=1e-12)
    assert torch.equal(C, C.triu())  # Gram-Schmidt: the j-th is made of the first j, so the order decides what drops
    assert (C.diagonal(dim1=1, dim2=2) > 0).all()  # and the signs are the same on every rank


def test_dependent_and_zero_columns_drop_out() -> None:
    v, w, x = normal(3, 20)
    V = torch.stack([v, 2 * v, w, torch.zeros(20).double(), v - 3 * w, x, x + 1e-12 * v], dim=1)[None]
    C = orthonormal_coefficients(gram(V), EPS)
    assert torch.allclose(kept(C, gram(V)), torch.tensor([[1.0, 0, 1, 0, 0, 1, 0]]).double(), rtol=0, atol=1e-10)
    assert not C[0][:, [1, 3, 4, 6]].any()
    # What is kept spans the same space.
    projector = (V @ C)[0] @ (V @ C)[0].T
    assert torch.allclose(projector @ V[0], V[0], rtol=0, atol=1e-9)


def test_the_order_decides_which_of_two_equal_columns_stays() -> None:
    v = normal(20)
    C = orthonormal_coefficients(gram(torch.stack([v, v], dim=1)[None]), EPS)
    assert C[0, 0, 0] == pytest.approx(1 / float(v.norm()))
    assert not C[0].flatten()[1:].any()


@pytest.mark.parametrize("spread", [1e3, 1e10, 1e100])
def test_lengths_do_not_matter(spread: float) -> None:
    """The tolerance is relative to each column: a short one is not a dependent one."""
    V = normal(1, 20, 4) * torch.tensor([1.0, 1 / spread, spread, 1.0], dtype=torch.float64)
    C = orthonormal_coefficients(gram(V), EPS)
    assert torch.allclose(gram(V @ C), torch.eye(4).double()[None], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("angle", "stays"), [(1e-3, True), (1e-6, True), (1e-9, False)])
def test_nearly_dependent_columns(angle: float, stays: bool) -> None:
    v, w = torch.linalg.qr(normal(20, 2))[0].T
    V = torch.stack([v, v + angle * w], dim=1)[None]
    C = orthonormal_coefficients(gram(V), EPS)
    assert bool(C[0, 1, 1] > 0) == stays
    if stays:  # from a Gram matrix an angle is known to sqrt(eps) only
        assert torch.allclose(gram(V @ C), torch.eye(2).double()[None], rtol=0, atol=1e-3)


def test_the_tolerance_follows_the_type_of_the_vectors() -> None:
    """An angle of 1e-4 is noise in float32, whose products are known to 1e-7, and none in float64."""
    v, w = torch.linalg.qr(normal(20, 2))[0].T
    G = gram(torch.stack([v, v + 1e-4 * w], dim=1)[None])
    assert orthonormal_coefficients(G, EPS)[0, 1, 1] > 0
    assert orthonormal_coefficients(G, torch.finfo(torch.float32).eps)[0, 1, 1] == 0


def test_blocks_do_not_touch_each_other() -> None:
    """A zero block, a block that is not finite and a good one: the good one is as if alone."""
    V = normal(3, 20, 3)
    V[1] = 0.0
    V[2, 0, 0] = float("nan")
    C = orthonormal_coefficients(gram(V), EPS)
    assert torch.equal(C[0], orthonormal_coefficients(gram(V[:1]), EPS)[0])
    assert not C[1].any()


def test_block_diagonal() -> None:
    blocks = normal(3, 2, 2)
    full = block_diagonal(blocks)
    assert full.shape == (6, 6)
    for i in range(3):
        assert torch.equal(full[2 * i : 2 * i + 2, 2 * i : 2 * i + 2], blocks[i])
    assert int((full != 0).sum()) == 12


@given(
    n=st.integers(1, 4), k=st.integers(1, 6), p=st.integers(1, 12), seed=st.integers(0, 10**6), log=st.integers(-30, 30)
)
def test_any_block(n: int, k: int, p: int, seed: int, log: int) -> None:
    """More columns than dimensions included: as many are kept as the rank, and they are orthonormal."""
    lengths = 10.0 ** (normal(n, 1, k, seed=seed + 1).clamp(-3, 3) + log)
    V = normal(n, p, k, seed=seed) * lengths
    G = gram(V)
    C = orthonormal_coefficients(G, EPS)
    ones = kept(C, G)
    assert ((ones - 1).abs().minimum(ones.abs()) < 1e-9).all()
    ranks = torch.linalg.matrix_rank(V / V.norm(dim=1, keepdim=True), rtol=1e-6)
    assert torch.equal((ones > 0.5).sum(1), ranks)
