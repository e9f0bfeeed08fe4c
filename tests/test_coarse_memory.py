"""Trap 11: what the coarse level allocates, and how its work grows with the number of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from kfac_dist.layers import Layer, layers
from kfac_dist.two_level import TwoLevel


class Watch(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.largest = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() // leaf.element_size() > self.largest:
                self.largest = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.shape = tuple(leaf.shape)
        return out


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Watch the coarse phases of the steps in the body."""
    watch, correct = Watch(), TwoLevel.correct

    def spy(self: TwoLevel, *args: Any) -> Any:
        with watch:
            return correct(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TwoLevel, "correct", spy)
        yield watch


BATCH, SIDE, CHANNELS = 64, 6, 6


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(CHANNELS * 4, 30),
        nn.Tanh(),
        nn.Linear(30, 3),
    )


def step(kfac: KFACPreconditioner, x: Tensor, y: Tensor) -> None:
    logits = kfac.model(x)
    kfac.accumulate()
    nn.functional.cross_entropy(logits, y).backward()
    kfac.step()


def config_of(space: str, correction: str | None = None) -> CoarseConfig:
    k = 2 if coarse_spaces[space].variable_count else 1
    return CoarseConfig(space=space, vectors_per_layer=k, correction=correction, max_samples=None)


CONFIGS = [*((space, None) for space in coarse_spaces), ("nicolaides", "balanced"), ("layer_step", "deflated")]


@pytest.mark.parametrize("draws", [1, "exact"])
@pytest.mark.parametrize(("space", "correction"), CONFIGS)
def test_trap_11_no_tensor_is_larger_than_the_activations_or_the_parameters(
    space: str, correction: str | None, draws: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither (B T) x (B T), nor a gradient per sample, nor unfolded patches, nor U itself."""
    torch.manual_seed(0)
    model = conv_net()
    kfac = KFACPreconditioner(
        model, likelihood="categorical", fisher_samples=draws, coarse=config_of(space, correction)
    )
    x, y = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % 3
    with watched(monkeypatch) as watch:
        step(kfac, x, y)
        step(kfac, x, y)
    kfac.close()
    assert kfac.metrics["coarse/samples"] == BATCH
    assert watch.operations > 50
    padded = BATCH * CHANNELS * (SIDE + 2) ** 2
    p = sum(parameter.numel() for parameter in model.parameters())
    bound = max(padded, p + 1)  # products with F travel with the count
    forbidden = {
        "B T x B T": (BATCH * SIDE * SIDE) ** 2,
        "a gradient per sample": BATCH * (CHANNELS * 4 + 1) * 30,
        "unfolded patches": BATCH * SIDE * SIDE * 27,
        "U": BATCH * p,
    }
    assert bound < min(forbidden.values())
    assert 0 < watch.largest <= bound, watch.shape


def deep_net(depth: int) -> nn.Module:
    return nn.Sequential(
        *(module for _ in range(depth - 1) for module in (nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 3)
    )


@pytest.mark.parametrize(("space", "correction"), CONFIGS)
def test_trap_11_work_grows_linearly_with_the_layers(
    space: str, correction: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loop over pairs of layers: twice the layers, twice the forwards and twice the operations."""
    forwards = 0
    forward_with = layers["linear"].forward_with

    def count(self: Layer, *args: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return forward_with(self, *args)

    monkeypatch.setattr(layers["linear"], "forward_with", count)
    operations, projections = [], []
    for depth in (4, 8, 16):
        torch.manual_seed(0)
        kfac = KFACPreconditioner(deep_net(depth), likelihood="categorical", coarse=config_of(space, correction))
        x, y = torch.randn(16, 4), torch.arange(16) % 3
        forwards = 0
        with watched(monkeypatch) as watch:
            step(kfac, x, y)
        operations.append(watch.operations)
        projections.append(forwards)
        kfac.close()
    assert projections[2] - projections[1] == 2 * (projections[1] - projections[0]) > 0
    assert 0 < operations[2] - operations[1] <= 2.1 * (operations[1] - operations[0])
