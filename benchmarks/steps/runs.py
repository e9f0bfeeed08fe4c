"""Trainings that are timed: SGD, and SGD on what this package or kfac-pytorch makes of the gradients."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.steps.problems import Problem
from benchmarks.steps.timing import Schedule, Timed
from benchmarks.training_run import ROOT
from kfac_dist import CoarseConfig, KFACPreconditioner

MOMENTUM = {"lr": 1e-3, "momentum": 0.9}
ONE_LEVEL: Mapping[str, Any] = {"damping": 0.03, "kl_clip": 0.01}


class Run(Timed):
    """SGD with momentum; every block of steps begins from the same weights.

    Args:
        name: of the row.
        problem: the net, the batch and the loss.
        optimizer: options of ``torch.optim.SGD``.
        parallel: wrap the net in DistributedDataParallel.
    """

    def __init__(
        self, name: str, problem: Problem, optimizer: Mapping[str, float] = MOMENTUM, parallel: bool = False
    ) -> None:
        self.name = name
        self.problem = problem
        self.net: nn.Module = problem.build()
        if parallel:
            self.net = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), **optimizer)
        self.lr = optimizer["lr"]
        self.steps = 0
        self._start = [parameter.detach().clone() for parameter in self.net.parameters()]

    def begin(self) -> None:
        """Go back to the first weights.

        Raises:
            RuntimeError: the last block made them infinite, so that its times mean nothing.
        """
        with torch.no_grad():
            for parameter, start in zip(self.net.parameters(), self._start, strict=True):
                if not bool(torch.isfinite(parameter).all()):
                    raise RuntimeError(f"{self.name}: weights are not finite after {self.steps} steps")
                parameter.copy_(start)

    def kind(self) -> str:
        """What the next step is."""
        return self.schedule.kind(self.steps, self.schedule.block)

    def step(self) -> None:
        """Forward, backward, K-FAC, SGD."""
        self.optimizer.zero_grad()
        logits = self.net(self.problem.x)
        self.after_forward()
        loss = self.problem.loss(logits, self.problem.y)
        loss.backward()
        self.after_backward(loss.detach())
        self.optimizer.step()
        self.steps += 1

    def after_forward(self) -> None:
        """Nothing."""

    def after_backward(self, loss: Tensor) -> None:
        """Nothing."""


class OurRun(Run):
    """SGD on the directions of ``kfac_dist.KFACPreconditioner``.

    Args:
        name: of the row.
        problem: the net, the batch and the loss.
        settings: further keywords of the preconditioner; it renews the curvature at the first step of a block.
        coarse: the coarse level.
        optimizer: options of ``torch.optim.SGD``.
        parallel: wrap the net in DistributedDataParallel.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        settings: Mapping[str, Any] = ONE_LEVEL,
        coarse: CoarseConfig | None = None,
        optimizer: Mapping[str, float] = MOMENTUM,
        parallel: bool = False,
    ) -> None:
        super().__init__(name, problem, optimizer, parallel)
        adaptive = (
            "adaptive" in (settings.get("damping"), coarse and coarse.damping) or (coarse and coarse.damping) == "auto"
        )
        self.schedule = Schedule(True, coarse.every_n_steps if coarse else 0, adaptive)
        intervals = dict.fromkeys(("factor_every_n_steps", "inverse_every_n_steps"), self.schedule.block)
        # Staggered inversions cost the same on average, but would not be done within a block.
        options = {"likelihood": problem.likelihood, **settings, **intervals, "inverse_schedule": "together"}
        self.kfac = KFACPreconditioner(self.net, coarse=coarse, **options)

    def kind(self) -> str:
        """What the next step is, the loss as the damping's rule wants it now."""
        return self.schedule.kind(self.steps, self.schedule.block, self.kfac.wants_loss)

    def after_forward(self) -> None:
        """Sampled targets, on steps with new curvature."""
        self.kfac.accumulate()

    def after_backward(self, loss: Tensor) -> None:
        """The direction in place of the gradient."""
        closure = (lambda: self.problem.loss(self.net(self.problem.x), self.problem.y)) if self.kfac.uses_loss else None
        self.kfac.step(lr=self.lr, closure=closure, loss=loss)


class PeerRun(Run):
    """SGD on the directions of kfac-pytorch, with the same settings as far as it has them.

    Args:
        name: of the row.
        problem: the net, the batch and the loss.
        peer: its KFACPreconditioner.
        method: "inverse" or "eigen".
        fraction: of gradient workers: 1 is COMM-OPT, 0 MEM-OPT.
        parallel: wrap the net in DistributedDataParallel.
    """

    schedule = Schedule(True)

    def __init__(
        self, name: str, problem: Problem, peer: type[Any], method: str, fraction: float = 1.0, parallel: bool = False
    ) -> None:
        super().__init__(name, problem, parallel=parallel)
        intervals = dict.fromkeys(("factor_update_steps", "inv_update_steps"), self.schedule.block)
        options = {"lr": self.lr, "compute_method": method, "grad_worker_fraction": fraction, **ONE_LEVEL, **intervals}
        self.kfac = peer(self.net, **options)

    def after_backward(self, loss: Tensor) -> None:
        """The direction in place of the gradient."""
        self.kfac.step()


@dataclass(frozen=True)
class RaceSettings:
    """Settings of the race's two-level method: of the preconditioner, of its coarse level and of SGD."""

    fine: Mapping[str, Any]
    coarse: CoarseConfig
    optimizer: Mapping[str, float]

    def with_space(self, space: str) -> CoarseConfig:
        """The coarse level at the same samples, interval and damping in another space."""
        return replace(self.coarse, space=space)


def race_settings(path: Path = ROOT / "configs" / "mnist_autoencoder_two_level.yaml") -> RaceSettings:
    """Read them from the configuration; what only the callback knows is left out."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    options = next(each["init_args"] for each in config["trainer"]["callbacks"] if each["class_path"].endswith(".KFAC"))
    coarse = options["coarse"]
    coarse = CoarseConfig(**coarse.get("init_args", coarse)) if isinstance(coarse, dict) else CoarseConfig.parse(coarse)
    known = set(inspect.signature(KFACPreconditioner).parameters) - {"coarse", "likelihood"}
    fine = {name: value for name, value in options.items() if name in known}
    return RaceSettings(fine, coarse, config["optimizer"]["init_args"])
