"""Factors and blocks against an independent implementation: curvlinops (Dangel et al.), in float64.

Its losses are sums over samples, its squared error lacks the 1/2, and its "type-2" Fisher is the exact expectation.
It backpropagates a column of the root for all locations of an output at once, whose gradients "reduce" would add up
though they are independent; so "reduce" is compared on outputs without locations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from tests.helpers.cases import Sequences, mlp
from tests.helpers.coarse_runs import relative
from tests.helpers.dense import theta, treated

BATCH = 6
REQUIREMENTS = Path(__file__).parents[1] / "requirements-oracle.txt"
CURE = "run: python -m pip install --no-deps -r requirements-oracle.txt"
LOSSES = {
    "categorical": (nn.CrossEntropyLoss, 1.0),
    "bernoulli": (nn.BCEWithLogitsLoss, 1.0),
    "gaussian": (nn.MSELoss, 2.0),
}
"""Likelihood -> the loss of the other implementation, and its Hessian over ours."""


@cache
def curvlinops() -> ModuleType:
    try:
        import curvlinops as module  # noqa: PLC0415 - a missing one fails the tests, not their collection
    except ImportError as error:
        pytest.fail(f"the second implementation is missing ({error}); {CURE}")
    return module


def test_what_is_installed_is_what_is_pinned() -> None:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    for name, version in (line.split("==") for line in lines):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        assert found == version, f"{name} is {found}, pinned is {version}; {CURE}"


class Averaged(nn.Module):
    """Sequences (B, S, d) through two layers, their average through a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, (3, 1), padding="same", bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, padding=(2, 1), dilation=(1, 2)),
        nn.Flatten(),
        nn.Linear(2 * 6 * 3, 3),
    )


@dataclass(frozen=True)
class Example:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: tuple[int, ...] = ()
    """Locations of the output."""


EXAMPLES = {
    "linear": Example(mlp, (5,)),
    "sequences": Example(Sequences, (4, 6), (6,)),
    "averaged sequences": Example(Averaged, (5, 4)),
    "convolutions": Example(convolutions, (2, 6, 6)),
}
CASES = [
    ("linear", "expand", "categorical"),
    ("linear", "expand", "gaussian"),
    ("linear", "reduce", "bernoulli"),
    ("sequences", "expand", "categorical"),
    ("averaged sequences", "expand", "bernoulli"),
    ("averaged sequences", "reduce", "categorical"),
    ("averaged sequences", "reduce", "gaussian"),
    ("convolutions", "expand", "categorical"),
    ("convolutions", "expand", "gaussian"),
    ("convolutions", "reduce", "categorical"),
    ("convolutions", "reduce", "bernoulli"),
]


def data(example: Example, likelihood: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, its input, and targets, of which the Fisher matrix must not depend."""
    torch.manual_seed(1)
    model = example.build().double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, *example.shape, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (BATCH, *example.target), generator=generator)
    return model, x, classes if likelihood == "categorical" else (classes[:, None] == torch.arange(3)).double()


@pytest.mark.parametrize(("name", "approximation", "likelihood"), CASES)
def test_factors_and_blocks_are_those_of_curvlinops(name: str, approximation: str, likelihood: str) -> None:
    model, x, y = data(EXAMPLES[name], likelihood)
    loss, ratio = LOSSES[likelihood]
    oracle = curvlinops().KFACLinearOperator(
        model,
        loss(reduction="sum"),
        list(model.parameters()),
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=approximation,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    vectors = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).double() for p in model.parameters()]
    products = dict(zip([n for n, _ in model.named_parameters()], oracle @ vectors, strict=True))
    given = dict(zip(products, vectors, strict=True))

    kfac = KFACPreconditioner(model, likelihood, fisher_samples="exact", kfac_approx=approximation)
    logits = model(x)
    kfac.accumulate()
    (loss(reduction="sum")(logits, y) / (ratio * BATCH)).backward()
    kfac.step()
    states = kfac.state_dict()["layers"]
    assert set(states) == set(oracle._input_covariances) == set(oracle._gradient_covariances)
    for layer, state in states.items():
        A, G, T = (state["factors"][key] for key in ("A", "G", "locations"))
        rows = BATCH * T  # their G is a sum over samples and locations
        assert relative(A[0], oracle._input_covariances[layer]) < 1e-10
        assert relative(rows * ratio * G[0], oracle._gradient_covariances[layer]) < 1e-10

        module = treated(model)[layer]
        v, wanted = (theta(module, each[f"{layer}.weight"], each.get(f"{layer}.bias")) for each in (given, products))
        block = T * torch.kron(G[0], A[0])
        assert relative(BATCH * ratio * block @ v.flatten(), wanted.flatten()) < 1e-10
        assert T == 1 or approximation == "expand"
