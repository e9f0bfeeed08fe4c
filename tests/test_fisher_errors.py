"""What the sampled-target pass cannot work with, and how it says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from tests.helpers.cases import mlp


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


class Ends(nn.Module):
    """A function at the end that no module stands for."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.last = nn.Linear(5, 3), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


def attempt(model: nn.Module, **options: object) -> None:
    kfac = KFACPreconditioner(model, **options)  # type: ignore[arg-type]
    try:
        model(torch.randn(4, 5))
        kfac.accumulate()
    finally:
        kfac.close()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Dictionary(), {"likelihood": "categorical"}, r"returned dict.*output_module to one of.* net"),
        (nn.Linear(5, 3), {"likelihood": "categorical", "class_dim": 2}, r"class_dim=2: return \(B, classes"),
        (nn.Linear(5, 3), {"likelihood": "categorical", "class_dim": -2}, r"no class dimension class_dim=-2"),
        (nn.Linear(5, 1), {"likelihood": "categorical"}, r"have 1 class along class_dim=1.*likelihood=\"bernoulli\""),
        (Ends(torch.sigmoid), {"likelihood": "bernoulli"}, r"wants logits.*Sigmoid: remove it"),
        (Ends(lambda z: z.softmax(1)), {"likelihood": "categorical"}, r"wants logits.*Softmax: remove it"),
        (Ends(lambda z: z.flatten()[0]), {"likelihood": "gaussian"}, r"returned Tensor of shape \(\)"),
        (Ends(lambda z: z.sum()), {"likelihood": "bernoulli"}, r"returned Tensor of shape \(\)"),
        (
            Ends(lambda z: torch.complex(z, z)),
            {"likelihood": "bernoulli"},
            r"torch.complex64: need a floating \(B, \.\.",
        ),
        (nn.Linear(5, 5000), {"likelihood": "gaussian", "fisher_samples": "exact"}, r"5000 backward.*fisher_samples=1"),
    ],
)
def test_outputs_that_are_no_logits(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempt(model, **options)


@pytest.mark.parametrize(
    ("last", "likelihood"),
    [(nn.Sigmoid(), "bernoulli"), (nn.Softmax(1), "categorical"), (nn.LogSigmoid(), "bernoulli")],
)
def test_a_normalising_module_at_the_output_is_refused_at_once(last: nn.Module, likelihood: str) -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.Sequential(nn.Identity(), last))
    with pytest.raises(ValueError, match=rf"likelihood='{likelihood}' wants logits.*{type(last).__name__}"):
        KFACPreconditioner(net, likelihood=likelihood)
    attempt(net, likelihood=likelihood, output_module="0")  # the cure
    attempt(net, likelihood=likelihood, output_module=net[0])


def test_log_probabilities_are_logits_of_a_categorical() -> None:
    attempt(Ends(lambda z: z.log_softmax(1)), likelihood="categorical")


def test_order_of_the_calls() -> None:
    model, x = mlp(), torch.randn(4, 5)
    kfac = KFACPreconditioner(model, likelihood="categorical")
    with pytest.raises(RuntimeError, match="found no forward pass: call it after the model's forward"):
        kfac.accumulate()
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError, match=r"found no forward pass.*with gradients enabled"):
        kfac.accumulate()
    F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match=r"Call accumulate\(\) after the forward and BEFORE loss.backward\(\)"):
        kfac.accumulate()
    with pytest.raises(RuntimeError, match=r"no rank accumulated a sample.*call kfac.accumulate\(\)"):
        kfac.step()
    F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long))
    kfac.accumulate()
    kfac.step()  # all is well again


