"""The adaptive coarse damping: the rule, what the trial leaves behind, the ratio, rejections, ranks, and the state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.trust import MAX_REJECTIONS, OMEGA
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import relative
from tests.helpers.dense_coarse import FIRST_ID, SEED, Dense, decrease_ratio, flat_gradient

ALL = cases(48)
LAM, START = 0.03, 0.4


def build(case: Case, model: nn.Module, space: str = "layer_step_momentum", **options: Any) -> KFACPreconditioner:
    coarse = {k: options.pop(k) for k in ("every_n_steps", "correction", "damping") if k in options}
    config = CoarseConfig(space=space, initial_damping=START, max_samples=None, **({"damping": "adaptive"} | coarse))
    settings = {"likelihood": case.likelihood, "damping": LAM, "damping_method": "eigen", "seed": SEED}
    return KFACPreconditioner(model, coarse=config, **(settings | options))


def step(
    case: Case, kfac: KFACPreconditioner, closure: Callable[[], Any] | None, scale: float = 1.0, **options: Any
) -> None:
    kfac.model.zero_grad()
    logits = kfac.model(case.x)
    kfac.accumulate(sample_ids=torch.arange(FIRST_ID, FIRST_ID + len(case.x)))
    (scale * case.loss(logits, case.y)).backward()
    kfac.step(closure=closure, **options)


# -- what the trial leaves behind -------------------------------------------------------------------------------------


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(6, 3))


def test_the_trial_leaves_everything_as_it_was() -> None:
    """Parameters, statistics of BatchNorm, the random stream: bitwise; a call, and one per attempt, no gradients."""
    case = Case(noisy, ALL["mlp-categorical"].x[:12], ALL["mlp-categorical"].y[:12], "categorical")
    model = case.model()
    kfac = build(case, model, skip_layers="BatchNorm")
    calls: list[tuple[bool, float, Tensor]] = []

    def closure() -> Tensor:
        before = torch.get_rng_state()
        loss = case.loss(model(case.x), case.y)
        calls.append((torch.is_grad_enabled(), float(loss), before))
        return loss

    torch.manual_seed(3)
    for number in range(26):
        model.zero_grad()
        logits = model(case.x)
        kfac.accumulate()
        case.loss(logits, case.y).backward()
        tensors = [*model.parameters(), *model.buffers()]
        before = [t.detach().clone() for t in tensors]
        norm_gradient = model[1].weight.grad.clone()
        stream = torch.get_rng_state()
        kfac.step(closure=closure)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
        assert torch.equal(torch.get_rng_state(), stream)
        assert torch.equal(model[1].weight.grad, norm_gradient)  # what K-FAC does not cover
        assert model.training
        assert len(calls) != 1
        assert len(calls) >= 2 if number <= 20 or number == 25 else True
        for enabled, _, start in calls:
            assert not enabled
            assert torch.equal(start, stream)  # the same dropout before and after the update
        calls.clear()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.2 * p.grad
    kfac.close()


def test_a_closure_that_raises_leaves_everything_as_it_was() -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac, stream = build(case, model), torch.get_rng_state()
    before = [p.detach().clone() for p in model.parameters()]
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        if calls == 2:  # on the moved parameters
            assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            torch.rand(3)
            raise KeyError("no loss")
        return 1.0

    with pytest.raises(KeyError, match="no loss"):
        step(case, kfac, closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), stream)


# -- the ratio --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["layer_step_momentum", "nicolaides"])
@pytest.mark.parametrize(("kl_clip", "lr"), [(None, 0.2), (0.01, 1.0)])
@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", 48.0)])
def test_the_ratio_is_true_over_predicted_decrease(
    space: str, kl_clip: float | None, lr: float, reduction: str, scale: float
) -> None:
    """(loss(theta) - loss(theta - lr d)) / (lr <d, grad> - lr^2 d^T F_l d / 2), the loss in its mean form."""
    case = ALL["mlp-gaussian"]
    model = case.model()
    kfac = build(case, model, space, kl_clip=kl_clip, loss_reduction=reduction)
    step(case, kfac, lambda: scale * case.loss(model(case.x), case.y), scale, lr=lr)
    dense = Dense(case, case.model(), LAM, START, "true", 1)
    ratio = kfac.metrics["coarse/reduction_ratio"]
    assert ratio == pytest.approx(decrease_ratio(dense, case, model, lr), rel=1e-9)
    assert ratio > 0
    assert kfac.metrics["coarse/damping"] == START
    factor = OMEGA if ratio > 0.75 else 1 / OMEGA if ratio < 0.25 else 1.0
    assert kfac.state_dict()["coarse"]["damping"] == pytest.approx(START * factor)


def test_a_loss_that_is_known_is_not_asked_for_again() -> None:
    case = ALL["mlp-categorical"]
    ratios, asked = [], []
    for given in (False, True):
        model = case.model()
        kfac = build(case, model)
        calls: list[float] = []

        def closure(model: nn.Module = model, calls: list[float] = calls) -> Tensor:
            loss = case.loss(model(case.x), case.y)
            calls.append(float(loss))
            return loss

        known = {"loss": case.loss(model(case.x), case.y)} if given else {}
        kfac.forget()
        step(case, kfac, closure, **known)
        ratios.append(kfac.metrics["coarse/reduction_ratio"])
        asked.append(calls)
        kfac.close()
    assert ratios[0] == ratios[1]
    assert asked[0][1:] == asked[1]
    assert len(asked[1]) >= 1


def test_a_loss_of_several_entries_is_refused_before_anything_changes() -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac = build(case, model)
    with pytest.raises(ValueError, match=r"loss of shape \(2,\): .* one number"):
        step(case, kfac, lambda: case.loss(model(case.x), case.y), loss=torch.ones(2))
    assert kfac.state_dict()["step"] == 0
    assert kfac.metrics.get("factor_updates", 0) == 0
    kfac.close()


def test_a_rejected_step_is_made_anew_with_four_times_the_damping() -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac = build(case, model, "layer_step")
    losses = iter([1.0, 1.1, math.nan, 0.999])  # before, and after, three times
    step(case, kfac, lambda: next(losses))
    dense = Dense(case, case.model(), LAM, 16 * START, "true", 1)
    assert relative(flat_gradient(model), dense.corrected(dense.basis("layer_step", 1), "error_minimizing")) < 1e-8
    assert kfac.metrics["coarse/damping"] == pytest.approx(16 * START)
    assert next(losses, None) is None


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_rejections_end(every_n_steps: int) -> None:
    """A loss that always grows costs a bounded number of trials, and no step; kept coefficients are not tried twice."""
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac = build(case, model, "layer_step", every_n_steps=every_n_steps)
    step(case, kfac, lambda: case.loss(model(case.x), case.y))
    solves, count = kfac.state_dict()["coarse"]["solves"], 0
    damping = kfac.state_dict()["coarse"]["damping"]

    def grows() -> float:
        nonlocal count
        count += 1
        return float(count)

    step(case, kfac, grows)
    assert count == 1 + MAX_REJECTIONS  # the loss before is asked for once
    saved = kfac.state_dict()["coarse"]
    assert saved["damping"] == pytest.approx(damping * 4.0**MAX_REJECTIONS)
    assert saved["solves"] - solves == (MAX_REJECTIONS if every_n_steps == 1 else MAX_REJECTIONS - 1)
    assert kfac.metrics["coarse/abandoned"] == saved["abandoned"] == 1
    assert torch.equal(flat_gradient(model), torch.zeros_like(flat_gradient(model)))
    step(case, kfac, lambda: case.loss(model(case.x), case.y))
    assert flat_gradient(model).abs().max() > 0
    assert kfac.metrics["coarse/abandoned"] == 1


def test_a_step_that_was_not_taken_leaves_no_momentum() -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac = build(case, model, "layer_step_momentum")
    step(case, kfac, lambda: case.loss(model(case.x), case.y))
    assert kfac.state_dict()["coarse"]["momentum"] is not None
    grows = iter(range(100))
    step(case, kfac, lambda: float(next(grows)))
    assert kfac.state_dict()["coarse"]["momentum"] is None


@pytest.mark.parametrize("how", ["failed solve", "gradient that is not finite"])
def test_a_step_without_a_correction_is_not_judged(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac = build(case, model)
    if how == "failed solve":
        from kfac_dist.coarse_solver import factorise  # noqa: PLC0415 - the original, before it is replaced

        monkeypatch.setattr("kfac_dist.two_level.factorise", lambda E: factorise(E * float("nan")))
    else:
        model[0].weight.register_hook(lambda g: g * float("nan"))
    step(case, kfac, lambda: pytest.fail("the loss was asked for"))
    saved = kfac.state_dict()["coarse"]
    assert saved["damping"] == START
    if how == "failed solve":
        assert saved["failures"] == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_before_the_update_says_nothing(loss: float) -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac, calls = build(case, model), []
    step(case, kfac, lambda: calls.append(loss) or loss)
    assert len(calls) == 2
    assert kfac.state_dict()["coarse"]["damping"] == START
    assert kfac.metrics["corrected"] == 1
    assert "coarse/reduction_ratio" not in kfac.metrics


@pytest.mark.parametrize("damping", ["adaptive", "auto"])
def test_a_closure_for_the_steps_that_want_it(damping: str, recwarn: pytest.WarningsRecorder) -> None:
    """``closure if kfac.wants_loss else None`` is enough, also after loading; a missing one is an error."""
    case = ALL["mlp-categorical"]

    def run(kfac: KFACPreconditioner, first: int, last: int, always: bool) -> list[float]:
        dampings = []
        for _ in range(first, last):
            closure = lambda: case.loss(kfac.model(case.x), case.y)  # noqa: E731 - as users write it
            step(case, kfac, closure if always or kfac.wants_loss else None, lr=0.1)
            dampings.append(kfac.metrics["coarse/damping"])
            with torch.no_grad():
                for p in kfac.model.parameters():
                    p -= 0.1 * p.grad
        return dampings

    def fresh() -> KFACPreconditioner:
        return build(case, case.model(), damping=damping, factor_every_n_steps=1)

    wanted, kfac = run(fresh(), 0, 29, always=True), fresh()
    assert run(kfac, 0, 23, always=False) == wanted[:23]
    other = fresh()
    other.model.load_state_dict(kfac.model.state_dict())
    other.load_state_dict(kfac.state_dict())
    assert run(other, 23, 29, always=False) == wanted[23:]
    assert not [w for w in recwarn if "cannot adapt" in str(w.message)]
    if damping == "adaptive":
        run(other, 29, 30, always=False)
        with pytest.raises(ValueError, match="closure=lambda"):
            step(case, other, None)
