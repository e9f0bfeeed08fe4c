"""Layers of which a part is trained, computed from something else, or beside something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from kfac_dist import KFACPreconditioner, parameter_groups

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(1))


class Adapted(nn.Module):
    """A frozen Linear with a low-rank correction, of two Linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class RawAdapted(nn.Module):
    """The same with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def silent(build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have the new form
        return build(nn.Linear(4, 4))


def frozen(*names: str) -> nn.Module:
    module = nn.Linear(4, 4)
    for name in names:
        getattr(module, name).requires_grad_(False)
    return module


COMPUTED = "its weight is computed from other parameters (a parametrization)"
LIST = f"0 computes with it: {COMPUTED}"
# First module of a net -> covered layers in it, and reasons.
BUILDS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, str]]] = {
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        [],
        {"0": COMPUTED, "0.parametrizations.weight": LIST},
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        [],
        {"0": COMPUTED, "0.parametrizations.weight": LIST},
    ),
    "old weight norm": (lambda: silent(weight_norm), [], {"0": COMPUTED}),
    "old spectral norm": (lambda: silent(spectral_norm), [], {"0": COMPUTED}),
    "frozen weight": (lambda: frozen("weight"), ["0"], {}),
    "frozen bias": (lambda: frozen("bias"), ["0"], {}),
    "adapter of modules": (Adapted, ["0.down", "0.up"], {}),
    "adapter of parameters": (
        RawAdapted,
        [],
        {"0": "only its own down, up: no layer type is registered for RawAdapted"},
    ),
}


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("name", BUILDS)
def test_what_is_covered_is_preconditioned_and_the_rest_is_plain(name: str, likelihood: str) -> None:
    build, covered, reasons = BUILDS[name]
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.Tanh(), nn.Linear(4, 3)).double().train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kfac = KFACPreconditioner(model, likelihood=likelihood, damping=0.03)
    assert [layer.name for layer in kfac.layers] == [*covered, "2"]
    said = "; ".join(f"{module} ({reason})" for module, reason in reasons.items())
    wanted = [f"these modules keep their plain gradient: {said}"] if said else []
    assert [str(w.message) for w in caught] == wanted
    logits = model(X)
    kfac.accumulate()
    F.cross_entropy(logits, Y).backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    kfac.step()
    mine = {id(p) for layer in kfac.layers for p in layer.parameters}
    for key, p in model.named_parameters():
        assert (p.grad is None) == (not p.requires_grad), key
        if p.requires_grad:
            assert torch.equal(p.grad, plain[key]) == (id(p) not in mine), key
    groups = parameter_groups(model, lr=1.0, uncovered_lr=0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in groups[0]["params"]} == mine


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_the_trained_part_alone_has_the_direction_of_its_own_factors(part: str) -> None:
    """Without the bias A lacks its last column; the bias alone has A = 1."""
    torch.manual_seed(0)
    model = nn.Sequential(frozen("bias" if part == "weight" else "weight"), nn.Tanh(), nn.Linear(4, 3)).double()
    kfac = KFACPreconditioner(
        model, likelihood="categorical", fisher_samples="exact", damping=0.03, damping_method="eigen"
    )
    outputs: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda m, args, out: outputs.append(out))
    logits = model(X)
    handle.remove()
    G = torch.zeros(4, 4, dtype=torch.float64)
    p = logits.softmax(1).detach()
    for c in range(3):
        cotangent = (p - F.one_hot(torch.tensor(c), 3)) * p[:, c : c + 1].sqrt()
        (g,) = torch.autograd.grad(logits, outputs, cotangent, retain_graph=True)
        G += g.mT @ g / 12
    A = X.mT @ X / 12 if part == "weight" else torch.ones(1, 1, dtype=torch.float64)
    kfac.accumulate()
    F.cross_entropy(logits, Y).backward()
    parameter = getattr(model[0], part)
    gradient = parameter.grad.clone()
    kfac.step()
    block = torch.kron(G, A)
    wanted = torch.linalg.solve(block + 0.03 * torch.eye(len(block)).double(), gradient.flatten())
    assert torch.allclose(parameter.grad.flatten(), wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