def test_running_out_of_memory_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    kfac = KFACPreconditioner(model, likelihood="categorical")
    model(torch.randn(4, 5))
    error = torch.OutOfMemoryError("tried to allocate 20 GiB")

    def full(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        kfac.accumulate()
    assert caught.value is error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_ids": torch.arange(3)}, r"sample_ids of shape \(3,\).*need \(4,\) integers"),
        ({"sample_ids": torch.zeros(4)}, r"torch.float32: need \(4,\) integers"),
        ({"sample_ids": torch.zeros(4, 1, dtype=torch.long)}, r"sample_ids of shape \(4, 1\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask of shape \(3,\) does not match targets of shape \(4,\)"),
        ({"mask": torch.ones(4, 3, dtype=torch.bool)}, r"mask of shape \(4, 3\)"),
        ({"mask": torch.tensor(True)}, r"mask of shape \(\)"),
    ],
)
def test_shapes_of_ids_and_mask(arguments: dict, message: str) -> None:
    model = nn.Linear(5, 3)
    kfac = KFACPreconditioner(model, likelihood="categorical")
    model(torch.randn(4, 5))
    with pytest.raises(ValueError, match=message):
        kfac.accumulate(**arguments)


def scale_warnings(
    likelihood: str, reduction: str | float, loss: Callable[[Tensor, Tensor], Tensor], outputs: int
) -> list:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))
    x = torch.randn(32, 5)
    y = torch.randint(0, outputs, (32,)) if likelihood == "categorical" else torch.rand(32, outputs).round()
    kfac = KFACPreconditioner(model, likelihood=likelihood, loss_reduction=reduction)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            logits = model(x)
            kfac.accumulate()
            loss(logits, y).backward()
            kfac.step()
    return [str(w.message) for w in caught if "output gradients of the training loss" in str(w.message)]


def class_dim_warnings(class_dim: int, shape: tuple[int, ...], loss: Callable[[Tensor], Tensor]) -> list[str]:
    torch.manual_seed(0)
    model = nn.Linear(5, shape[-1])
    kfac = KFACPreconditioner(model, likelihood="categorical", class_dim=class_dim, loss_reduction="mean_all")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            logits = model(torch.randn(*shape[:-1], 5))
            kfac.accumulate()
            loss(logits).backward()
            kfac.step()
    kfac.close()
    return [str(w.message) for w in caught]


def over_the_last(logits: Tensor, **options: float) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, torch.arange(len(flat)) % flat.shape[1], **options)


def test_classes_in_another_dimension_than_the_loss_has_them_are_named() -> None:
    (message,) = class_dim_warnings(1, (4, 6, 7), over_the_last)  # logits.view(-1, 7), and nothing said of class_dim
    assert "sums to zero along dimension 2 of the 3 of the logits" in message
    assert message.endswith("not along class_dim=1: set class_dim=2")
    assert class_dim_warnings(1, (4, 6, 7), lambda z: over_the_last(z, label_smoothing=0.1))
    for class_dim in (2, -1):
        assert class_dim_warnings(class_dim, (4, 6, 7), over_the_last) == []
    assert class_dim_warnings(1, (4, 7), over_the_last) == []
    assert class_dim_warnings(1, (4, 6, 7), lambda z: F.cross_entropy(z, torch.arange(28).view(4, 7) % 6)) == []


def test_a_loss_on_another_scale_than_its_likelihood_is_named_once() -> None:
    caught = scale_warnings("bernoulli", "mean", nn.BCEWithLogitsLoss(), 784)
    assert len(caught) == 1
    assert "are 0.0013" in caught[0]  # about 1 / 784
    assert 'loss_reduction="mean_all"' in caught[0]
    assert scale_warnings("categorical", "mean", nn.CrossEntropyLoss(reduction="sum"), 3)


@pytest.mark.parametrize(
    ("likelihood", "reduction", "loss", "outputs"),
    [
        ("bernoulli", "mean_all", nn.BCEWithLogitsLoss(), 784),
        ("bernoulli", "mean", lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z), 784),
        ("bernoulli", "sum", nn.BCEWithLogitsLoss(reduction="sum"), 20),
        ("categorical", "mean", nn.CrossEntropyLoss(), 10),
        ("gaussian", "mean_all", nn.MSELoss(), 50),
        ("gaussian", 0.01, lambda z, y: 0.005 * (z - y).square().sum(1).mean(), 50),
    ],
)
def test_no_warning_for_a_loss_that_is_declared(likelihood: str, reduction: str, loss: Callable, outputs: int) -> None:
    assert scale_warnings(likelihood, reduction, loss, outputs) == []
