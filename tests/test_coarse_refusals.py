"""What the coarse level does not do, it says: with the value, the bound and the cure."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from tests.helpers.cases import cases, mlp

ALL = cases()
VARIABLE = [name for name in coarse_spaces if coarse_spaces[name].variable_count]
FIXED = [name for name in coarse_spaces if not coarse_spaces[name].variable_count]


def build(coarse: str | CoarseConfig, **options: Any) -> KFACPreconditioner:
    return KFACPreconditioner(mlp().double(), likelihood="categorical", coarse=coarse, **options)


def test_the_spaces_of_the_contract_are_there() -> None:
    assert set(VARIABLE) == {"spectral", "krylov", "spectral_bands", "pcg"}
    baselines = {"scalar", "scalar_momentum"}
    assert {"nicolaides", "residual", "tselepidis", "layer_step", "layer_step_momentum"} | baselines < set(FIXED)


@pytest.mark.parametrize("space", FIXED)
def test_a_fixed_number_of_vectors(space: str) -> None:
    build(CoarseConfig(space=space, vectors_per_layer=1)).close()
    with pytest.raises(ValueError, match=rf"'{space}'.*fixed number.*vectors_per_layer=2.*leave it at 1"):
        build(CoarseConfig(space=space, vectors_per_layer=2))


@pytest.mark.parametrize("space", VARIABLE)
def test_variants(space: str) -> None:
    for variant in coarse_spaces[space].variants:
        build(CoarseConfig(space=space, variant=variant)).close()
    with pytest.raises(ValueError, match=rf"'{space}' has no variant 'middle'; offered: "):
        build(CoarseConfig(space=space, variant="middle"))


def test_an_unknown_space_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown coarse space 'nicolas'; known: .*nicolaides.*spectral_bands"):
        build("nicolas")


@pytest.mark.parametrize("space", ["spectral", "spectral_bands"])
def test_spectral_spaces_need_both_factors(space: str) -> None:
    with pytest.raises(ValueError, match=rf"'{space}'.*both factors.*factor_sides='both' or another space"):
        build(space, factor_sides="input")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("space", None, "must be a name"),
        ("vectors_per_layer", 0, "at least 1"),
        ("vectors_per_layer", 1.5, "integer"),
        ("correction", "best", "choose one of 'error_minimizing', 'additive', 'deflated', 'balanced'"),
        ("every_n_steps", 0, "at least 1"),
        ("max_samples", 0, "at least 1"),
        ("max_samples", "all", "integer"),
        ("damping", 0.0, "above 0"),
        ("damping", float("nan"), "finite"),
        ("damping", "adaptiv", "'adaptive'"),
        ("initial_damping", -1.0, "above 0"),
    ],
)
def test_values_out_of_bounds(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        CoarseConfig(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_a_schedule_out_of_bounds_is_named_with_its_step() -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood="categorical", coarse=CoarseConfig(damping=lambda step: -1.0))
    logits = model(case.x)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    with pytest.raises(ValueError, match=r"coarse damping\(0\)=-1.0 must be a finite number above 0"):
        kfac.step()


def test_only_tselepidis_is_additive_by_default() -> None:
    assert {name: CoarseConfig(space=name).correction for name in coarse_spaces} == {
        name: "additive" if name == "tselepidis" else "error_minimizing" for name in coarse_spaces
    }


class TimeFirst(nn.Module):
    """Time lies first, and the batch neither first nor second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, 4)
        return self.head(torch.tanh(self.inner(x.transpose(0, 1)[:, None])).mean((0, 1)))


class Rolled(TimeFirst):
    """Time and samples in one dimension, samples outermost: they can be told apart."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.flatten(0, 1))).view(len(x), -1, 5).mean(1))


def first_step(model: nn.Module, likelihood: str, **options: Any) -> KFACPreconditioner:
    torch.manual_seed(0)
    kfac = KFACPreconditioner(model, likelihood=likelihood, **options)
    logits = model(torch.randn(12, 7, 4))
    kfac.accumulate()
    nn.functional.cross_entropy(logits, torch.arange(12) % 3).backward()
    kfac.step()
    return kfac


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_samples_must_be_outermost(likelihood: str) -> None:
    with pytest.raises(
        ValueError, match=r"'inner' has an input or output of shape \(7, 1, 12, 4\) for 12 samples.*batch first"
    ):
        first_step(TimeFirst(), likelihood, coarse="layer_step")
    first_step(TimeFirst(), likelihood).close()  # one level does not ask
    first_step(TimeFirst(), likelihood, coarse="layer_step", skip_layers="inner").close()
    kfac = first_step(Rolled(), likelihood, coarse="layer_step")
    assert kfac.metrics["coarse/failures"] == 0
    kfac.close()


def test_nothing_else_warns() -> None:
    """A fitting set-up is silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for space in coarse_spaces:
            first_step(Rolled(), "categorical", coarse=CoarseConfig(space=space)).close()


@pytest.mark.parametrize("coarse", [{"space": "layer_step"}, 1, True])
def test_the_core_takes_no_other_kind_of_value(coarse: Any) -> None:
    with pytest.raises(ValueError, match=r"coarse=.* must be None, the name of a coarse space or CoarseConfig\(space"):
        build(coarse)
