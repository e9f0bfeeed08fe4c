from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_dist.study import DeepLinear, PlantedLinear


def test_the_network_is_linear_and_its_loss_half_the_squared_error_of_a_sample() -> None:
    torch.manual_seed(0)
    model = DeepLinear(width=6, depth=4).double()
    assert [type(layer) for layer in model.net] == [nn.Linear] * 4
    x, y = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x - 2 * y), model(x) - 2 * model(y) + 2 * model(torch.zeros_like(x)))
    W = torch.linalg.multi_dot([layer.weight for layer in reversed(model.net)])
    torch.testing.assert_close(model(x), x @ W.T)
    seen = {}
    model.log_means = lambda values, prefix, count: seen.update(values, prefix=prefix, count=count)
    loss = model.loss((x, y), "val_")
    assert loss.item() == pytest.approx((0.5 * ((x @ W.T - y) ** 2).sum(1).mean()).item())
    assert seen["squared_error"].item() == pytest.approx(loss.item() / 6)
    assert (seen["prefix"], seen["count"]) == ("val_", 9)


def test_signals_keep_their_size_through_the_depth() -> None:
    torch.manual_seed(0)
    outputs = [DeepLinear()(torch.randn(500, 20)).square().mean().item() for _ in range(30)]
    assert 0.3 < sum(outputs) / 30 < 3


def test_the_target_can_be_learned_up_to_the_noise() -> None:
    data = PlantedLinear(noise=0.1)
    (x, y), (x_val, y_val) = data.load()
    assert (x.shape, y.shape, x_val.shape, y_val.shape) == ((4096, 20), (4096, 20), (512, 20), (512, 20))
    assert y.var().item() == pytest.approx(1, rel=0.3)
    W = torch.linalg.lstsq(x, y).solution
    assert 0.5 * (x_val @ W - y_val).square().mean().item() == pytest.approx(0.005, rel=0.05)
    again, other = PlantedLinear(noise=0.1).load()[0], PlantedLinear(noise=0.1, seed=1).load()[0]
    assert torch.equal(again[1], y)
    assert not torch.equal(other[1], y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepLinear(depth=0), "width=20, depth=0: both must be at least 1"),
        (lambda: PlantedLinear(width=0), "width=0, train_samples=4096"),
        (lambda: PlantedLinear(noise=-1.0), "noise=-1.0 must be at least 0"),
    ],
)
def test_sizes_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
