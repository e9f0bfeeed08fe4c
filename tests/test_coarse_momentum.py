"""A momentum per layer, chosen by the coarse level: every step of a run against the dense formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.config import CORRECTIONS
from kfac_dist.samples import Samples
from kfac_dist.two_level import Correction
from tests.helpers.coarse_runs import Setup, Step, lockstep, relative

STEPS = 7
"""With curvature every third step, so that rows of U^T V are projected anew at 0, 3 and 6 and combined in between."""


def setup_of(space: str = "layer_step_momentum", **changes: object) -> Setup:
    return Setup(space=space, **({"factor_every": 3} | changes))


def check(step: Step, tolerance: float = 1e-8) -> None:
    assert relative(step.found, step.wanted) < tolerance
    assert step.kfac.metrics["coarse/failures"] == 0


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By call of ``Samples.project``, how many vectors each layer asks for."""
    counts: list[int] = []
    project = Samples.project

    def spy(self: Samples, vectors: dict, like: Tensor) -> dict[str, Tensor]:
        counts.append(max(len(each) for each in vectors.values()))
        return project(self, vectors, like)

    monkeypatch.setattr(Samples, "project", spy)
    return counts


@pytest.mark.parametrize("space", ["layer_step_momentum", "scalar_momentum"])
@pytest.mark.parametrize(
    ("name", "kl_clip", "lr"),
    [("mlp-categorical", None, 1.0), ("mlp-categorical", 0.02, 1.0), ("cnn", 0.003, 1.0), ("shared", None, 0.2)],
)
def test_every_step_is_the_dense_one(
    name: str, kl_clip: float | None, lr: float, space: str, projections: list[int]
) -> None:
    """delta is the direction handed out before, clipped as it was; its rows are projected on curvature steps only."""
    clipped = 0
    for number, step in enumerate(lockstep(setup_of(space, kl_clip=kl_clip), name, STEPS, lr)):
        check(step)
        assert projections == [2 if number in (3, 6) else 1]  # no momentum at step 0
        projections.clear()
        clipped += step.kfac.metrics["kl_clip_scale"] < 1
        assert float(step.found @ step.reference.grad) > 0
    assert (clipped >= 3) == (kl_clip is not None)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("space", ["layer_step_momentum", "scalar_momentum"])
def test_every_correction_remembers_what_was_handed_out(space: str, correction: str) -> None:
    """Only the Galerkin direction lies in the span of the vectors: the rows of the others are no combination."""
    for step in lockstep(setup_of(space, correction=correction), "mlp-gaussian", STEPS, lr=0.1):
        check(step)


def test_two_terms_are_worth_their_name() -> None:
    """The momentum is used: the result is not that of the space without it."""
    for number, step in enumerate(lockstep(setup_of(), "mlp-categorical", 4)):
        ref = step.reference
        V = ref.per_layer(ref.zeta)
        without = V @ torch.linalg.solve(V.T @ ref.F_l @ V, V.T @ ref.grad)
        assert (relative(step.found, without) < 1e-10) == (number == 0)
        assert ref.error(step.found) <= ref.error(without) * (1 + 1e-12)


