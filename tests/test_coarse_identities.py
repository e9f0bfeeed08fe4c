"""What has to hold of every coarse space whatever its numbers are: identities, invariances, the Galerkin form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from kfac_dist import KFACPreconditioner
from kfac_dist.coarse import CoarseSpace, FineLevel, coarse_spaces, dense
from kfac_dist.config import CORRECTIONS
from kfac_dist.inverse import EigenPreconditioner
from tests.helpers.cases import cases
from tests.helpers.coarse_runs import Setup, lockstep, relative
from tests.helpers.dense_coarse import flat_gradient

SPACES: dict[str, tuple[str, int, str | None]] = {
    "nicolaides": ("nicolaides", 1, None),
    "spectral": ("spectral", 2, "largest"),
    "spectral-smallest": ("spectral", 2, "smallest"),
    "krylov-nicolaides": ("krylov", 2, "nicolaides"),
    "krylov-residual": ("krylov", 2, "residual"),
    "residual": ("residual", 1, None),
    "layer_step": ("layer_step", 1, None),
    "layer_step_momentum": ("layer_step_momentum", 1, None),
    "layer_step_residual": ("layer_step_residual", 1, None),
    "scalar": ("scalar", 1, None),
    "scalar_momentum": ("scalar_momentum", 1, None),
    "spectral_bands": ("spectral_bands", 3, None),
    "pcg": ("pcg", 3, None),
}
GALERKIN = [
    "layer_step",
    "layer_step_momentum",
    "layer_step_residual",
    "scalar",
    "scalar_momentum",
    "spectral_bands",
    "pcg",
]
Vectors = Mapping[str, Sequence[Tensor]]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, type[CoarseSpace]], None]:
    """Register a coarse space for one test."""
    return lambda name, space: monkeypatch.setitem(coarse_spaces._entries, name, space)


def setup_of(key: str, **changes: object) -> Setup:
    space, k, variant = SPACES[key]
    return Setup(space=space, k=k, variant=variant, **changes)


def run(setup: Setup, name: str = "mlp-categorical", steps: int = 3, lr: float = 0.2) -> list[Tensor]:
    """``param.grad`` after every step on fresh batches."""
    whole = cases(12 * steps)[name]
    model = whole.model()
    kfac = setup.preconditioner(whole, model)
    result = []
    for step in range(steps):
        ids = torch.arange(12 * step, 12 * step + 12)
        model.zero_grad()
        logits = model(whole.x[ids])
        kfac.accumulate(sample_ids=ids)
        whole.loss(logits, whole.y[ids]).backward()
        kfac.step(lr=lr)
        result.append(flat_gradient(model))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        assert kfac.metrics["coarse/failures"] == 0
    kfac.close()
    return result


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) <= tolerance


@pytest.mark.parametrize("key", SPACES)
@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
def test_residual_and_decrease_over_several_steps(name: str, key: str) -> None:
    """R_0 (grad - F_l zeta_2) = 0, and the error falls by (R_0 r)^T E^-1 (R_0 r), also with curvature that is old."""
    for step in lockstep(setup_of(key), name, 4, lr=0.1):
        ref = step.reference
        assert relative(step.found, step.wanted) < 1e-8
        V = ref.V / ref.V.norm(dim=0).clamp_min(1e-300)
        assert torch.linalg.norm(V.T @ (ref.grad - ref.F_l @ step.found)) <= 1e-10 * torch.linalg.norm(ref.grad)
        decrease = float(ref.error(ref.zeta) - ref.error(step.found))
        assert decrease >= 0
        scale = float(ref.error(ref.zeta))  # what rounding is relative to
        assert step.kfac.metrics["coarse/decrease"] == pytest.approx(decrease, rel=1e-10, abs=1e-12 * scale)
        energy = float(ref.zeta @ ref.F_l @ ref.zeta)
        assert step.kfac.metrics["coarse/decrease_ratio"] == pytest.approx(decrease / energy, rel=1e-9, abs=1e-10)
        assert step.kfac.metrics["coarse/failures"] == 0


# A band may end inside an eigenspace, where its basis is anybody's choice: in "norms" one does.
DESCENTS = [(name, key) for name in ("mlp-gaussian", "shared", "norms", "slopes") for key in GALERKIN]
DESCENTS.remove(("norms", "spectral_bands"))


@pytest.mark.parametrize(("name", "key"), DESCENTS)
def test_galerkin_form_descends(name: str, key: str) -> None:
    """zeta_2 = V E^-1 V^T grad, and so <zeta_2, grad> = ||zeta_2||_F^2 > 0."""
    for step in lockstep(setup_of(key, options={"uncovered": "diagonal"}), name, 3, lr=0.1):
        ref = step.reference
        V = ref.V / ref.V.norm(dim=0).clamp_min(1e-300)
        form = V @ torch.linalg.pinv(V.T @ ref.F_l @ V, rtol=1e-13, hermitian=True) @ V.T @ ref.grad
        assert relative(step.found, form) < 1e-8
        slope = float(step.found @ ref.grad)
        assert slope > 0
        assert slope == pytest.approx(float(step.found @ ref.F_l @ step.found), rel=1e-8)


@pytest.mark.parametrize("factor", [1e3, 1e-3])
@pytest.mark.parametrize("key", GALERKIN)
def test_scale_of_the_one_level_direction_does_not_matter(
    key: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(setup_of(key))
    apply = EigenPreconditioner.apply
    monkeypatch.setattr(EigenPreconditioner, "apply", lambda self, *args: apply(self, *args) * factor)
    assert_same(run(setup_of(key)), wanted, 1e-9)


def mixed(base: type[CoarseSpace], change: Callable[[int], Tensor]) -> type[CoarseSpace]:
    """``base`` with the vectors of layer i multiplied by the matrix ``change(i)`` from the right."""

    class Mixed(base):  # type: ignore[misc,valid-type]
        def vectors(self, fine: FineLevel) -> Vectors:
            result = {}
            for i, (name, each) in enumerate(super().vectors(fine).items()):
                C = change(i)
                parts = torch.stack([dense(v) for v in each])
                result[name] = list(torch.einsum("j...,jk->k...", parts, C[: len(each), : len(each)]))
            return result

        def direction_coefficients(self, count: int) -> None:
            return None  # zeta is no longer one of the vectors

    return Mixed


def well_conditioned(i: int) -> Tensor:
    generator = torch.Generator().manual_seed(i)
    return torch.eye(3).double() + 0.3 * torch.randn(3, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("key", SPACES)
@pytest.mark.parametrize("change", ["other basis", "other lengths"])
def test_only_the_range_of_the_space_matters(key: str, change: str, register: Callable) -> None:
    """R_0 -> C R_0 changes nothing, so neither does the normalisation; nor the form, where zeta is in the space."""
    space, k, variant = SPACES[key]
    wanted = run(setup_of(key))
    scales = torch.tensor([1e-5, 1.0, 1e5]).double()
    make = well_conditioned if change == "other basis" else (lambda i: torch.diag(scales.roll(i)))
    if coarse_spaces[space].spans_network:  # one vector of the network: one matrix for all layers
        fixed = make(0)
        register("mixed", mixed(coarse_spaces[space], lambda i: fixed))
    else:
        register("mixed", mixed(coarse_spaces[space], make))
    assert_same(run(Setup(space="mixed", k=k, variant=variant)), wanted, 1e-8)


class Dependent(CoarseSpace):
    """Two independent vectors per layer, and what depends on them."""

    fixed_count = 5

    def vectors(self, fine: FineLevel) -> Vectors:
        result = {}
        for name, gradient in fine.gradients.items():
            v, w = fine.directions[name], gradient
            result[name] = [v, v.clone(), torch.zeros_like(v), w, 1e4 * v - 3.0 * w][: self.fixed_count]
        return result


class Independent(Dependent):
    fixed_count = 2

    def vectors(self, fine: FineLevel) -> Vectors:
        return {name: [fine.directions[name], gradient] for name, gradient in fine.gradients.items()}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_dependent_columns_drop_out(correction: str, register: Callable) -> None:
    register("dependent", Dependent)
    register("independent", Independent)
    found = run(Setup(space="dependent", correction=correction))
    assert_same(found, run(Setup(space="independent", correction=correction)), 1e-9)


class Nothing(CoarseSpace):
    fixed_count = 2

    def vectors(self, fine: FineLevel) -> Vectors:
        return {name: [torch.zeros_like(g), torch.zeros_like(g)] for name, g in fine.gradients.items()}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_zero_columns_equal_one_level(correction: str, register: Callable) -> None:
    register("nothing", Nothing)
    case = cases()["cnn"]
    directions = []
    for coarse in (Setup(space="nothing", correction=correction).coarse(), None):
        model = case.model()
        kfac = KFACPreconditioner(model, likelihood=case.likelihood, damping_method="eigen", coarse=coarse)
        logits = model(case.x)
        kfac.accumulate()
        case.loss(logits, case.y).backward()
        kfac.step()
        directions.append(flat_gradient(model))
        kfac.close()
    assert torch.equal(*directions)
