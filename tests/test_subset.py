"""``factor_samples``: factors of a share of the samples, chosen by their ids, unbiased, the same on any ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from kfac_dist.draws import uniforms
from kfac_dist.statistics import MicroBatch
from kfac_dist.subset import Subset
from tests.helpers.cases import cases
from tests.helpers.training import layer_states

SHARE, SEED = 0.5, 3


def factors(
    case: Any, mask: Tensor | None = None, fisher: str = "true", **options: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Layer -> the factors of one batch; and ``param.grad`` after the step."""
    model = case.model()
    likelihood = "empirical" if fisher == "empirical" else case.likelihood
    kfac = KFACPreconditioner(model, likelihood, **({"seed": SEED, "damping": 0.1} | options))
    logits = model(case.x)
    kfac.accumulate(sample_ids=torch.arange(len(case.x)), mask=mask)
    loss = case.sum_loss(logits, case.y)
    (loss if options.get("loss_reduction") == "sum" else loss / len(case.x)).backward()
    kfac.step()
    found = {name: state.factors for name, state in layer_states(kfac).items()}
    kfac.close()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def chosen(size: int, seed: int = SEED) -> Tensor:
    taken = Subset.of(MicroBatch(0, size, float(size), float(size)), SHARE, seed, 0, torch.arange(size))
    assert taken.places is not None
    mask = torch.zeros(size, dtype=torch.bool)
    mask[taken.places] = True
    return mask


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn", "sequences", "tokens", "norms", "attention", "recurrent"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_the_factors_are_those_of_the_chosen_samples(name: str, approximation: str) -> None:
    case = cases()[name]
    mask = chosen(len(case.x))
    assert 0 < mask.sum() < len(mask)
    found, _ = factors(case, factor_samples=SHARE, kfac_approx=approximation)
    wanted, _ = factors(case, mask=mask, kfac_approx=approximation)
    for layer, pair in wanted.items():
        assert found[layer].locations == pytest.approx(pair.locations, rel=1e-12)
        for side, factor in pair.sides().items():
            difference = (found[layer].sides()[side] - factor).abs().max()
            assert difference <= 1e-12 * factor.abs().max(), (layer, side)


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_their_mean_is_the_factor_of_all_samples(fisher: str) -> None:
    """Over many seeds, within 5 standard errors in every entry; the draws of targets are averaged as well."""
    case, runs = cases()["cnn"], 150
    draws = {} if fisher == "empirical" else {"fisher_samples": "exact"}
    found = [factors(case, None, fisher, factor_samples=SHARE, seed=seed, **draws)[0] for seed in range(runs)]
    wanted, _ = factors(case, None, fisher, **draws)
    for layer, pair in wanted.items():
        for side, factor in pair.sides().items():
            each = torch.stack([one[layer].sides()[side] for one in found])
            error = each.std(0) / runs**0.5
            assert ((each.mean(0) - factor).abs() <= 5 * error + 1e-12 * factor.abs().max()).all(), (layer, side)
            assert error.max() > 0


def test_the_choice_depends_on_seed_step_and_id_alone() -> None:
    ids = torch.tensor([7, 3, 11, 2, 5, 13, 17, 19])

    def taken(ids: Tensor, seed: int = 0, step: int = 0) -> set[int]:
        places = Subset.of(MicroBatch(0, len(ids), 8.0, 8.0), SHARE, seed, step, ids).places
        assert places is not None
        return set(ids[places].tolist())

    assert taken(ids) == taken(ids.flip(0)) == taken(ids[:3]) | taken(ids[3:])
    many = torch.arange(2000)
    assert len(taken(many)) == pytest.approx(1000, abs=100)
    assert len(taken(many) & taken(many, seed=1)) == pytest.approx(500, abs=100)
    assert len(taken(many) & taken(many, step=1)) == pytest.approx(500, abs=100)
    drawn = set((uniforms(0, 0, 0, many, 1)[:, 0] < SHARE).nonzero()[:, 0].tolist())
    assert len(taken(many) & drawn) == pytest.approx(500, abs=100)  # nor is it the first draw of the targets


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_the_form_of_the_loss_does_not_matter(fisher: str) -> None:
    case = cases()["mlp-categorical"]
    _, mean = factors(case, None, fisher, factor_samples=SHARE)
    _, total = factors(case, None, fisher, factor_samples=SHARE, loss_reduction="sum")
    for name, gradient in mean.items():
        assert (total[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max()


def test_a_step_that_takes_no_sample_keeps_the_gradient_and_the_next_one_tries_again() -> None:
    case = cases()["mlp-categorical"]
    model = case.model()
    kfac = KFACPreconditioner(model, case.likelihood, factor_samples=1e-9, factor_every_n_steps=100)
    for _ in range(2):
        model.zero_grad()
        logits = model(case.x)
        kfac.accumulate()
        case.loss(logits, case.y).backward()
        before = [p.grad.clone() for p in model.parameters()]
        kfac.step()
        assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
        assert all(state.updates == 0 for state in layer_states(kfac).values())


class Positions(nn.Module):
    """Adds the same vectors, of one call without a batch dimension, to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.positions(torch.arange(4))).mean(1))


def test_an_output_that_samples_share_is_refused() -> None:
    model = Positions()
    kfac = KFACPreconditioner(model, "categorical", factor_samples=SHARE)
    model(torch.randn(8, 4, 5))
    with pytest.raises(ValueError, match=r"'positions' has an input of shape \(4,\).* for 8 samples.*factor_samples=1"):
        kfac.accumulate()
