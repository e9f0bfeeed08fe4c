"""Second moments and their moving average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_dist import KFACPreconditioner
from kfac_dist.factors import decay_weight, moving_average, second_moment_sum, statistics_dtype
from kfac_dist.fused import (
    pack_symmetric,
    packed_diagonal,
    triangle_dim,
    triangle_size,
    unpack_symmetric,
    unpack_upper,
)
from tests.helpers.cases import Case, cases


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_second_moments(ones: bool, masked: bool) -> None:
    rows = normal(3, 7, 4)
    weights = torch.tensor([1, 0, 1, 1, 0, 1, 1]) if masked else None
    kept = rows[:, weights.bool()] if weights is not None else rows
    if ones:
        kept = torch.cat([kept, torch.ones(*kept.shape[:2], 1, dtype=kept.dtype)], -1)
    wanted = sum(torch.einsum("gi,gj->gij", row, row) for row in kept.unbind(1))
    found = second_moment_sum(rows, ones=ones, weights=weights)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dim", [255, 256, 300, 512])
def test_moments_by_blocks_are_whole_and_symmetric(dim: int) -> None:
    rows = normal(1, 9, dim)
    found, bordered = second_moment_sum(rows), second_moment_sum(rows, ones=True)
    assert torch.allclose(found, rows.mT @ rows, rtol=1e-13, atol=1e-13)
    assert torch.allclose(found, found.mT, rtol=1e-13, atol=1e-13)
    assert torch.equal(bordered[:, :dim, :dim], found)
    assert torch.equal(bordered[:, dim, :dim], rows.sum(1))


def test_statistics_are_at_least_float32() -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [statistics_dtype(d) for d in kinds] == [torch.float32] * 3 + [torch.float64]


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 10])
def test_packing_keeps_the_upper_triangle(dim: int) -> None:
    matrices = normal(2, dim, dim)
    symmetric = matrices.triu() + matrices.triu(1).mT
    packed = torch.full((2, triangle_size(dim)), float("nan"), dtype=matrices.dtype)
    pack_symmetric(matrices, packed.view(-1))  # whatever stands below the diagonal
    rows, columns = torch.triu_indices(dim, dim)
    upper = matrices[:, rows, columns]
    assert torch.equal(packed.sort().values, upper.sort().values)  # every entry once
    assert triangle_dim(packed.shape[1]) == dim
    assert torch.equal(unpack_symmetric(packed), symmetric)
    assert torch.equal(unpack_upper(packed).triu(), symmetric.triu())
    assert torch.equal(packed_diagonal(packed), symmetric.diagonal(dim1=1, dim2=2))


def test_the_average_knows_its_weights() -> None:
    """Numbers 1, 2, .. through the average: each has the weight that the definition gives it, and they sum to one."""
    decay, updates = 0.9, 30
    weights = torch.zeros(updates, dtype=torch.float64)
    average: Tensor | None = None
    for n in range(updates):
        rho = min(1 - 1 / (n + 1), decay)
        assert decay_weight(n, decay) == rho
        weights = weights * rho
        weights[n] = 1 - rho
        new = torch.zeros(updates, dtype=torch.float64)
        new[n] = 1.0
        average = moving_average(average, new, n, decay)
    assert average is not None
    assert torch.allclose(average, weights, rtol=0, atol=1e-15)
    assert weights.sum().item() == pytest.approx(1, abs=1e-14)
    assert torch.allclose(weights[:10], weights[:10].mean())  # the first ten count alike: 1 - 1/(n + 1) <= 0.9
    assert weights[-1].item() == pytest.approx(0.1)


def test_the_average_takes_the_memory_of_what_is_new() -> None:
    old = normal(1, 3, 3)
    copy = old.clone()
    for n in (0, 1, 5):
        new = normal(1, 3, 3, seed=1)
        rho = decay_weight(n, 0.9)
        wanted = rho * old + (1 - rho) * new
        result = moving_average(old, new, n, 0.9)
        assert result.data_ptr() == new.data_ptr()
        assert torch.allclose(result, wanted, rtol=1e-15)
    assert torch.equal(old, copy)


def preconditioner(case: Case, **options: object) -> KFACPreconditioner:
    return KFACPreconditioner(case.model(), likelihood=case.likelihood, fisher_samples="exact", **options)  # type: ignore[arg-type]


def one_step(kfac: KFACPreconditioner, case: Case, part: slice = slice(None)) -> None:
    kfac.model.zero_grad()
    logits = kfac.model(case.x[part])
    kfac.accumulate()
    case.loss(logits, case.y[part]).backward()
    kfac.step()


def factors_of(kfac: KFACPreconditioner) -> dict[tuple[str, str], Tensor]:
    layers = kfac.state_dict()["layers"]
    return {(name, side): layer["factors"][side] for name, layer in layers.items() for side in "AG"}


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
def test_trap_12_weights_count_factor_updates(name: str) -> None:
    """Three updates, four steps apart, weigh a third each; counted in steps the first would weigh 0.71."""
    case = cases(36)[name]
    parts = [slice(0, 12), slice(12, 24), slice(24, 36)]
    alone = []
    for part in parts:
        kfac = preconditioner(case)
        one_step(kfac, case, part)
        alone.append(factors_of(kfac))
    kfac = preconditioner(case, factor_every_n_steps=4)
    for step in range(9):
        one_step(kfac, case, parts[step // 4])
    for key, found in factors_of(kfac).items():
        wanted = sum(factors[key] for factors in alone) / 3
        assert torch.allclose(found, wanted, rtol=0, atol=1e-13 * float(wanted.abs().max())), key
        assert not torch.allclose(alone[0][key], alone[1][key], rtol=0, atol=1e-3 * float(wanted.abs().max()))


def test_trap_9_a_hundred_updates_on_constant_data_change_nothing() -> None:
    case = cases()["cnn"]
    kfac = preconditioner(case, factor_every_n_steps=1, inverse_every_n_steps=3, factor_decay=0.9)
    one_step(kfac, case)
    first = factors_of(kfac)
    held = {key: factor.clone() for key, factor in first.items()}
    for _ in range(120):
        one_step(kfac, case)
    assert kfac.metrics["factor_updates"] == 121
    for key, factor in factors_of(kfac).items():
        scale = float(held[key].abs().max())
        assert torch.allclose(factor, held[key], rtol=0, atol=1e-12 * scale), key
        assert torch.equal(factor, factor.mT), key
        assert torch.linalg.eigvalsh(factor).min() > -1e-12 * scale
        assert torch.equal(first[key], held[key])  # who holds an old factor keeps its value


def test_locations_are_averaged_with_the_factors() -> None:
    """Images of two sizes: the layer's T is the average of both, with the weights of the factors."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).double()
    kfac = KFACPreconditioner(model, likelihood="gaussian", factor_every_n_steps=1)
    for size, wanted in ((5, 9.0), (4, 6.5)):  # 3 x 3, then the mean of 9 and 4
        model.zero_grad()
        out = model(normal(4, 1, size, size))
        kfac.accumulate()
        out.square().sum().backward()
        kfac.step()
        assert kfac.state_dict()["layers"]["0"]["factors"]["locations"] == pytest.approx(wanted)
