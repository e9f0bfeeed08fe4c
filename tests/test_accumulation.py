"""Factors are sums over samples: how these lie in micro-batches, in what order and how often does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist import KFACPreconditioner
from kfac_dist.draws import default_sample_ids
from tests.helpers.cases import Case, cases

TOLERANCE = 1e-11
ALL = cases()
FISHERS = ("true", "empirical")


class Result:
    """``.grad`` after the step, and the factors."""

    def __init__(self, kfac: KFACPreconditioner) -> None:
        self.gradients = {name: p.grad.clone() for name, p in kfac.model.named_parameters()}
        layers = kfac.state_dict()["layers"]
        self.locations = {name: layer["factors"]["locations"] for name, layer in layers.items()}
        factors = {(name, side): layer["factors"][side] for name, layer in layers.items() for side in "AG"}
        self.factors = {key: factor for key, factor in factors.items() if factor is not None}  # norms have one

    def assert_equal(self, other: Result, gradient_scale: float = 1.0) -> None:
        assert self.locations == pytest.approx(other.locations, rel=1e-12)
        for name, factor in other.factors.items():
            assert factor.abs().max() > 0, name
            assert torch.linalg.norm(self.factors[name] - factor) <= TOLERANCE * torch.linalg.norm(factor), name
        for name, gradient in other.gradients.items():
            found = self.gradients[name] * gradient_scale
            assert torch.linalg.norm(found - gradient) <= TOLERANCE * torch.linalg.norm(gradient), name


def window(
    case: Case,
    parts: Sequence[Tensor],
    fisher: str = "true",
    divisor: float | None = None,
    masks: Sequence[Tensor | None] | None = None,
    inputs: Sequence[tuple[Tensor, Tensor]] | None = None,
    ids: Sequence[Tensor] | None = None,
    **options: Any,
) -> Result:
    """One optimizer step over micro-batches: the samples ``parts``, each with its mean loss over what is not masked.

    The mean losses are divided by ``divisor``; by default by what makes their sum the mean over the window.
    """
    model = case.model()
    likelihood = "empirical" if fisher == "empirical" else case.likelihood
    kfac = KFACPreconditioner(model, likelihood=likelihood, seed=3, damping=0.05, uncovered="diagonal", **options)
    total = sum(len(part) for part in parts)
    for number, part in enumerate(parts):
        x, y = inputs[number] if inputs else (case.x[part], case.y[part])
        mask = masks[number] if masks else None
        by = divisor if divisor is not None else total / len(part)
        logits = model(x)
        kfac.accumulate(sample_ids=part if ids is None else ids[number], mask=mask, loss_divisor=by)
        (masked_loss(case, logits, y, mask) / by).backward()
    kfac.step()
    result = Result(kfac)
    kfac.close()
    return result


def masked_loss(case: Case, logits: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over unmasked targets, over the number of samples that have one."""
    if mask is None:
        return case.sum_loss(logits, y) / len(y)
    if mask.dim() == 1:
        return case.sum_loss(logits[mask], y[mask]) / mask.sum()
    keep = mask.flatten()  # (B, S) of logits (B, classes, S)
    return case.sum_loss(logits.mT.flatten(0, 1)[keep], y.flatten()[keep]) / mask.any(1).sum()


WHOLE = [torch.arange(12)]


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", ALL)
def test_micro_batches_equal_the_big_batch(name: str, fisher: str) -> None:
    case = ALL[name]
    wanted = window(case, WHOLE, fisher)
    window(case, torch.arange(12).split(4), fisher, divisor=3).assert_equal(wanted)
    window(case, torch.arange(12).split([5, 1, 6]), fisher).assert_equal(wanted)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
def test_a_short_window_has_the_same_factors_and_a_smaller_gradient(name: str, fisher: str) -> None:
    """The loss is still divided by 4 when the epoch ends after 2 micro-batches."""
    case = ALL[name]
    short = window(case, torch.arange(12).split(6), fisher, divisor=4)
    short.assert_equal(window(case, WHOLE, fisher), gradient_scale=2.0)


