"""The spectra that are shown are those of the blocks that the gradients are divided by."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse_solver import CoarseSystem
from tests.helpers.cases import cases


def convolutions() -> nn.Module:
    maps = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Tanh()]
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(16, 3), nn.LayerNorm(3))


def trained(steps: int = 2, **options) -> KFACPreconditioner:
    case = cases()["cnn"]
    torch.manual_seed(1)
    model = convolutions().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kfac = KFACPreconditioner(model, case.likelihood, factor_every_n_steps=1, **options)
    for _ in range(steps):
        model.zero_grad()
        loss = case.loss(model(case.x), case.y)
        kfac.accumulate()
        loss.backward()
        kfac.step(lr=0.1)
    return kfac


def block_inverse(kfac: KFACPreconditioner, name: str, damping: float) -> Tensor:
    """The matrix that the layer's gradient is multiplied by, column by column."""
    (layer,) = (layer for layer in kfac.layers if layer.name == name)
    size = torch.Size(layer.shape).numel()
    preconditioner = kfac._one.states[name].preconditioner
    columns = [preconditioner.apply(e.view(layer.shape), damping).flatten() for e in torch.eye(size).double()]
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"damping_method": "factored"},
        {"damping_method": "eigen"},
        {"damping": lambda step: 0.05 / (1 + step)},
        {"factor_sides": "input"},
        {"damping_method": "eigen", "max_factor_dim": 4},
        {"damping_method": "factored", "max_factor_dim": 4},
        {"large_factors": "diagonal", "max_factor_dim": 4},
    ],
)
def test_the_damped_range_is_that_of_the_preconditioner(options):
    kfac = trained(**({"damping": 0.05, "inverse_every_n_steps": 1} | options))
    spectra = kfac.spectra()
    assert set(spectra) == {layer.name for layer in kfac.layers} >= {"0", "2", "5"}
    for name, spectrum in spectra.items():
        damping = kfac.metrics["damping"]
        assert spectrum.damping == damping
        inverse = torch.linalg.eigvalsh(block_inverse(kfac, name, damping))
        low, high = spectrum.damped_range()
        torch.testing.assert_close((1 / high, 1 / low), (float(inverse[0]), float(inverse[-1])), rtol=1e-8, atol=0)
        assert spectrum.condition == pytest.approx(float(inverse[-1] / inverse[0]), rel=1e-8)
        low, high = spectrum.range()
        assert 0 <= low <= high < spectrum.damped_range()[1]


def test_before_the_first_inversion_there_is_nothing_to_see():
    kfac = trained(steps=0)
    assert kfac.spectra() == {}
    assert kfac.coarse_system is None


def test_the_coarse_system_is_the_last_one_and_its_couplings_are_cosines():
    kfac = trained(coarse=CoarseConfig(space="layer_step", damping=0.1))
    system = kfac.coarse_system
    assert system.blocks == ("0", "2", "5", "6")
    assert (system.count, system.matrix.shape) == (1, (4, 4))
    couplings = system.couplings()
    torch.testing.assert_close(couplings.diagonal(), torch.ones(4).double())
    diagonal = system.matrix.diagonal().sqrt()
    torch.testing.assert_close(couplings, system.matrix / torch.outer(diagonal, diagonal))
    assert couplings.abs().max() <= 1 + 1e-12
    assert float(couplings[0, 1].abs()) > 1e-6
    kfac.load_state_dict(kfac.state_dict())
    assert kfac.coarse_system is None


def test_a_vector_of_the_network_is_one_block():
    system = trained(coarse=CoarseConfig(space="scalar_momentum", damping=0.1)).coarse_system
    assert (system.blocks, system.count) == (("network",), 2)


def test_dropped_vectors_couple_with_nothing():
    system = CoarseSystem(("a", "b"), 1, torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double())
    assert system.couplings().tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_ready_metrics_are_those_that_wait_for_nothing():
    kfac = trained(coarse=CoarseConfig(space="layer_step", damping=0.1))
    ready = kfac.metrics.ready()
    assert ready == {name: kfac.metrics[name] for name in ready}
    assert {"step", "damping", "coarse/decrease_ratio", "coarse/failures", "inverse_fallbacks"} <= set(ready)
    waiting = set(kfac.metrics) - set(ready)
    assert {"grad_norm", "direction_norm", "coarse/beta/0/0", "ms/factors"} <= waiting
    assert {f"ms/{phase}" for phase in kfac.metrics.timer.milliseconds()} <= waiting


@pytest.mark.parametrize("double_works", [True, False])
def test_eigenvalues_that_overflow_are_computed_in_float64(monkeypatch, double_works):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    kfac = KFACPreconditioner(model, "categorical", factor_every_n_steps=1, inverse_every_n_steps=1)
    logits = model(torch.randn(8, 4))
    kfac.accumulate()
    nn.functional.cross_entropy(logits, torch.zeros(8).long()).backward()
    kfac.step(lr=0.1)
    expected, real = kfac.spectra(), torch.linalg.eigvalsh

    def overflows(matrix: Tensor) -> Tensor:
        wrong = matrix.dtype == torch.float32 or not double_works
        return real(matrix) * (float("nan") if wrong else 1.0)

    monkeypatch.setattr(torch.linalg, "eigvalsh", overflows)
    found = kfac.spectra()
    assert set(found) == (set(expected) if double_works else set())
    for name, spectrum in found.items():
        torch.testing.assert_close(spectrum.A, expected[name].A, rtol=1e-5, atol=1e-7)
