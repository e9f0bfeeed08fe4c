"""What is measured of a K-FAC run beyond its loss: errors against the natural gradient, and what the coarse level did.

All of it stands outside the run's clock and leaves the training as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_dist import KFACPreconditioner
from kfac_dist.layers import find_layers
from kfac_dist.metrics import PhaseTimer
from kfac_dist.study.dense_fisher import DenseFisher, matrices, sampled_cotangents
from kfac_dist.study.problem import Problem


class DirectionErrors:
    """Errors of a step's direction against the dense natural gradient d* = (F + lambda I)^-1 grad.

    The gradient is the step's, F that of the whole batch with the targets that K-FAC samples at that step (on steps
    with a factor update the very samples of the update), lambda the fine damping of the step.

    Args:
        twin: a copy of the network, made before K-FAC put its hooks into it.
        kfac: the preconditioner of the network.
        exact: take the exact expectation over the targets for F instead. One draw per sample leaves most of the
            gradient outside F's range, where d* is the gradient over lambda and no direction comes near it; the exact F
            has all of it in its range.

    Raises:
        ValueError: more than 20,000 covered parameters.
    """

    def __init__(self, twin: Problem, kfac: KFACPreconditioner, exact: bool = False) -> None:
        self._config = replace(kfac.config, fisher_samples="exact") if exact else kfac.config
        self._twin = twin.train()
        self._kfac = kfac
        self._layers = find_layers(twin, kfac.config).layers

    def before(self, model: Problem) -> None:
        """Keep the parameters of the step that is about to be made."""
        self._twin.load_state_dict(model.state_dict())

    def after(self, batch: Sequence[Tensor]) -> dict[str, float]:
        """The measures of the step that was made on ``batch`` (inputs, ..).

        Returns:
            ``error`` and the step-size-free ``error_free`` of the direction that was handed out, clipped;
            ``error_one_level`` and ``error_free_one_level`` of the one-level direction at the same gradient and with
            the same inverses, not clipped; and ``decrease``, by how much the coarse level lowered the squared error
            before the clip (0 with one level). All in units of ||d*||_F or of its square.
        """
        kfac, twin = self._kfac, self._twin
        damping, scale = kfac.metrics["damping"], kfac.metrics["kl_clip_scale"]
        with torch.random.fork_rng(devices=[]):
            twin.zero_grad()
            twin.loss(batch, "").backward()
            logits = twin(batch[0]).detach()
        fisher = DenseFisher(
            twin, self._layers, batch[0], sampled_cotangents(self._config, int(kfac.metrics["step"]), logits)
        )
        gradients = {name: g / kfac.metrics["loss_scale"] for name, g in matrices(self._layers).items()}
        handed_out = fisher.flatten(matrices(kfac.layers))
        unclipped = handed_out / scale if scale > 0 else handed_out
        one_level = fisher.flatten(kfac.one_level(gradients))
        errors = fisher.errors(fisher.flatten(gradients), [handed_out, one_level, unclipped], damping)
        return {
            "error": errors[0][0],
            "error_free": errors[0][1],
            "error_one_level": errors[1][0],
            "error_free_one_level": errors[1][1],
            "decrease": errors[1][0] ** 2 - errors[2][0] ** 2,
        }


class Watch:
    """What a run's lines hold of K-FAC, and nothing for any other method.

    Args:
        kfac: the preconditioner; None: another method.
        twin: a copy of the network for :class:`DirectionErrors`; None: they are not measured.
        every: steps between those measures.
        exact: measure them with the exact Fisher matrix, too.
    """

    def __init__(self, kfac: KFACPreconditioner | None, twin: Problem | None, every: int, exact: bool = False) -> None:
        self._kfac = kfac
        self._errors: dict[str, DirectionErrors] = {}
        if kfac is not None and twin is not None:
            kinds = {"measures": False} | ({"exact": True} if exact else {})
            self._errors = {name: DirectionErrors(twin, kfac, kind) for name, kind in kinds.items()}
        self._every = every
        self._timers: list[PhaseTimer] = []
        self._seconds = 0.0

    def _due(self, step: int) -> bool:
        return bool(self._errors) and step % self._every == 0

    def before(self, step: int, model: Problem) -> None:
        """Step number ``step`` (1, 2, ..) is about to be made."""
        if self._due(step):
            for errors in self._errors.values():
                errors.before(model)

    def after(self, step: int, batch: Sequence[Tensor]) -> dict[str, Any]:
        """It was made; ``measures`` of it, and ``exact`` ones, where they are due."""
        if self._kfac is not None and self._kfac.coarse is not None and self._kfac.metrics.timer is not None:
            self._timers.append(self._kfac.metrics.timer)
        return {name: errors.after(batch) for name, errors in self._errors.items()} if self._due(step) else {}

    def coarse(self, seconds: float) -> dict[str, Any]:
        """The coarse level's numbers of the last step, and its phase's share of the time since the last reading.

        Args:
            seconds: of training so far.

        Returns:
            {} without a coarse level, else ``coarse``: ``decrease`` (of the squared error, exact for the F and the
            damping that the coarse level has), ``decrease_ratio`` (the same over ||zeta||_F^2), ``condition``,
            ``rank``, ``samples`` and what else is on the host already, and ``share``.
        """
        milliseconds = sum(timer.milliseconds().get("coarse", 0.0) for timer in self._timers)
        passed, self._seconds, self._timers = seconds - self._seconds, seconds, []
        ready = {} if self._kfac is None else self._kfac.metrics.ready()
        values = {name.removeprefix("coarse/"): value for name, value in ready.items() if name.startswith("coarse/")}
        return {"coarse": values | {"share": milliseconds / 1e3 / passed}} if values and passed > 0 else {}

    def interactions(self) -> dict[str, Any]:
        """``interactions`` E_ij / sqrt(E_ii E_jj) of the last coarse solve and ``layers``, whose vector each row is.

        {} where there is no coarse level, or where its vectors span the whole network.
        """
        system = None if self._kfac is None else self._kfac.coarse_system
        if system is None or len(system.blocks) < 2:
            return {}
        layers, matrix = system.interactions()
        return {"interactions": matrix.tolist(), "layers": layers}