@pytest.mark.parametrize("reduction", ["mean", "mean_all", "sum"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_trap_13_factors_do_not_shrink_with_the_batch(fisher: str, reduction: str) -> None:
    """The same samples three times over are the same distribution: A, G and the direction stay what they were."""
    case = ALL["mlp-bernoulli"]

    def repeated(times: int) -> Result:
        model = case.model()
        likelihood = "empirical" if fisher == "empirical" else case.likelihood
        kfac = KFACPreconditioner(model, likelihood=likelihood, seed=3, loss_reduction=reduction)
        x, y = case.x.repeat(times, 1), case.y.repeat(times, 1)
        logits = model(x)
        kfac.accumulate(sample_ids=torch.arange(12).repeat(times))
        (case.sum_loss(logits, y) / {"mean": len(x), "mean_all": y.numel(), "sum": 1}[reduction]).backward()
        kfac.step()
        return Result(kfac)

    once = repeated(1)
    repeated(3).assert_equal(once)
    # And at the scale of one sample's gradient: the last layer's G is the covariance of p - y, at most 1/4 or 1 each.
    largest = once.factors["4", "G"].diagonal(dim1=-2, dim2=-1).max()
    assert 0.1 < largest < 1.0


@pytest.mark.parametrize("fisher", [*FISHERS, "exact"])
@pytest.mark.parametrize("name", ALL)
def test_masked_samples_count_nowhere(name: str, fisher: str) -> None:
    case, options = ALL[name], {"fisher_samples": "exact"} if fisher == "exact" else {}
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1]).bool()
    wanted = window(case, [torch.arange(12)[mask]], fisher, **options)
    window(case, WHOLE, fisher, masks=[mask], **options).assert_equal(wanted)


def test_mean_all_counts_only_unmasked_elements() -> None:
    case = ALL["mlp-bernoulli"]
    mask = torch.arange(12) % 3 > 0
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood="bernoulli", loss_reduction="mean_all", seed=3, damping=0.05)
    logits = model(case.x)
    kfac.accumulate(sample_ids=torch.arange(12), mask=mask)
    (case.sum_loss(logits[mask], case.y[mask]) / case.y[mask].numel()).backward()
    kfac.step()
    assert kfac.metrics["loss_scale"] == pytest.approx(1 / 3)
    Result(kfac).assert_equal(window(case, [torch.arange(12)[mask]]))


@pytest.mark.parametrize("fisher", FISHERS)
def test_masked_positions_equal_shorter_sequences(fisher: str) -> None:
    case = ALL["sequences"]
    mask = (torch.arange(6) < 4).expand(12, 6)
    shorter = Case(case.build, case.x[..., :4], case.y[..., :4], case.likelihood)
    window(case, WHOLE, fisher, masks=[mask]).assert_equal(window(shorter, WHOLE, fisher))


@pytest.mark.parametrize("fisher", FISHERS)
def test_ragged_sequences_equal_one_sample_at_a_time(fisher: str) -> None:
    """Padding to the longest, with a mask, against micro-batches of one sequence of its own length each."""
    case = ALL["sequences"]
    lengths = [6, 1, 3, 0, 5, 2, 6, 4, 0, 3, 3, 1]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    kept = [(number, length) for number, length in enumerate(lengths) if length]
    parts = [torch.tensor([number]) for number, _ in kept]
    inputs = [(case.x[n : n + 1, :, :length], case.y[n : n + 1, :length]) for n, length in kept]
    wanted = window(case, parts, fisher, inputs=inputs)
    window(case, WHOLE, fisher, masks=[mask]).assert_equal(wanted)


