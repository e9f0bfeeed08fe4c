"""Cadence, damping, number of samples and kinds of Fisher matrices of the coarse level."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from kfac_dist import CoarseConfig, KFACPreconditioner, basis
from kfac_dist.coarse import coarse_spaces
from kfac_dist.comm import make_communicator
from kfac_dist.restrict import orthonormal_coefficients
from kfac_dist.samples import Samples
from kfac_dist.two_level import TwoLevel
from tests.helpers.cases import cases
from tests.helpers.coarse_runs import Setup, lockstep, relative

ALL = cases()


def check(setup: Setup, name: str, steps: int = 4, lr: float = 0.1) -> list[dict[str, float]]:
    """A run against the dense one; returns the metrics by step."""
    metrics = []
    for step in lockstep(setup, name, steps, lr):
        assert relative(step.found, step.wanted) < 1e-8
        metrics.append(dict(step.kfac.metrics))
    return metrics


@pytest.mark.parametrize("space", ["layer_step", "scalar", "pcg", "nicolaides", "residual"])
def test_between_solves(space: str) -> None:
    """Spaces with zeta keep their coefficients, on the zeta of the day; the others make one-level steps."""
    setup = Setup(space=space, k=2 if space == "pcg" else 1, every=3, factor_every=2)
    corrected = [m["corrected"] for m in check(setup, "mlp-categorical", steps=7)]
    wanted = [1.0] * 7 if space in ("layer_step", "scalar", "pcg") else [1.0, 0, 0, 1, 0, 0, 1]
    assert corrected == wanted


def test_between_solves_nothing_is_made_orthonormal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept coefficients belong to the raw vectors: the step costs their prolongation and no more."""
    made: list[tuple[int, ...]] = []

    def spy(gram: torch.Tensor, eps: float) -> torch.Tensor:
        made.append(tuple(gram.shape))
        return orthonormal_coefficients(gram, eps)

    monkeypatch.setattr(basis, "orthonormal_coefficients", spy)
    check(Setup(space="layer_step", every=3, factor_every=2), "mlp-categorical", steps=7)
    assert made == [(3, 1, 1)] * 3  # at steps 0, 3 and 6


def test_spectral_vectors_are_those_of_the_current_factors() -> None:
    """Newer ones than the inverses are made of."""
    check(Setup(space="spectral", k=2, factor_every=1, inverse_every=3), "mlp-categorical", steps=5)


@pytest.mark.parametrize(
    ("lam_c", "wanted"),
    [(None, [0.03] * 4), (0.7, [0.7] * 4), (lambda step: 1.0 / (step + 1), [1.0, 1 / 2, 1 / 3, 1 / 4])],
)
@pytest.mark.parametrize("space", ["nicolaides", "layer_step_momentum", "layer_step_residual"])
def test_coarse_damping(space: str, lam_c: float | Callable[[int], float] | None, wanted: list[float]) -> None:
    metrics = check(Setup(space=space, lam_c=lam_c), "mlp-gaussian")
    assert [m["coarse/damping"] for m in metrics] == wanted


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
@pytest.mark.parametrize("space", ["nicolaides", "layer_step", "residual", "spectral"])
def test_a_sub_batch_of_samples_is_used_everywhere(name: str, space: str) -> None:
    """E, w and F v see the same first 5 samples: the identities hold for their F."""
    for metrics in check(Setup(space=space, max_samples=5), name):
        assert metrics["coarse/samples"] == 5


def kept_samples(monkeypatch: pytest.MonkeyPatch) -> list[Samples]:
    """Every object that collects samples, as it is made."""
    made: list[Samples] = []
    init = Samples.__init__

    def spy(self: Samples, quota: int | None) -> None:
        init(self, quota)
        made.append(self)

    monkeypatch.setattr(Samples, "__init__", spy)
    return made


@pytest.mark.parametrize("fisher", ["categorical", "empirical"])
def test_max_samples_bounds_what_is_held(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all micro-batches; with copies of the kept rows only, not views that hold the whole batch."""
    made = kept_samples(monkeypatch)
    case = ALL["cnn"]
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood=fisher, coarse=CoarseConfig(max_samples=7))
    for part in torch.arange(12).split(4):
        logits = model(case.x[part])
        kfac.accumulate(loss_divisor=3)
        (case.loss(logits, case.y[part]) / 3).backward()
    kfac.step()
    assert kfac.metrics["coarse/samples"] == 7
    samples = made[0]
    assert [batch.size for batch in samples.batches] == [4, 3]
    per_sample = sum(x.numel() for x in case.x[:1]) + 4 * 9 + 4 * 9 + 2 * 16  # inputs
    per_sample += 4 * 9 + 4 * 9 + 2 * 16 + 3  # output gradients
    tensors = [t for batch in samples.batches for call in batch.calls for t in (call.x, *call.gradients)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) <= 8 * 7 * per_sample
    kfac.close()


def test_old_samples_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a curvature step nothing holds those of the step before, the momentum's rows included."""
    made = kept_samples(monkeypatch)
    for number, _ in enumerate(lockstep(Setup(space="layer_step_momentum", factor_every=2), "mlp-categorical", 5)):
        references = [weakref.ref(samples) for samples in made]
        made.clear()
        if number == 0:
            first = references[0]
        assert first() is not None if number < 2 else first() is None
        del references


@pytest.mark.parametrize(
    ("space", "k", "layers", "wanted"),
    [
        ("layer_step", 1, 3, 64),
        ("pcg", 8, 20, 640),
        ("pcg", 2, 3, 256),
        ("layer_step_residual", 1, 3, 256),
        ("layer_step_momentum", 1, 50, 400),
        ("scalar", 1, 99, 64),
    ],
)
def test_auto_is_the_larger_of_what_a_space_needs_and_4_m(space: str, k: int, layers: int, wanted: int) -> None:
    config = CoarseConfig(space=space, vectors_per_layer=k)
    assert TwoLevel(config, coarse_spaces[config.space](config), make_communicator("single")).quota(layers) == wanted


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("name", ["mlp-categorical", "mlp-bernoulli", "cnn"])
def test_several_draws_per_sample(name: str, draws: int | str) -> None:
    for space in ("layer_step_momentum", "residual"):
        check(Setup(space=space, draws=draws, max_samples=9), name, steps=3)


@pytest.mark.parametrize("name", ["mlp-gaussian", "cnn", "convolutions", "shared", "sequences"])
def test_empirical_fisher(name: str) -> None:
    for space in ("layer_step_momentum", "nicolaides"):
        check(Setup(space=space, fisher="empirical"), name, steps=3)


def test_input_side_factors() -> None:
    """M is another one, F stays the true one."""
    for space in ("layer_step", "layer_step_momentum", "residual", "nicolaides"):
        for step in lockstep(Setup(space=space, sides="input"), "cnn", 3, lr=0.1):
            assert relative(step.found, step.wanted) < 1e-8
            assert step.kfac.metrics["coarse/failures"] == 0
