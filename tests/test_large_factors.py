"""Factors above ``max_factor_dim``: blocks or a diagonal, through the whole preconditioner, against dense matrices."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from tests.helpers.cases import Case, cases
from tests.helpers.dense import cotangents, gradient_matrix, kfac_direction, kronecker_factors, treated
from tests.helpers.dense_coarse import FIRST_ID, SEED, Dense, flat_gradient

LIMIT, LAM, LAM_C = 4, 0.03, 0.05


def convolutions() -> nn.Module:
    """No two pixels are copies of one another: equal blocks would have equal eigenvalues, and any eigenvectors."""
    maps = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Tanh()]
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(16, 3))


CASES = {name: cases()[name] for name in ("mlp-categorical", "tied")}
CASES["cnn"] = replace(cases()["cnn"], build=convolutions)
# Layer -> what is said of it. Orders up to 4 stay dense; 19 columns in blocks of at most 4: 5 blocks, the last of 3.
SAID = {
    (
        "mlp-categorical",
        "blocks",
    ): "0 (A of order 6 becomes 2 diagonal blocks, G of order 6 becomes 2 diagonal blocks); "
    "2 (A of order 6 becomes 2 diagonal blocks); 4 (A of order 5 becomes 2 diagonal blocks)",
    ("mlp-categorical", "diagonal"): "0 (A of order 6 becomes diagonal, G of order 6 becomes diagonal); "
    "2 (A of order 6 becomes diagonal); 4 (A of order 5 becomes diagonal)",
    ("cnn", "blocks"): "0 (A of order 19 becomes 5 diagonal blocks); 2 (A of order 9 becomes 3 diagonal blocks); "
    "5 (A of order 17 becomes 5 diagonal blocks)",
    ("tied", "blocks"): "inner (A of order 5 becomes 2 diagonal blocks); head (A of order 5 becomes 2 diagonal blocks)",
}


def cut(factor: Tensor, form: str) -> Tensor:
    """The factor (groups, d, d) with zeros outside its blocks."""
    d = factor.shape[-1]
    if d <= LIMIT:
        return factor
    size = 1 if form == "diagonal" else math.ceil(d / math.ceil(d / LIMIT))
    block = torch.arange(d) // size
    return factor * (block[:, None] == block[None, :])


def make(case: Case, form: str, **options: Any) -> KFACPreconditioner:
    settings = {"likelihood": case.likelihood, "damping": LAM, "seed": SEED, "damping_method": "eigen"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KFACPreconditioner(case.model(), max_factor_dim=LIMIT, large_factors=form, **settings)  # type: ignore[arg-type]


def step(kfac: KFACPreconditioner, case: Case) -> Tensor:
    kfac.model.zero_grad()
    logits = kfac.model(case.x)
    kfac.accumulate(sample_ids=torch.arange(FIRST_ID, FIRST_ID + len(case.x)))
    case.loss(logits, case.y).backward()
    kfac.step()
    return flat_gradient(kfac.model)


@pytest.mark.parametrize("method", ["factored", "eigen"])
@pytest.mark.parametrize("form", ["blocks", "diagonal"])
@pytest.mark.parametrize("name", CASES)
def test_directions_are_those_of_dense_factors_with_the_same_zeros(name: str, form: str, method: str) -> None:
    case = CASES[name]
    kfac = make(case, form, damping_method=method)
    found = step(kfac, case)
    model = case.model()
    case.loss(model(case.x), case.y).backward()
    ids = torch.arange(FIRST_ID, FIRST_ID + len(case.x))
    factors = kronecker_factors(
        case, case.model(), case.x, lambda z: cotangents(case, z, case.y, "true", 1, SEED, 0, ids)
    )
    wanted = []
    for layer, module in treated(model).items():
        A, G, T = factors[layer]
        direction = kfac_direction(cut(A, form), cut(G, form), T, gradient_matrix(module), LAM, method)
        dense = kfac_direction(A, G, T, gradient_matrix(module), LAM, method)
        wanted.append(direction.flatten())
        assert torch.linalg.norm(direction - dense) > 1e-3 * torch.linalg.norm(dense)  # the zeros matter
    assert torch.linalg.norm(found - torch.cat(wanted)) <= 1e-10 * torch.linalg.norm(found)


@pytest.mark.parametrize(("name", "form"), SAID)
def test_one_warning_says_what_they_became(name: str, form: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        KFACPreconditioner(
            CASES[name].model(),
            "categorical",
            max_factor_dim=LIMIT,
            large_factors=form,  # type: ignore[arg-type]
        )
        KFACPreconditioner(CASES[name].model(), "categorical")  # nothing is above the default
    assert [str(w.message) for w in caught] == [f"factors larger than max_factor_dim: {SAID[name, form]}"]


@pytest.mark.parametrize("form", ["blocks", "diagonal"])
@pytest.mark.parametrize(
    ("space", "k", "variant"),
    [
        ("spectral", 3, "largest"),
        ("spectral", 2, "smallest"),
        ("spectral_bands", 3, None),
        ("krylov", 2, "residual"),
        ("layer_step_residual", 1, None),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_coarse_spaces_with_such_factors(name: str, space: str, k: int, variant: str | None, form: str) -> None:
    case = CASES[name]
    config = CoarseConfig(space=space, vectors_per_layer=k, variant=variant, damping=LAM_C, max_samples=None)
    kfac = make(case, form, coarse=config)
    found = step(kfac, case)
    assert kfac.metrics["coarse/failures"] == 0
    dense = Dense(case, case.model(), LAM, LAM_C, "true", 1)
    dense.factors = {layer: (cut(A, form), cut(G, form), T) for layer, (A, G, T) in dense.factors.items()}
    dense.zeta = dense.precondition(dense.grad)
    wanted = dense.corrected(dense.basis(space, k, variant), "error_minimizing")
    assert torch.linalg.norm(found - wanted) <= 1e-8 * torch.linalg.norm(wanted)


@pytest.mark.parametrize("form", ["blocks", "diagonal"])
@pytest.mark.parametrize("method", ["factored", "eigen"])
def test_saved_and_loaded_they_go_on_bit_by_bit(method: str, form: str) -> None:
    case = CASES["cnn"]
    kfac = make(case, form, damping_method=method)
    step(kfac, case)
    saved = kfac.state_dict()
    A = saved["layers"]["0"]["factors"]["A"]
    assert A.shape == ((5, 4, 4) if form == "blocks" else (19, 1, 1))
    other = make(case, form, damping_method=method)
    other.load_state_dict(saved)
    assert torch.equal(step(other, case), step(kfac, case))
    dense = KFACPreconditioner(case.model(), "categorical")
    with pytest.raises(ValueError, match=r"layer '0': factor A has shape .* in the checkpoint and \(1, 19, 19\)"):
        dense.load_state_dict(saved)
