"""Every coarse space and every correction against dense float64 matrices."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from kfac_dist.config import CORRECTIONS
from tests.helpers.cases import Case, cases
from tests.helpers.conformance import agree
from tests.helpers.dense_coarse import FIRST_ID, SEED, Dense, flat_gradient

ALL = cases()
LAM, LAM_C = 0.03, 0.05
SPACES = {name: (name, 1, None) for name in coarse_spaces if not coarse_spaces[name].variable_count} | {
    "krylov-nicolaides": ("krylov", 2, "nicolaides"),
    "krylov-residual": ("krylov", 2, "residual"),
    "spectral-largest": ("spectral", 3, "largest"),
    "spectral-smallest": ("spectral", 2, "smallest"),
    "spectral_bands": ("spectral_bands", 3, None),
    "pcg": ("pcg", 3, None),
}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))


def one_step(case: Case, model: torch.nn.Module, kfac: KFACPreconditioner) -> torch.Tensor:
    model.zero_grad()
    logits = model(case.x)
    kfac.accumulate(sample_ids=torch.arange(FIRST_ID, FIRST_ID + len(case.x)))
    case.loss(logits, case.y).backward()
    kfac.step()
    return flat_gradient(model)


def make(case: Case, coarse: CoarseConfig, **options: object) -> tuple[torch.nn.Module, KFACPreconditioner]:
    model = case.model()
    settings = {"likelihood": case.likelihood, "damping": LAM, "damping_method": "eigen", "seed": SEED} | options
    return model, KFACPreconditioner(model, coarse=coarse, **settings)


# The dense operator of "tselepidis" is written for layers with one location.
NAMES = ["mlp-categorical", "cnn", "shared", "tokens", "tied"]
PAIRS = [(name, space) for name in NAMES for space in SPACES if space != "tselepidis" or name == "mlp-categorical"]
PAIRS += [(name, space) for name in ("attention", "recurrent") for space in ("layer_step", "nicolaides")]


@lru_cache
def dense_matrices(name: str) -> Dense:
    return Dense(ALL[name], ALL[name].model(), LAM, LAM_C, "true", 1)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_direction_is_the_dense_one(name: str, space: str, correction: str) -> None:
    case = ALL[name]
    kind, k, variant = SPACES[space]
    config = CoarseConfig(
        space=kind, vectors_per_layer=k, variant=variant, correction=correction, damping=LAM_C, max_samples=None
    )
    model, kfac = make(case, config)
    dense = dense_matrices(name)
    V = dense.basis(kind, k, variant)
    E = None
    if space == "tselepidis":
        V = V / V.norm(dim=0)
        scale = torch.tensor([dense.shapes[n].numel() for n in dense.names]).double().rsqrt()
        E = dense.cross_covariance_operator() * scale[:, None] * scale + LAM_C * torch.eye(len(scale)).double()
    found, wanted = one_step(case, model, kfac), dense.corrected(V, correction, E)
    size = wanted.abs().max()
    agree(f"net: {name}", "two levels", found / size, wanted / size, 1e-8)
    assert relative(found, wanted) < 1e-8
    assert kfac.metrics["coarse/failures"] == 0
    if correction == "error_minimizing" and space != "tselepidis":
        r = dense.grad - dense.F_l @ found
        assert torch.linalg.norm(V.T @ r) <= 1e-10 * torch.linalg.norm(V.T @ dense.grad) + 1e-12
        decrease = dense.error(dense.zeta) - dense.error(found)
        assert float(decrease) == pytest.approx(kfac.metrics["coarse/decrease"], rel=1e-10, abs=1e-12)
        energy = float(dense.zeta @ dense.F_l @ dense.zeta)
        assert kfac.metrics["coarse/decrease_ratio"] == pytest.approx(float(decrease) / energy, rel=1e-8, abs=1e-12)