@pytest.mark.parametrize("name", ["mlp-categorical", "mlp-gaussian", "cnn", "sequences"])
def test_order_of_samples_does_not_matter_but_their_ids_do(name: str) -> None:
    case = ALL[name]
    wanted = window(case, WHOLE)
    order = torch.tensor([7, 2, 11, 0, 4, 9, 1, 3, 10, 5, 8, 6])
    window(case, [order]).assert_equal(wanted)
    window(case, order.split([3, 9])).assert_equal(wanted)
    other = window(case, WHOLE, ids=[torch.arange(12) + 1])
    last = max(layer for layer, _ in wanted.factors)
    assert torch.equal(other.factors[last, "A"], wanted.factors[last, "A"])
    assert not torch.allclose(other.factors[last, "G"], wanted.factors[last, "G"], rtol=1e-3)


@pytest.mark.parametrize("name", ["mlp-categorical", "mlp-bernoulli", "mlp-gaussian"])
def test_draws_converge_to_the_exact_expectation(name: str) -> None:
    case = ALL[name]
    exact = window(case, WHOLE, fisher_samples="exact").factors["2", "G"]
    few = window(case, WHOLE, fisher_samples=2).factors["2", "G"]
    many = window(case, WHOLE, fisher_samples=300).factors["2", "G"]
    error = torch.linalg.norm(many - exact) / torch.linalg.norm(exact)
    assert 1e-6 < error < 0.05  # about 1 / sqrt(12 * 300)
    assert torch.linalg.norm(few - exact) > 2 * torch.linalg.norm(many - exact)


def test_default_ids_are_unique_over_ranks_and_micro_batches() -> None:
    ids = [default_sample_ids(rank, micro, 5, torch.device("cpu")) for rank in (0, 1, 1023) for micro in (0, 1, 999)]
    assert len(torch.cat(ids).unique()) == 45


def test_without_ids_two_micro_batches_draw_different_targets() -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood="categorical", seed=3)
    for _ in range(2):
        logits = model(case.x)
        kfac.accumulate(loss_divisor=2)
        (case.loss(logits, case.y) / 2).backward()
    kfac.step()
    found = Result(kfac).factors["4", "G"]
    assert not torch.allclose(found, window(case, WHOLE, ids=[torch.arange(12)]).factors["4", "G"], rtol=1e-3)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("reduction", ["mean", "mean_all"])
def test_a_gradient_scaler_changes_nothing(fisher: str, reduction: str) -> None:
    """The loss is multiplied, the gradients are unscaled before the step, and ``grad_scale`` says by what."""
    case, results = ALL["mlp-bernoulli"], []
    for scale in (1.0, 1024.0):
        model = case.model()
        likelihood = "empirical" if fisher == "empirical" else case.likelihood
        kfac = KFACPreconditioner(model, likelihood=likelihood, seed=3, loss_reduction=reduction)
        for part in torch.arange(12).split(6):
            logits = model(case.x[part])
            kfac.accumulate(sample_ids=part, loss_divisor=2)
            size = len(part) if reduction == "mean" else case.y[part].numel()
            (scale * case.sum_loss(logits, case.y[part]) / size / 2).backward()
        for p in model.parameters():
            p.grad /= scale
        kfac.step(grad_scale=scale)
        results.append(Result(kfac))
    results[1].assert_equal(results[0])


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_sum_that_was_divided_has_the_direction_of_the_mean(fisher: str) -> None:
    """As a Trainer divides it by the accumulated micro-batches; directions are in units of the mean loss."""
    case = ALL["mlp-categorical"]
    model = case.model()
    likelihood = "empirical" if fisher == "empirical" else case.likelihood
    kfac = KFACPreconditioner(model, likelihood=likelihood, seed=3, damping=0.05, loss_reduction="sum")
    for part in torch.arange(12).split(4):
        logits = model(case.x[part])
        kfac.accumulate(sample_ids=part, loss_divisor=3)
        (case.sum_loss(logits, case.y[part]) / 3).backward()
    kfac.step()
    assert kfac.metrics["loss_scale"] == pytest.approx(12 / 3)
    Result(kfac).assert_equal(window(case, WHOLE, fisher))
