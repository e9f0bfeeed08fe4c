"""Nets on which K-FAC is no approximation: its blocks are the diagonal blocks of the dense Fisher matrix.

In a deep linear net with a Gaussian likelihood the backpropagated derivatives do not depend on the input: activations
and derivatives are independent (Martens and Grosse 2015, section 3.1; Bernacchia et al. 2018), for any data.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from tests.helpers.dense import gradient_matrix, treated

LAM = 0.02


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 6), nn.Linear(6, 2))


def convolutions() -> nn.Module:
    """The kernels cover the whole image: one location per sample."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 2))


def one_nonlinear_layer() -> nn.Module:
    return nn.Linear(4, 3)


def factorial_design() -> Tensor:
    return torch.tensor(list(product((-1.0, 1.0), repeat=4)), dtype=torch.float64)


def images() -> Tensor:
    return torch.randn(9, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def random_inputs() -> Tensor:
    return torch.randn(11, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "factorial design": (linear_net, factorial_design),
    "random inputs": (linear_net, random_inputs),
    "convolutions": (convolutions, images),
}


def dense_blocks(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Layer -> per group, (1/B) sum_b sum_k u u^T with u the gradient of output k of sample b, row-major [W | b]."""
    modules = treated(model)
    blocks: dict[str, list[Tensor]] = {}
    for sample in x:
        outputs = model(sample[None])[0]
        for k in range(len(outputs)):
            model.zero_grad()
            outputs[k].backward(retain_graph=True)
            for name, module in modules.items():
                for group, matrix in enumerate(gradient_matrix(module)):
                    u = matrix.flatten()
                    found = blocks.setdefault(
                        name, [torch.zeros(len(u), len(u), dtype=u.dtype) for _ in range(_groups(module))]
                    )
                    found[group] += torch.outer(u, u) / len(x)
    model.zero_grad()
    return blocks


def _groups(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


@pytest.mark.parametrize("name", NETS)
def test_blocks_are_those_of_the_dense_fisher(name: str) -> None:
    build, inputs = NETS[name]
    torch.manual_seed(4)
    model, x = build().double(), inputs()
    blocks = dense_blocks(model, x)
    kfac = KFACPreconditioner(
        model,
        likelihood="gaussian",
        fisher_samples="exact",
        damping=LAM,
        damping_method="eigen",
        distribution="mem_opt",
    )
    y = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    outputs = model(x)
    kfac.accumulate()
    (0.5 * (outputs - y).square().sum() / len(x)).backward()
    gradients = {layer: gradient_matrix(module).clone() for layer, module in treated(model).items()}
    kfac.step()
    assert len(blocks) == len(kfac.layers)
    for layer, state in kfac.state_dict()["layers"].items():
        factors = state["factors"]
        assert factors["locations"] == 1.0
        for group, block in enumerate(blocks[layer]):
            found = torch.kron(factors["G"][group], factors["A"][group])
            assert torch.allclose(found, block, rtol=0, atol=1e-12 * float(block.abs().max())), (layer, group)
            assert block.abs().max() > 0
            damped = block + LAM * torch.eye(len(block), dtype=block.dtype)
            wanted = torch.linalg.solve(damped, gradients[layer][group].flatten())
            direction = gradient_matrix(treated(model)[layer])[group].flatten()
            assert torch.allclose(direction, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def test_the_last_layer_of_a_classifier_is_exact_where_the_probabilities_are_constant() -> None:
    """With equal logits everywhere the categorical derivatives do not depend on the input either."""
    x = factorial_design()
    model = one_nonlinear_layer().double()
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.3, -0.2, 0.5]))
    kfac = KFACPreconditioner(model, likelihood="categorical", fisher_samples="exact")
    logits = model(x)
    kfac.accumulate()
    nn.functional.cross_entropy(logits, torch.zeros(16, dtype=torch.long)).backward()
    kfac.step()
    p = logits[0].softmax(0).detach()
    a = torch.cat([x, torch.ones(16, 1, dtype=x.dtype)], 1)
    block = torch.zeros(15, 15, dtype=x.dtype)
    for row in a:
        for target in range(3):
            u = torch.outer(p - torch.eye(3, dtype=x.dtype)[target], row).flatten()
            block += p[target] * torch.outer(u, u) / 16
    (state,) = kfac.state_dict()["layers"].values()
    assert torch.allclose(torch.kron(state["factors"]["G"][0], state["factors"]["A"][0]), block, rtol=0, atol=1e-13)
