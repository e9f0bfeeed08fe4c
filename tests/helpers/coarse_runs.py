"""Training runs in lockstep with dense matrices: stale curvature, moving averages, momentum, clip, kept coefficients.

The package and the reference see the same parameters at every step; the reference never reads what the package made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from tests.helpers.cases import Case, cases
from tests.helpers.dense import cotangents, gradient_matrix, kfac_direction, kronecker_factors, treated
from tests.helpers.dense_coarse import SEED, Dense, flat_gradient

BATCH = 12


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is run; ``fisher`` is "true" or "empirical", ``lam_c`` None, a number or a function of the step."""

    space: str
    k: int = 1
    variant: str | None = None
    correction: str | None = None
    lam: float = 0.03
    lam_c: float | Callable[[int], float] | None = 0.05
    every: int = 1
    factor_every: int = 2
    inverse_every: int | None = None  # as often as factors
    max_samples: int | None = None
    kl_clip: float | None = None
    fisher: str = "true"
    draws: int | str = 1
    sides: str = "both"
    options: dict[str, Any] = field(default_factory=dict)

    def coarse(self) -> CoarseConfig:
        return CoarseConfig(
            space=self.space,
            vectors_per_layer=self.k,
            variant=self.variant,
            correction=self.correction,
            damping=self.lam_c,
            every_n_steps=self.every,
            max_samples=self.max_samples,
        )

    def preconditioner(self, case: Case, model: nn.Module) -> KFACPreconditioner:
        settings: dict[str, Any] = {
            "likelihood": "empirical" if self.fisher == "empirical" else case.likelihood,
            "fisher_samples": self.draws,
            "damping": self.lam,
            "damping_method": "eigen",
            "factor_sides": self.sides,
            "factor_every_n_steps": self.factor_every,
            "inverse_every_n_steps": self.inverse_every or self.factor_every,
            "kl_clip": self.kl_clip,
            "seed": SEED,
        }
        return KFACPreconditioner(model, coarse=self.coarse(), **(settings | self.options))

    def damping(self, step: int) -> float:
        if self.lam_c is None:
            return self.lam
        return self.lam_c(step) if callable(self.lam_c) else self.lam_c


class Reference(Dense):
    """One run. ``direction`` gives zeta_2; ``grad``, ``zeta``, ``F_l`` and ``V`` are those of the last step."""

    def __init__(self, setup: Setup, case: Case, model: nn.Module) -> None:
        self.setup, self.case, self.lam = setup, case, setup.lam
        self.fisher, self.samples = setup.fisher, setup.draws
        self.names = list(treated(model))
        self.factors: dict[str, tuple[Tensor, Tensor, float]] = {}
        self.inverted: dict[str, tuple[Tensor, Tensor, float]] = {}
        self.updates = 0
        self.delta: Tensor | None = None
        self.kept: Tensor | None = None

    def _cotangents(self, logits: Tensor) -> Iterator[tuple[Tensor, float]]:
        return cotangents(self.case, logits, self.case.y, self.fisher, self.samples, SEED, self.step, self.ids)

    def precondition(self, vector: Tensor) -> Tensor:
        parts, method = self.split(vector), "eigen"
        return self.flatten(
            {n: kfac_direction(*self.inverted[n], parts[n], self.lam, method, self.setup.sides) for n in self.names}
        )

    def observe(self, model: nn.Module, case: Case, step: int, ids: Tensor) -> None:
        """This step's gradient and, where it is due, curvature: a moving average of factors, the newest samples' F."""
        self.model, self.case, self.step, self.ids = copy.deepcopy(model), case, step, ids
        self.model.zero_grad()
        case.loss(self.model(case.x), case.y).backward()
        self.grad = flat_gradient(self.model)
        self.shapes = {n: gradient_matrix(m).shape for n, m in treated(self.model).items()}
        if step % self.setup.factor_every == 0:
            new = kronecker_factors(case, copy.deepcopy(self.model), case.x, self._cotangents, sides=self.setup.sides)
            rho = min(1 - 1 / (self.updates + 1), 0.95)
            for name, parts in new.items():
                old = self.factors.get(name, parts)
                self.factors[name] = tuple(rho * o + (1 - rho) * n for o, n in zip(old, parts, strict=True))
            self.updates += 1
            kept = len(case.x) if self.setup.max_samples is None else min(self.setup.max_samples, len(case.x))
            columns = torch.stack(list(self._columns()), dim=1).view(len(self.grad), -1, len(case.x))[:, :, :kept]
            self.F = columns.flatten(1) @ columns.flatten(1).T / kept
        if step % (self.setup.inverse_every or self.setup.factor_every) == 0:
            self.inverted = dict(self.factors)
        self.lam_c = self.setup.damping(step)
        self.F_l = self.F + self.lam_c * torch.eye(len(self.F)).double()
        self.zeta = self.precondition(self.grad)

    def direction(self) -> Tensor:
        """What ``param.grad`` should be."""
        setup = self.setup
        delta = self.delta if "momentum" in setup.space else None
        self.V = self.basis(setup.space, setup.k, setup.variant, delta)
        due = self.step % setup.every == 0 or self.kept is None or len(self.kept) != self.V.shape[1]
        contains_zeta = setup.space in ("layer_step", "layer_step_momentum", "scalar", "scalar_momentum", "pcg")
        if due:
            lengths = self.V.norm(dim=0).clamp_min(1e-300)
            found = self.corrected(self.V / lengths, setup.correction or "error_minimizing")
            self.kept = torch.linalg.lstsq(self.V / lengths, found, driver="gelsd").solution / lengths
        else:
            found = self.V @ self.kept if contains_zeta else self.zeta
        if setup.kl_clip is not None:
            slope = float(found @ self.grad)
            found = found if slope > 0 else self.zeta
            found = found * min(1.0, (setup.kl_clip / float(found @ self.grad)) ** 0.5)
        self.delta = found
        return found


@dataclass
class Step:
    """One step of a run: the package's ``param.grad`` and the reference's."""

    kfac: KFACPreconditioner
    reference: Reference
    found: Tensor
    wanted: Tensor


def lockstep(
    setup: Setup,
    name: str,
    steps: int,
    lr: float = 1.0,
    disturb: Callable[[int, KFACPreconditioner, nn.Module], None] | None = None,
) -> Iterator[Step]:
    """Train with SGD(lr) on fresh batches of a case; ``disturb`` may act between the backward and ``step()``."""
    whole = cases(BATCH * steps)[name]
    model = whole.model()
    kfac, reference = setup.preconditioner(whole, model), Reference(setup, whole, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        ids = torch.arange(step * BATCH, (step + 1) * BATCH)
        case = replace(whole, x=whole.x[ids], y=whole.y[ids])
        reference.observe(model, case, step, ids)
        wanted = reference.direction()
        optimizer.zero_grad()
        logits = model(case.x)
        kfac.accumulate(sample_ids=ids)
        case.loss(logits, case.y).backward()
        if disturb is not None:
            disturb(step, kfac, model)
        kfac.step(lr=lr)
        yield Step(kfac, reference, flat_gradient(model), wanted)
        optimizer.step()
    kfac.close()
