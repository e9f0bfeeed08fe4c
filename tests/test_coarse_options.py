"""Cadence, damping, number of samples, kinds of Fisher matrices, masks and windows of the coarse level."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from kfac_dist.comm import make_communicator
from kfac_dist.samples import Samples
from kfac_dist.two_level import TwoLevel
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import Setup, lockstep, relative
from tests.helpers.dense_coarse import flat_gradient
from tests.test_accumulation import masked_loss

ALL = cases()


def check(setup: Setup, name: str, steps: int = 4, lr: float = 0.1) -> list[dict[str, float]]:
    """A run against the dense one; returns the metrics by step."""
    metrics = []
    for step in lockstep(setup, name, steps, lr):
        assert relative(step.found, step.wanted) < 1e-8
        metrics.append(dict(step.kfac.metrics))
    return metrics


@pytest.mark.parametrize("space", ["layer_step", "scalar", "pcg", "nicolaides", "residual"])
def test_between_solves(space: str) -> None:
    """Spaces with zeta keep their coefficients, on the zeta of the day; the others make one-level steps."""
    setup = Setup(space=space, k=2 if space == "pcg" else 1, every=3, factor_every=2)
    corrected = [m["corrected"] for m in check(setup, "mlp-categorical", steps=7)]
    wanted = [1.0] * 7 if space in ("layer_step", "scalar", "pcg") else [1.0, 0, 0, 1, 0, 0, 1]
    assert corrected == wanted


def test_spectral_vectors_are_those_of_the_current_factors() -> None:
    """Newer ones than the inverses are made of."""
    check(Setup(space="spectral", k=2, factor_every=1, inverse_every=3), "mlp-categorical", steps=5)


@pytest.mark.parametrize(
    ("lam_c", "wanted"),
    [(None, [0.03] * 4), (0.7, [0.7] * 4), (lambda step: 1.0 / (step + 1), [1.0, 1 / 2, 1 / 3, 1 / 4])],
)
@pytest.mark.parametrize("space", ["nicolaides", "layer_step_momentum", "layer_step_residual"])
def test_coarse_damping(space: str, lam_c: float | Callable[[int], float] | None, wanted: list[float]) -> None:
    metrics = check(Setup(space=space, lam_c=lam_c), "mlp-gaussian")
    assert [m["coarse/damping"] for m in metrics] == wanted


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
@pytest.mark.parametrize("space", ["nicolaides", "layer_step", "residual", "spectral"])
def test_a_sub_batch_of_samples_is_used_everywhere(name: str, space: str) -> None:
    """E, w and F v see the same first 5 samples: the identities hold for their F."""
    for metrics in check(Setup(space=space, max_samples=5), name):
        assert metrics["coarse/samples"] == 5


def kept_samples(monkeypatch: pytest.MonkeyPatch) -> list[Samples]:
    """Every object that collects samples, as it is made."""
    made: list[Samples] = []
    init = Samples.__init__

    def spy(self: Samples, quota: int | None) -> None:
        init(self, quota)
        made.append(self)

    monkeypatch.setattr(Samples, "__init__", spy)
    return made


@pytest.mark.parametrize("fisher", ["categorical", "empirical"])
def test_max_samples_bounds_what_is_held(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all micro-batches; with copies of the kept rows only, not views that hold the whole batch."""
    made = kept_samples(monkeypatch)
    case = ALL["cnn"]
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood=fisher, coarse=CoarseConfig(max_samples=7))
    for part in torch.arange(12).split(4):
        logits = model(case.x[part])
        kfac.accumulate(loss_divisor=3)
        (case.loss(logits, case.y[part]) / 3).backward()
    kfac.step()
    assert kfac.metrics["coarse/samples"] == 7
    samples = made[0]
    assert [batch.size for batch in samples.batches] == [4, 3]
    per_sample = sum(x.numel() for x in case.x[:1]) + 4 * 9 + 4 * 9 + 2 * 16  # inputs
    per_sample += 4 * 9 + 4 * 9 + 2 * 16 + 3  # output gradients
    tensors = [t for batch in samples.batches for call in batch.calls for t in (call.x, *call.gradients)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) <= 8 * 7 * per_sample
    kfac.close()


def test_old_samples_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a curvature step nothing holds those of the step before, the momentum's rows included."""
    made = kept_samples(monkeypatch)
    for number, _ in enumerate(lockstep(Setup(space="layer_step_momentum", factor_every=2), "mlp-categorical", 5)):
        references = [weakref.ref(samples) for samples in made]
        made.clear()
        if number == 0:
            first = references[0]
        assert first() is not None if number < 2 else first() is None
        del references


@pytest.mark.parametrize(
    ("space", "k", "layers", "wanted"),
    [("layer_step", 1, 3, 256), ("pcg", 8, 20, 640), ("layer_step_momentum", 1, 50, 400), ("scalar", 1, 99, 256)],
)
def test_auto_is_the_larger_of_256_and_4_m(space: str, k: int, layers: int, wanted: int) -> None:
    config = CoarseConfig(space=space, vectors_per_layer=k)
    assert TwoLevel(config, make_communicator("single")).quota(layers) == wanted


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("name", ["mlp-categorical", "mlp-bernoulli", "cnn"])
def test_several_draws_per_sample(name: str, draws: int | str) -> None:
    for space in ("layer_step_momentum", "residual"):
        check(Setup(space=space, draws=draws, max_samples=9), name, steps=3)


@pytest.mark.parametrize("name", ["mlp-gaussian", "cnn", "shared", "sequences"])
def test_empirical_fisher(name: str) -> None:
    for space in ("layer_step_momentum", "nicolaides"):
        check(Setup(space=space, fisher="empirical"), name, steps=3)