def test_after_a_fall_back_of_the_clip_delta_is_the_one_level_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corrected direction that does not descend is replaced; what was handed out is what is remembered."""
    products, number = Correction.products, 0

    def ascends_at_steps_1_and_4(self: Correction, gradients: dict[str, Tensor]) -> Tensor:
        sign = -1.0 if number in (1, 4) else 1.0
        return sign * products(self, gradients)

    monkeypatch.setattr(Correction, "products", ascends_at_steps_1_and_4)
    setup = setup_of(kl_clip=0.02)
    steps = lockstep(setup, "mlp-categorical", STEPS)
    while number < STEPS:
        step = next(steps)
        ref = step.reference
        if number in (1, 4):
            scale = min(1.0, (setup.kl_clip / float(ref.zeta @ ref.grad)) ** 0.5)
            assert relative(step.found, scale * ref.zeta) < 1e-10
            assert not step.kfac.metrics["corrected"]
            ref.delta = scale * ref.zeta
        else:
            check(step)
            assert step.kfac.metrics["corrected"]
        number += 1
    steps.close()


@pytest.mark.parametrize("kl_clip", [None, 0.02])
@pytest.mark.parametrize("when", [1, 3])
def test_a_step_that_is_not_finite_ends_the_momentum(when: int, kl_clip: float | None) -> None:
    """Between curvature batches (1) and on one (3): the next step starts again from zeta alone."""

    def disturb(step: int, kfac: KFACPreconditioner, model: nn.Module) -> None:
        if step == when:
            model[0].weight.grad[0, 0] = float("nan")

    setup, checked = setup_of(kl_clip=kl_clip), 0
    for number, step in enumerate(lockstep(setup, "mlp-categorical", STEPS, disturb=disturb)):
        model, ref = step.kfac.model, step.reference
        if number < when:
            before = ref.F, dict(ref.factors), ref.updates, ref.inverted
        if number == when:
            assert step.found.isnan().any()
            assert step.kfac.metrics["coarse/failures"] == 1
            for p in model.parameters():  # what a gradient scaler does: the step is skipped
                p.grad = None
            assert step.kfac.state_dict()["coarse"]["momentum"] is None
            ref.delta = None
            ref.F, ref.factors, ref.updates, ref.inverted = before  # a curvature batch beside such gradients is dropped
            continue
        assert relative(step.found, step.wanted) < 1e-8
        assert step.kfac.metrics["coarse/failures"] == (number > when)
        checked += 1
        if number == when + 1:
            V = ref.per_layer(ref.zeta)
            without = V @ torch.linalg.solve(V.T @ ref.F_l @ V, V.T @ ref.grad)
            scale = 1.0 if kl_clip is None else min(1.0, (kl_clip / float(without @ ref.grad)) ** 0.5)
            assert relative(step.found, scale * without) < 1e-8
    assert checked == STEPS - 1


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("space", ["layer_step_momentum", "scalar_momentum"])
def test_kept_coefficients_meet_new_vectors(space: str, every: int) -> None:
    """Step 1 solves whatever ``every`` is: the coefficients of step 0 are those of one vector per layer."""
    solves = []
    for step in lockstep(setup_of(space, every=every, kl_clip=0.05), "mlp-categorical", STEPS):
        check(step)
        solves.append(step.kfac.state_dict()["coarse"]["solves"])
    wanted = [1 + sum(s == 1 or s % every == 0 for s in range(1, number + 1)) for number in range(STEPS)]
    assert solves == wanted


class Heads(nn.Module):
    """A trunk with three heads, of which a step uses some."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x: Tensor, used: tuple[int, ...]) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        return torch.cat([self.heads[i](hidden) for i in used], dim=1)


@pytest.mark.parametrize(("every", "steps"), [(1, ((0, 1, 2), (0, 1), (1, 2))), (3, ((0, 1), (1, 2), (0, 2)))])
def test_what_is_kept_by_position_is_not_given_to_other_layers(every: int, steps: tuple[tuple[int, ...], ...]) -> None:
    """As many layers have a gradient as before, but not the same ones: rows are projected, coefficients solved anew."""

    def last_direction(forgetful: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        model, x, y = Heads().double(), torch.randn(24, 5).double(), torch.randint(0, 3, (24,))
        config = CoarseConfig(space="layer_step_momentum", damping=0.3, every_n_steps=every, max_samples=None)
        kfac = KFACPreconditioner(model, "categorical", coarse=config, factor_every_n_steps=10)
        for number, used in enumerate([(0, 1, 2), *steps]):
            model.zero_grad()
            logits = model(x, used)
            if number == 0:
                kfac.accumulate(sample_ids=torch.arange(24))
            F.cross_entropy(logits, y).backward()
            if forgetful:
                kfac._two._rows, kfac._two._kept = None, None
            kfac.step()
        return [p.grad for p in model.parameters()]

    for found, wanted in zip(last_direction(False), last_direction(True), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-13)
