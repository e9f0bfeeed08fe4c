"""Windows of micro-batches, masks, forms of the loss and types of layers: they do not change the coarse level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import relative
from tests.helpers.dense_coarse import flat_gradient
from tests.test_accumulation import masked_loss

ALL = cases()


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


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("space", list(coarse_spaces))
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
