"""Small networks at several states of their training, each with its dense float64 Fisher matrix.

What ``benchmarks.coarse_error`` and ``benchmarks.public_codes`` measure corrections on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.config import KFACConfig
from kfac_dist.study.dense_fisher import DenseFisher, sampled_cotangents

DAMPING, SAMPLES, STATES, STEPS_BETWEEN = 1e-2, 1024, 5, 20

NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "MLP 64-20-20-20-10": (
        lambda: nn.Sequential(
            nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10)
        ),
        "categorical",
    ),
    "CNN 6-8-8-10": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        "categorical",
    ),
    "autoencoder 64-24-8-24-64": (
        lambda: nn.Sequential(
            nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 8), nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 64)
        ),
        "bernoulli",
    ),
}


def loss_of(likelihood: str, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if likelihood == "categorical":
        return F.cross_entropy(logits, y)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


@dataclass
class State:
    """A network between two steps of its training; ``fisher`` and ``cotangent`` are of the same sampled targets."""

    model: nn.Module
    likelihood: str
    x: Tensor
    y: Tensor
    trainer: KFACPreconditioner
    cotangent: Tensor
    fisher: DenseFisher
    gradient: Tensor


def visited(name: str, count: int = STATES, samples: int = SAMPLES, steps: int = STEPS_BETWEEN) -> Iterator[State]:
    """The states of one network, so many steps of layer_step_momentum apart."""
    build, likelihood = NETS[name]
    digits = load_digits()
    x = torch.tensor(digits.data[:samples] / 16.0, dtype=torch.float64)
    y = torch.tensor(digits.target[:samples])
    torch.manual_seed(0)
    model = build().double()
    coarse = CoarseConfig(space="layer_step_momentum", max_samples=None, damping=0.1)
    trainer = KFACPreconditioner(
        model, likelihood=likelihood, damping=DAMPING, damping_method="eigen", coarse=coarse, seed=2, kl_clip=0.3
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(count):
        for _ in range(steps):
            optimizer.zero_grad()
            logits = model(x)
            trainer.accumulate()
            loss_of(likelihood, logits, x, y).backward()
            trainer.step(lr=optimizer)
            optimizer.step()
        model.zero_grad()
        logits = model(x)
        loss_of(likelihood, logits, x, y).backward()
        ((cotangent, _),) = sampled_cotangents(KFACConfig(likelihood=likelihood, seed=1), 0, logits)
        fisher = DenseFisher(model, trainer.layers, x, [(cotangent, 1.0)])
        gradient = fisher.flatten({layer.name: layer.gradient() for layer in trainer.layers})  # type: ignore[misc]
        trainer.forget()
        yield State(model, likelihood, x, y, trainer, cotangent, fisher, gradient)
        trainer.forget()
    trainer.close()


def direction(state: State, coarse: CoarseConfig | None) -> Tensor:
    """A fresh preconditioner's direction as one vector; momentum spaces get the last one that the trainer made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kfac = KFACPreconditioner(
            state.model, likelihood=state.likelihood, damping=DAMPING, damping_method="eigen", coarse=coarse, seed=1
        )
    if coarse is not None and "momentum" in coarse.space:
        last = state.trainer.state_dict()["coarse"] | {"space": coarse.space}
        kfac.load_state_dict(kfac.state_dict() | {"coarse": last})
    state.model.zero_grad()
    logits = state.model(state.x)
    kfac.accumulate(sample_ids=torch.arange(len(state.x)))
    loss_of(state.likelihood, logits, state.x, state.y).backward()
    kfac.step()
    kfac.close()
    return state.fisher.flatten({layer.name: layer.gradient() for layer in kfac.layers})  # type: ignore[misc]
