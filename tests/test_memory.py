"""What a preconditioner holds between steps, counted and as the formula of docs/guarantees.md."""

from __future__ import annotations

import itertools
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner

SIZES = (40, 30, 24)
ORDERS = [side for a, g in itertools.pairwise(SIZES) for side in (a + 1, g)]
TRIANGLES = sum(d * (d + 1) // 2 for d in ORDERS)
SQUARES = sum(d * d for d in ORDERS)


def held(root: object) -> int:
    """Bytes of all tensor storages that can be reached from ``root``, without those of modules."""
    storages: dict[int, int] = {}
    seen, stack = set[int](), [root]
    while stack:
        it = stack.pop()
        if id(it) in seen or isinstance(it, (type, ModuleType, nn.Module, str, bytes, int, float)):
            continue
        seen.add(id(it))
        if isinstance(it, Tensor):
            storages[it.untyped_storage().data_ptr()] = it.untyped_storage().nbytes()
            continue
        stack += _inside(it)
    return sum(storages.values())


def _inside(it: Any) -> list[object]:
    if isinstance(it, dict):
        return list(it.values())
    if isinstance(it, (list, tuple, set, frozenset)):
        return list(it)
    if isinstance(it, MethodType):
        return [it.__self__]
    if isinstance(it, FunctionType):
        return [cell.cell_contents for cell in it.__closure__ or ()]
    return list(vars(it).values()) if hasattr(it, "__dict__") else []


@pytest.mark.parametrize(("method", "values"), [("factored", 0), ("eigen", sum(ORDERS))])
def test_held_between_steps_are_packed_factors_and_inverses(method: str, values: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 24))
    every = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4}
    kfac = KFACPreconditioner(net, "categorical", damping_method=method, kl_clip=0.01, **every)  # type: ignore[arg-type]
    for step in range(8):
        net.zero_grad()
        logits = net(torch.randn(50, 40))
        kfac.accumulate()
        F.cross_entropy(logits, torch.zeros(50, dtype=torch.long)).backward()
        kfac.step(lr=0.1)
        # Between a factor update and the next inversion the inverted factors are others than the average.
        averages = 1 if step % 4 < 2 else 2
        found, formula = held(kfac), 4 * (averages * TRIANGLES + SQUARES + values)
        assert formula <= found <= formula + 2000, step  # and the headers, metrics and the like
