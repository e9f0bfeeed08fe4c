"""Random small nets: the error-minimising correction never makes the error in the F_l-norm larger."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from tests.helpers.cases import Case
from tests.helpers.dense_coarse import FIRST_ID, SEED, Dense, flat_gradient

BATCH = 8
EXACT = [name for name in coarse_spaces if name != "tselepidis"]  # its operator is an approximation


@st.composite
def nets(draw: st.DrawFn) -> Case:
    """An MLP, or convolutions with a linear head; any widths, biases, groups, strides and activations."""
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.SiLU]))
    likelihood = draw(st.sampled_from(["categorical", "bernoulli", "gaussian"]))
    outputs, seed = draw(st.integers(2, 4)), draw(st.integers(0, 10**6))
    biases = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        specs = list(zip(widths, [*widths[1:], outputs], biases, strict=False))
        shape: tuple[int, ...] = (BATCH, widths[0])

        def build() -> nn.Module:
            modules = [m for i, o, bias in specs for m in (nn.Linear(i, o, bias=bias), activation())]
            return nn.Sequential(*modules[:-1])
    else:
        groups = draw(st.sampled_from([1, 2, 4]))
        stride, padding = draw(st.sampled_from([(1, "same"), (1, 0), (2, 1)]))
        mode = draw(st.sampled_from(["zeros", "circular", "reflect"]))
        shape = (BATCH, 2, 5, 5)

        def build() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(2, 4, 3, stride=stride, padding=padding, padding_mode=mode, bias=biases[0]),
                activation(),
                nn.Conv2d(4, 4, 2, groups=groups, bias=biases[1]),
                activation(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(16, outputs, bias=biases[2]),
            )

    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCH, outputs, generator=generator, dtype=torch.float64)
    targets = {"categorical": y.argmax(1), "bernoulli": (y > 0).double(), "gaussian": y}[likelihood]
    return Case(build, x, targets, likelihood)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=nets(),
    space=st.sampled_from(EXACT),
    k=st.integers(1, 4),
    variant=st.booleans(),
    lam=st.floats(-4, 0.5),
    lam_c=st.floats(-4, 0.5),
    method=st.sampled_from(["eigen", "factored"]),
    empirical=st.booleans(),
)
def test_the_error_never_grows(
    case: Case, space: str, k: int, variant: bool, lam: float, lam_c: float, method: str, empirical: bool
) -> None:
    """||zeta_2 - zeta*|| <= ||zeta - zeta*||, by exactly the decrease that is reported."""
    kind = coarse_spaces[space]
    coarse = CoarseConfig(
        space=space,
        vectors_per_layer=k if kind.variable_count else 1,
        variant=kind.variants[variant] if kind.variants else None,
        damping=10**lam_c,
        max_samples=None,
    )
    likelihood = "empirical" if empirical else case.likelihood
    directions = []
    for level in (None, coarse):
        model = case.model()
        kfac = KFACPreconditioner(
            model, likelihood=likelihood, damping=10**lam, damping_method=method, coarse=level, seed=SEED
        )
        logits = model(case.x)
        kfac.accumulate(sample_ids=torch.arange(FIRST_ID, FIRST_ID + BATCH))
        case.loss(logits, case.y).backward()
        kfac.step()
        directions.append(flat_gradient(model))
        kfac.close()
    dense = Dense(case, case.model(), 10**lam, 10**lam_c, "empirical" if empirical else "true", 1)
    before, after = (float(dense.error(d)) for d in directions)
    event(f"decrease of more than a tenth: {after < 0.9 * before}")
    assert kfac.metrics["coarse/failures"] == 0
    rounding = 1e-13 * float(dense.error(torch.zeros_like(directions[0])))  # where zeta is zeta* already
    assert after <= before + rounding
    # Powers of M^-1 F may be parallel but for an angle a > 1e-7: a Gram matrix knows their remainder to eps / a^2.
    tolerance = 1e-4 if space in ("krylov", "pcg", "layer_step_residual") else 1e-10
    assert abs(before - after - kfac.metrics["coarse/decrease"]) <= tolerance * before + rounding
    energy = float(directions[0] @ dense.F_l @ directions[0])
    assert abs(kfac.metrics["coarse/decrease_ratio"] * energy - (before - after)) <= tolerance * before + 1e-12 * energy
    if space in ("nicolaides", "layer_step", "scalar"):  # bases that do not ask how M^-1 is damped
        ones, zeta = torch.ones_like(directions[0]), directions[0]
        V = zeta[:, None] if space == "scalar" else dense.per_layer(ones if space == "nicolaides" else zeta)
        residual = V.T @ (dense.grad - dense.F_l @ directions[1])
        assert residual.norm() <= 1e-9 * V.norm() * dense.grad.norm()
