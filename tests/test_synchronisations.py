"""How often a step waits for the device does not depend on the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist import CoarseConfig, KFACPreconditioner

WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@contextmanager
def counted() -> Iterator[list[str]]:
    """Every call by which Python asks for the value of a tensor."""
    seen: list[str] = []

    def waiting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(self: torch.Tensor, *args: Any) -> Any:
            seen.append(name)
            return function(self, *args)

        return wait

    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, waiting(name, getattr(torch.Tensor, name)))
        yield seen


def waits(depth: int, likelihood: str, coarse: CoarseConfig | None) -> list[int]:
    """How much every step asks for: the first one inverts, the third one updates factors, the others do neither."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    kfac = KFACPreconditioner(
        model, likelihood, kl_clip=1e-3, factor_every_n_steps=2, inverse_every_n_steps=100, coarse=coarse
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        with counted() as seen:
            kfac.accumulate()
            loss.backward()
            kfac.step(lr=optimizer)
        optimizer.step()
        counts.append(len(seen))
    return counts


@pytest.mark.parametrize("coarse", [None, CoarseConfig(space="layer_step", damping=0.1)])
@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_they_do_not_grow_with_the_layers(likelihood: str, coarse: CoarseConfig | None) -> None:
    shallow, deep = waits(2, likelihood, coarse), waits(12, likelihood, coarse)
    assert deep[1:] == shallow[1:]  # an inversion looks at the outcome of every factorisation
    if coarse is None:
        assert deep[1] == deep[3] == 0
        assert 0 < deep[2] < 10
