"""Every registered likelihood against its own negative log-likelihood, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_dist.draws import uniforms
from kfac_dist.likelihoods import likelihoods

# A new likelihood adds its negative log-likelihood of one sample here; without one the first test fails.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": lambda z, y: F.cross_entropy(z[None], y),
    "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
    "gaussian": lambda z, y: 0.5 * (z - y).square().sum(),
}
LOGITS = torch.tensor([[0.5, -1.0, 1.5], [0.0, 2.0, -0.3]], dtype=torch.float64)
DRAWS = 20_000


def test_every_registered_likelihood_has_its_loss() -> None:
    assert set(LOSSES) == set(likelihoods)


def hessian(name: str, z: Tensor) -> Tensor:
    """Of the negative log-likelihood at one sample's logits; it does not depend on the target for these."""
    y = torch.tensor([1]) if name == "categorical" else torch.full_like(z, 0.25)
    return torch.autograd.functional.hessian(lambda logits: LOSSES[name](logits, y), z)  # type: ignore[return-value]


@pytest.mark.parametrize("name", LOSSES)
def test_the_columns_are_a_root_of_the_hessian(name: str) -> None:
    columns = list(likelihoods[name]().root_columns(LOGITS))
    for sample, z in enumerate(LOGITS):
        found = sum(torch.outer(column[sample], column[sample]) for column in columns)
        assert torch.allclose(found, hessian(name, z), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_cotangents_have_mean_zero_and_the_hessian_as_covariance(name: str) -> None:
    likelihood = likelihoods[name]()
    z = LOGITS[:1].expand(DRAWS, -1)
    numbers = uniforms(1, 0, 0, torch.arange(DRAWS), likelihood.uniforms_per_sample(z))
    g = likelihood.sampled_cotangent(z, numbers)
    assert g.shape == z.shape
    assert g.mean(0).abs().max() < 5 / DRAWS**0.5
    assert (g.T @ g / DRAWS - hessian(name, LOGITS[0])).abs().max() < 10 / DRAWS**0.5


@pytest.mark.parametrize("name", LOSSES)
def test_a_cotangent_is_the_gradient_at_some_target(name: str) -> None:
    """Softmax or sigmoid minus a one-hot or binary target, or a residual: no other scale, no mean over anything."""
    likelihood = likelihoods[name]()
    numbers = uniforms(1, 0, 0, torch.arange(2), likelihood.uniforms_per_sample(LOGITS))
    g = likelihood.sampled_cotangent(LOGITS, numbers)
    for sample, z in enumerate(LOGITS):
        if name == "categorical":
            targets = [torch.tensor([c]) for c in range(3)]
        elif name == "bernoulli":
            targets = [torch.tensor(bits).double() for bits in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist()]
        else:
            targets = [z + torch.special.ndtri(numbers[sample])]
        gradients = [torch.autograd.functional.jacobian(lambda v, y=y: LOSSES[name](v, y), z) for y in targets]
        assert min(float((gradient - g[sample]).abs().max()) for gradient in gradients) < 1e-14  # type: ignore[operator]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits(name: str, dtype: torch.dtype) -> None:
    likelihood = likelihoods[name]()
    z = LOGITS.to(dtype)
    numbers = uniforms(1, 0, 0, torch.arange(2), likelihood.uniforms_per_sample(z))
    g = likelihood.sampled_cotangent(z, numbers)
    exact = likelihood.sampled_cotangent(z.double(), numbers)
    assert g.dtype == dtype
    assert torch.allclose(g.double(), exact, atol=1e-2)
    assert all(column.dtype == dtype for column in likelihood.root_columns(z))


@pytest.mark.parametrize("dim", [-1, 2, 1, -2])
def test_classes_lie_where_class_dim_says(dim: int) -> None:
    """(B, 4, 2, classes) against the classes moved elsewhere: the same targets at the same positions."""
    z = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last, other = likelihoods["categorical"](-1), likelihoods["categorical"](dim)
    moved = z.movedim(-1, dim)
    numbers = uniforms(1, 0, 0, torch.arange(3), 8)
    assert last.uniforms_per_sample(z) == other.uniforms_per_sample(moved) == 8
    assert other.target_shape(moved) == (3, 4, 2)
    found = other.sampled_cotangent(moved, numbers).movedim(dim, -1)
    assert torch.equal(found, last.sampled_cotangent(z, numbers))
    columns = zip(other.root_columns(moved), last.root_columns(z), strict=True)
    assert all(torch.equal(a.movedim(dim, -1), b) for a, b in columns)
    mask = torch.arange(12).view(3, 4) % 3 > 0
    kept = (torch.ones_like(moved) * other.expand_mask(mask, moved)).movedim(dim, -1)
    assert torch.equal(kept, mask[..., None, None].expand(3, 4, 2, 5).double())


def test_draws_at_the_edge_of_the_distribution() -> None:
    """Probabilities that round to 0 or 1, and uniform numbers next to both ends."""
    ends = torch.tensor([[2.0**-53], [1 - 2.0**-53]], dtype=torch.float64)
    z = torch.tensor([[100.0, -100.0, -100.0], [-100.0, -100.0, 100.0]], dtype=torch.float64)
    g = likelihoods["categorical"]().sampled_cotangent(z, ends)
    assert torch.allclose(g, torch.zeros_like(g))
    g = likelihoods["bernoulli"]().sampled_cotangent(z, ends.expand(2, 3))
    assert torch.allclose(g, torch.zeros_like(g))
    assert likelihoods["gaussian"]().sampled_cotangent(z, ends.expand(2, 3)).abs().max() < 10
