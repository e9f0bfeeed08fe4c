"""The coarse level: restrict, reduce, solve on rank 0, broadcast, prolong (Koroko et al. 2023, section 3).

Words per solve, m = dimension of the space: in, m (m + 1) / 2 + m + 1 (the operator's moment, Y w, the sample count;
one more, w w, for a space without zeta); out, m + 1 (status, beta). Everything is a sum over samples: the result does
not depend on how they lie on the ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfac_dist.basis import Basis
from kfac_dist.coarse import CoarseSpace, Vector, inner
from kfac_dist.coarse_solver import CoarseOperator, CoarseSystem, Status, factorise
from kfac_dist.coarse_state import saved_coefficients, saved_momentum
from kfac_dist.comm import Communicator
from kfac_dist.config import CoarseConfig, check_number, evaluate
from kfac_dist.correction import Correction
from kfac_dist.fine import Fine
from kfac_dist.metrics import MetricValue
from kfac_dist.samples import Samples, share
from kfac_dist.trust import LevenbergMarquardt

Result = TypeVar("Result")
Solution = tuple[Status, Tensor]
"""How a solve went, and beta (m,)."""


class TwoLevel:
    """The coarse level of one preconditioner.

    Args:
        config: the coarse level's configuration.
        space: the coarse space that it names.
        communicator: its channel; rank 0 solves.
    """

    def __init__(self, config: CoarseConfig, space: CoarseSpace, communicator: Communicator) -> None:
        self.config = config
        self.space = space
        self.failures = 0
        self.abandoned = 0  # steps that were not taken, as every damping that was tried would have raised the loss
        self.solves = 0
        self.momentum: dict[str, Tensor] | None = None
        self.report: dict[str, MetricValue] = {}
        self.system: CoarseSystem | None = None  # of the last solve, on rank 0
        self.dimension = 0
        self.has_loss = False
        self._communicator = communicator
        self.trust = LevenbergMarquardt(config.initial_damping)
        # Layers take part where they have a gradient: what is kept by position goes with the names of its layers.
        self._kept: tuple[list[str], Tensor] | None = None  # coefficients of the last solve, for the steps in between
        self._rows: tuple[Samples, list[str], Tensor] | None = None  # U^T V of the momentum, while the samples stay
        self._candidate: tuple[Samples, list[str], Tensor] | None = None  # the same for the direction in the making

    # -- settings -------------------------------------------------------------------------------------------------

    @property
    def adaptive(self) -> bool:
        """Whether lam_c follows the Levenberg-Marquardt rule."""
        return self.config.damping == "adaptive" or (self.config.damping == "auto" and self.has_loss)

    def damping(self, step: int, fine_damping: float) -> float:
        """lam_c of this step."""
        if self.config.damping is None:
            return fine_damping
        if isinstance(self.config.damping, str):
            return self.trust.damping if self.adaptive else fine_damping
        return evaluate("coarse damping", self.config.damping, step)

    def quota(self, layers: int) -> int | None:
        """How many samples this rank keeps; None: all of them."""
        total = self.config.max_samples
        if total is None:
            return None
        return share(self.space.samples(layers) if total == "auto" else int(total), self._communicator)

    # -- one correction -------------------------------------------------------------------------------------------

    def correct(self, fine: Fine, samples: Samples, damping: float, step: int) -> Correction | None:
        """The corrected direction of this step; None on a step without one (a one-level step).

        Args:
            fine: this step's gradients, directions and products.
            samples: the kept samples of the last curvature batch, on this rank.
            damping: lam_c.
            step: counted from 0.
        """
        due = step % self.config.every_n_steps == 0 or self._kept is None
        fine.momentum = self.momentum if self.space.uses_momentum else None
        if not due and self._galerkin(1) is None:
            return None
        basis = Basis(self.space.vectors(fine), self.space.spans_network)
        names, t = self._kept or ([], None)
        if not due and t is not None and names == basis.names and t.shape == (basis.blocks, basis.count):
            self._candidate = None
            return self._correction(basis, t)
        self.dimension = basis.dimension
        correction = self._solve(fine, basis, samples, damping)
        self.solves += 1
        self.failures += not correction.solved
        self._kept = (basis.names, correction.coefficients) if correction.solved else None
        return correction

    def _galerkin(self, count: int) -> tuple[float, ...] | None:
        """Coefficients of zeta where it lies in the space and the correction is the error-minimising one."""
        if self.config.correction != "error_minimizing":
            return None
        return self.space.direction_coefficients(count)

    def _solve(self, fine: Fine, basis: Basis, samples: Samples, damping: float) -> Correction:
        rows = self._project(basis, samples)
        zeta = self.space.direction_coefficients(basis.count)
        if zeta is None:
            w = samples.along(fine.directions)
        else:
            w = torch.einsum("nkc,k->c", rows, torch.tensor(zeta).to(rows))
        Y = basis.restrict(rows).double()
        w = w.double()
        sums = self._reduce(basis, samples, Y, w, extra=zeta is None)
        galerkin = self._galerkin(basis.count)
        additive = self.config.correction in ("additive", "deflated", "balanced") or galerkin is not None

        def solve() -> tuple[CoarseOperator, Solution]:
            restricted = self._restricted(fine, basis, zeta)
            operator = self._operator(basis, sums, damping)
            self.system = CoarseSystem(tuple(basis.block_names), basis.count, operator.matrix)
            gradient = restricted["gradient"]
            residual = gradient - sums["Yw"] / sums["samples"] - damping * restricted["direction"]
            self._report(operator, residual, sums, restricted, damping, zeta)
            return operator, operator.solve(gradient if additive else residual)

        operator, solution = self._on_rank_0(solve) or (None, None)
        solved, beta = self._broadcast(solution, basis)
        t = basis.raw_coefficients(beta)
        if not solved:
            return self._one_level(fine, basis)
        if galerkin is not None:  # any other correction leaves the span of the vectors
            self._candidate = (samples, basis.names, torch.einsum("nkc,nk->nc", rows, t.to(rows)))
            return self._correction(basis, t)
        if self.config.correction in ("error_minimizing", "additive"):
            return Correction(basis, t, fine.directions, True)
        return self._projected(fine, basis, samples, damping, operator, t, rows)

    def _correction(self, basis: Basis, t: Tensor) -> Correction:
        """zeta_2 = V t; one-level is V c."""
        zeta = torch.tensor(self.space.direction_coefficients(basis.count)).to(t)
        return Correction(basis, t, None, True, zeta.expand_as(t))

    def _one_level(self, fine: Fine, basis: Basis) -> Correction:
        self._candidate = None
        zero = torch.zeros(basis.blocks, basis.count, dtype=torch.float64, device=basis.like.device)
        return Correction(basis, zero, fine.directions, False)

    def _projected(
        self,
        fine: Fine,
        basis: Basis,
        samples: Samples,
        damping: float,
        operator: CoarseOperator | None,
        t: Tensor,
        rows: Tensor,
    ) -> Correction:
        """A-DEF1, c + M^-1 (grad - F_l c) with c = Q grad; and BNN, y + Q (grad - F_l y) of that y.

        Two collectives of the parameters' size more than the additive form under "mem_opt", one under "comm_opt".
        """
        c = basis.prolong(t)
        product = fine.product(c)
        step = fine.precondition({name: fine.gradients[name] - product[name] for name in basis.names})
        if self.config.correction == "deflated":
            return Correction(basis, t, step, True, directions=fine.directions)
        y = {name: c[name] + step[name] for name in basis.names}
        w = samples.along(y)
        local = torch.cat([basis.restrict(rows).double() @ w.double(), w.new_full((1,), samples.valid).double()])
        self._communicator.reduce(local, dst=0, phase="coarse")

        def solve() -> Solution:
            assert operator is not None  # rank 0 has one: the first solve has succeeded
            host = local.cpu()
            restricted = basis.restrict(basis.by_block(basis.dots_by_layer(fine.gradients))).cpu()
            along = basis.restrict(basis.by_block(basis.dots_by_layer(y))).cpu()
            return operator.solve(restricted - host[:-1] / host[-1] - damping * along)

        solved, beta = self._broadcast(self._on_rank_0(solve), basis)
        if not solved:
            return self._one_level(fine, basis)
        return Correction(basis, t + basis.raw_coefficients(beta), step, True, directions=fine.directions)

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _project(self, basis: Basis, samples: Samples) -> Tensor:
        """U^T V of the raw vectors, (n, k, columns); the momentum's rows are combinations of the last ones."""
        source, names, momentum_rows = self._rows or (None, [], None)
        known = source is samples and names == basis.names and basis.count == 2
        vectors: dict[str, Sequence[Vector]] = {n: each[:1] if known else each for n, each in basis.vectors.items()}
        projected = samples.project(vectors, basis.like)
        rows = basis.stack_rows(projected)
        if known and momentum_rows is not None:
            rows[:, 1] = momentum_rows
        return rows

    def _restricted(self, fine: Fine, basis: Basis, zeta: tuple[float, ...] | None) -> dict[str, Tensor]:
        """R_0 grad, R_0 zeta and, where zeta is not in the space, the ||zeta||^2 that the report needs."""
        gradient = basis.restrict(basis.by_block(basis.dots_by_layer(fine.gradients)))
        if zeta is None:
            direction = basis.by_block(basis.dots_by_layer(fine.directions))
        else:
            direction = (basis.gram @ torch.tensor(zeta).to(basis.gram)[:, None])[..., 0]
        norm = [inner(z, z) for z in fine.directions.values()] if zeta is None else [gradient.new_zeros(())]
        packed = torch.cat([gradient, basis.restrict(direction), torch.stack(norm).sum()[None]]).cpu()
        m = basis.dimension
        return {"gradient": packed[:m], "direction": packed[m : 2 * m], "norm": packed[2 * m]}

    def _reduce(self, basis: Basis, samples: Samples, Y: Tensor, w: Tensor, *, extra: bool) -> dict[str, Tensor]:
        """The sums of ONE reduce of [moment | Y w | count] to rank 0; elsewhere nothing that could be used."""
        m = basis.dimension
        moment = self.space.local_moment(Y, samples)
        rows, columns = torch.triu_indices(m, m, device=Y.device)
        parts = [moment[:, rows, columns].flatten(), Y @ w, Y.new_full((1,), samples.valid)]
        if extra:
            parts.append((w @ w)[None])
        local = torch.cat(parts)
        self._communicator.reduce(local, dst=0, phase="coarse")
        if self._communicator.rank != 0:
            return {}
        host, layers = local.cpu(), moment.shape[0]
        split = layers * rows.numel()
        full = torch.zeros(layers, m, m, dtype=torch.float64)
        full[:, rows.cpu(), columns.cpu()] = host[:split].view(layers, -1)
        sums = {"moment": full + full.triu(1).mT, "Yw": host[split : split + m], "samples": host[split + m]}
        return sums | ({"ww": host[split + m + 1]} if extra else {})

    def _operator(self, basis: Basis, sums: Mapping[str, Tensor], damping: float) -> CoarseOperator:
        """E, factorised."""
        m, samples = basis.dimension, float(sums["samples"])
        if not samples > 0:
            return factorise(torch.full((m, m), float("nan"), dtype=torch.float64))
        return factorise(self.space.operator(sums["moment"], samples) + damping * basis.orthonormal_gram().cpu())

    def _on_rank_0(self, compute: Callable[[], Result]) -> Result | None:
        """What rank 0 computes between two collectives; None elsewhere.

        Whatever it raises is a failed solve, and None: the other ranks wait for what comes of it.
        """
        if self._communicator.rank != 0:
            return None
        try:
            return compute()
        except Exception as error:
            warnings.warn(f"the coarse solve raised {error!r}: this is a one-level step", stacklevel=2)
            return None

    def _broadcast(self, solution: Solution | None, basis: Basis) -> tuple[bool, Tensor]:
        """[status, beta] from rank 0, or a failure where it has none: every rank learns whether to use it."""
        message = torch.zeros(basis.dimension + 1, dtype=torch.float64)
        message[0] = float(Status.FAILED)
        if solution is not None:
            message[0], message[1:] = float(solution[0]), solution[1]
        message = message.to(basis.like.device)
        self._communicator.broadcast(message, src=0, phase="coarse")
        return float(message[0]) != Status.FAILED, message[1:]

    def _report(
        self,
        operator: CoarseOperator,
        residual: Tensor,
        sums: Mapping[str, Tensor],
        restricted: Mapping[str, Tensor],
        damping: float,
        zeta: tuple[float, ...] | None,
    ) -> None:
        """The exact decrease (R_0 r)^T E^-1 (R_0 r) of the squared error, and its ratio to ||zeta||_F^2."""
        decrease = float(residual @ operator.inverse @ residual)
        if zeta is None:
            energy = float(sums["ww"] / sums["samples"] + damping * restricted["norm"])
        else:
            # zeta = V b in orthonormal coordinates, so its energy is b^T E b.
            energy = float(restricted["direction"] @ operator.matrix @ restricted["direction"])
        self.report |= {
            "coarse/decrease": decrease,
            "coarse/decrease_ratio": decrease / energy if energy > 0 else 0.0,
            "coarse/condition": operator.condition,
            "coarse/rank": float((operator.matrix.diagonal() > 0).sum()),
            "coarse/samples": float(sums["samples"]),
        }

    def report_coefficients(self, correction: Correction | None) -> None:
        """The raw coefficients, layer by layer: for a space with zeta, the first is the step size of the layer."""
        self.report = {key: value for key, value in self.report.items() if not key.startswith("coarse/beta/")}
        if correction is None:
            return
        for i, owner in enumerate(correction.basis.block_names):
            for j in range(correction.basis.count):
                self.report[f"coarse/beta/{owner}/{j}"] = correction.coefficients[i, j]

    # -- memory ---------------------------------------------------------------------------------------------------

    def remember(self, directions: Mapping[str, Tensor], scale: Tensor, corrected: Tensor, finite: bool) -> None:
        """Keep the direction that was handed out, for the momentum of the next step.

        Args:
            directions: what was written.
            scale: the clip's factor in it.
            corrected: whether it was the corrected direction (else the clip fell back to one level).
            finite: whether it can be used; after a step that was skipped the momentum is gone.
        """
        rows, self._candidate, self._rows = self._candidate, None, None
        if not self.space.uses_momentum:
            return
        self.momentum = dict(directions) if finite else None
        if finite and rows is not None and bool(corrected):
            self._rows = (*rows[:2], rows[2] * scale.to(rows[2]))

    def discard(self) -> None:
        """Solve anew at the next call, whatever ``every_n_steps``: kept coefficients were rejected."""
        self._kept = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; the samples are not saved, but captured anew at the first step."""
        return {
            "space": self.config.space,
            "damping": self.trust.damping,
            "again": self.trust.again,
            "failures": self.failures,
            "solves": self.solves,
            "abandoned": self.abandoned,
            "momentum": None if self.momentum is None else dict(self.momentum),
            "kept": None if self._kept is None else {"layers": self._kept[0], "coefficients": self._kept[1]},
            "has_loss": self.has_loss,
        }

    def load_state_dict(
        self, saved: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], like: Tensor
    ) -> None:
        """Take over a saved state; one of another space, or of a run without one, starts afresh.

        Raises:
            ValueError: the momentum does not fit the layers, or a part is missing; nothing is taken over then.
        """
        momentum, kept, trust = None, None, LevenbergMarquardt(self.config.initial_damping)
        counts, has_loss = (0, 0, 0), self.has_loss
        if saved is not None and saved.get("space") == self.config.space:
            missing = self.state_dict().keys() - saved.keys()
            if missing:
                raise ValueError(f"the checkpoint's coarse level lacks {', '.join(sorted(missing))}: it is damaged")
            try:
                momentum = saved_momentum(saved["momentum"], shapes, like)
                kept = saved_coefficients(saved["kept"], shapes, like.device)
                trust = LevenbergMarquardt(float(saved["damping"]), bool(saved["again"]))
                check_number("damping", trust.damping, 0.0, open_low=True)
                counts = int(saved["failures"]), int(saved["solves"]), int(saved["abandoned"])
                has_loss = bool(saved["has_loss"])
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"the checkpoint's coarse level is damaged or of another model: {error}") from error
        # From here on nothing can fail.
        self.momentum, self._kept, self._rows, self.trust = momentum, kept, None, trust
        self.system = None
        (self.failures, self.solves, self.abandoned), self.has_loss = counts, has_loss
        self.space.forget()