def test_input_side_factors() -> None:
    """M is another one, F stays the true one."""
    for space in ("layer_step", "layer_step_momentum", "residual", "nicolaides"):
        for step in lockstep(Setup(space=space, sides="input"), "cnn", 3, lr=0.1):
            assert relative(step.found, step.wanted) < 1e-8
            assert step.kfac.metrics["coarse/failures"] == 0


def window(
    case: Case,
    parts: Sequence[Tensor],
    fisher: str,
    coarse: str | CoarseConfig,
    masks: Sequence[Tensor | None] | None = None,
    scale: float = 1.0,
    divisor: float | None = None,
    **options: Any,
) -> Tensor:
    """``param.grad`` after one step over micro-batches whose mean losses, times ``scale``, add up to the window's."""
    model = case.model()
    likelihood = "empirical" if fisher == "empirical" else case.likelihood
    kfac = KFACPreconditioner(model, likelihood=likelihood, seed=3, damping=0.05, coarse=coarse, **options)
    total = sum(len(part) for part in parts)
    for number, part in enumerate(parts):
        mask = None if masks is None else masks[number]
        by = total / len(part) if divisor is None else divisor
        logits = model(case.x[part])
        kfac.accumulate(sample_ids=part, mask=mask, loss_divisor=by)
        (scale * masked_loss(case, logits, case.y[part], mask) / by).backward()
    kfac.step()
    assert kfac.metrics["coarse/failures"] == 0
    assert kfac.metrics["coarse/decrease"] > 0
    result = flat_gradient(model)
    kfac.close()
    return result


WHOLE = [torch.arange(12)]
SPACES = [name for name in coarse_spaces if name != "spectral"]


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("space", [*SPACES, "spectral"])
def test_micro_batches_equal_the_big_batch(space: str, fisher: str) -> None:
    config = CoarseConfig(space=space, vectors_per_layer=2 if coarse_spaces[space].variable_count else 1)
    for name in ("mlp-categorical", "cnn"):
        wanted = window(ALL[name], WHOLE, fisher, config)
        for parts in (torch.arange(12).split(6), torch.arange(12).split([5, 1, 6])):
            assert relative(window(ALL[name], parts, fisher, config), wanted) < 1e-10


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("space", ["layer_step", "layer_step_residual", "nicolaides", "residual"])
def test_masked_samples_count_nowhere(space: str, fisher: str) -> None:
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1]).bool()
    for name in ("mlp-categorical", "cnn"):
        case = ALL[name]
        wanted = window(case, [torch.arange(12)[mask]], fisher, space)
        assert relative(window(case, WHOLE, fisher, space, masks=[mask]), wanted) < 1e-10


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_masked_positions_equal_shorter_sequences(fisher: str) -> None:
    case, mask = ALL["sequences"], (torch.arange(6) < 4).expand(12, 6)
    shorter = Case(case.build, case.x[..., :4], case.y[..., :4], case.likelihood)
    for space in ("layer_step", "nicolaides", "layer_step_residual"):
        wanted = window(shorter, WHOLE, fisher, space)
        assert relative(window(case, WHOLE, fisher, space, masks=[mask]), wanted) < 1e-10


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize(("reduction", "scale"), [("mean_all", 1 / 3), (0.25, 0.25), ("sum", 12.0)])
def test_the_form_of_the_loss_does_not_matter(reduction: str | float, scale: float, fisher: str) -> None:
    """Everything is in units of the mean form, also in a window of two micro-batches and with ``grad_scale``."""
    case = ALL["mlp-bernoulli"]
    for space in ("layer_step", "nicolaides", "layer_step_residual"):
        wanted = window(case, WHOLE, fisher, space)
        found = window(case, WHOLE, fisher, space, scale=scale, loss_reduction=reduction)
        assert relative(found, wanted) < 1e-10
        # Two micro-batches: sums add up, means are divided by two.
        parts, scale_2 = torch.arange(12).split(6), 6.0 if reduction == "sum" else scale
        divisor = 1.0 if reduction == "sum" else None
        found = window(case, parts, fisher, space, scale=scale_2, divisor=divisor, loss_reduction=reduction)
        assert relative(found, wanted) < 1e-10


def test_a_gradient_scaler_leaves_the_coarse_level_alone() -> None:
    """The empirical Fisher sees scaled gradients in the backward, ``step`` unscaled ones."""
    case, found = ALL["mlp-categorical"], []
    for scale in (1.0, 1024.0):
        model = case.model()
        kfac = KFACPreconditioner(model, likelihood="empirical", coarse="nicolaides")
        (scale * case.loss(model(case.x), case.y)).backward()
        for p in model.parameters():
            p.grad /= scale
        kfac.step(grad_scale=scale)
        found.append(flat_gradient(model))
    assert relative(*found) < 1e-12


class TwoTypes(nn.Module):
    """A float32 layer before a float64 one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.to(self.first.weight.dtype))).to(self.last.weight.dtype))


@pytest.mark.parametrize("space", list(coarse_spaces))
def test_layers_of_unlike_types(space: str) -> None:
    """The coarse level works in the wider one, and the result is that of the float64 model up to float32."""

    def direction(model: nn.Module) -> Tensor:
        config = CoarseConfig(space=space, damping=0.3, max_samples=None)
        kfac = KFACPreconditioner(model, "categorical", coarse=config, damping=0.1, seed=3)
        case = ALL["mlp-categorical"]
        for _ in range(2):
            model.zero_grad()
            logits = model(case.x)
            kfac.accumulate()
            case.loss(logits, case.y).backward()
            kfac.step()
        assert kfac.metrics["coarse/failures"] == 0
        kfac.close()
        return flat_gradient(model)

    assert relative(direction(TwoTypes()).double(), direction(TwoTypes().double())) < 1e-4
