"""What the hooks record, what they ignore, and that they go away."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from kfac_dist.capture import Call
from tests.helpers.cases import cnn, mlp

FISHERS = ("categorical", "empirical")
X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def nothing(model: nn.Module) -> None:
    pass


def step(
    likelihood: str,
    before: Callable[[nn.Module], Any] = nothing,
    early: Callable[[nn.Module], Any] = nothing,
    late: Callable[[nn.Module], Any] = nothing,
) -> list[Tensor]:
    """Factors and gradients of a step; disturbed before its forward, before accumulate() and after the backward."""
    model = net()
    kfac = KFACPreconditioner(model, likelihood=likelihood)
    before(model)
    logits = model(X)
    early(model)
    kfac.accumulate(sample_ids=torch.arange(8))
    F.cross_entropy(logits, Y).backward()
    late(model)
    kfac.step()
    layers = kfac.state_dict()["layers"].values()
    result = [layer["factors"][side] for layer in layers for side in "AG"] + [p.grad for p in model.parameters()]
    kfac.close()
    return result


def validate(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(torch.full((3, 5), 100.0))
    with torch.inference_mode():
        model(torch.full((3, 5), 100.0))
    model.train()


def copy_and_train(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    other(torch.full((3, 5), 100.0)).sum().backward()


@pytest.mark.parametrize("likelihood", FISHERS)
@pytest.mark.parametrize("disturb", [validate, copy_and_train, lambda model: model.eval()])
def test_other_forwards_are_ignored(likelihood: str, disturb: Callable[[nn.Module], Any]) -> None:
    """Validation in mid-window, a copy of the model at work, modules in evaluation mode."""
    wanted = step(likelihood)
    for when in ("before", "early", "late"):
        found = step(likelihood, **{when: disturb})
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("likelihood", FISHERS)
def test_a_loss_that_was_skipped_can_be_forgotten(likelihood: str) -> None:
    model = net()
    kfac = KFACPreconditioner(model, likelihood=likelihood)
    model(torch.full((8, 5), 100.0))
    kfac.forget()
    logits = model(X)
    kfac.accumulate(sample_ids=torch.arange(8))
    F.cross_entropy(logits, Y).backward()
    kfac.step()
    layers = kfac.state_dict()["layers"].values()
    found = [layer["factors"][side] for layer in layers for side in "AG"] + [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, step(likelihood), strict=True))


@pytest.mark.parametrize("likelihood", FISHERS)
@pytest.mark.parametrize("build", [mlp, cnn])
def test_close_removes_every_hook_and_may_be_called_again(likelihood: str, build: Callable[[], nn.Module]) -> None:
    model = build()
    before = hooks(model)
    model.register_forward_hook(lambda *args: None)  # somebody else's stays
    kfac = KFACPreconditioner(model, likelihood=likelihood)
    assert hooks(model) > before + 1
    kfac.close()
    kfac.close()
    assert hooks(model) == before + 1
    second = KFACPreconditioner(model, likelihood=likelihood)
    second.close()
    assert hooks(model) == before + 1


@pytest.mark.parametrize("likelihood", FISHERS)
def test_after_close_in_mid_window_training_goes_on_by_itself(likelihood: str) -> None:
    model = net()
    kfac = KFACPreconditioner(model, likelihood=likelihood)
    logits = model(X)
    kfac.close()
    F.cross_entropy(logits, Y).backward()
    found = [p.grad for p in model.parameters()]
    model = net()
    F.cross_entropy(model(X), Y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


@pytest.mark.parametrize("likelihood", FISHERS)
def test_two_preconditioners_one_after_the_other_on_one_model(likelihood: str) -> None:
    model = net()
    KFACPreconditioner(model, likelihood=likelihood).close()
    kfac = KFACPreconditioner(model, likelihood=likelihood)
    logits = model(X)
    kfac.accumulate(sample_ids=torch.arange(8))
    F.cross_entropy(logits, Y).backward()
    kfac.step()
    assert kfac.metrics["factor_updates"] == 1


@pytest.mark.parametrize("likelihood", FISHERS)
def test_graphs_are_not_kept_alive(likelihood: str) -> None:
    """After accumulate and backward, and on steps without a factor update, nothing holds the activations."""
    model = net()
    kfac = KFACPreconditioner(model, likelihood=likelihood, factor_every_n_steps=2)
    for number in range(4):
        model.zero_grad()
        hidden: list[weakref.ref] = []
        handle = model[1].register_forward_hook(lambda module, args, out: hidden.append(weakref.ref(out)))  # noqa: B023
        logits = model(X)
        handle.remove()
        kfac.accumulate()
        F.cross_entropy(logits, Y).backward()
        del logits
        if number % 2 == 0:
            kfac.step()
        gc.collect()
        assert hidden[0]() is None, number
        if number % 2:
            kfac.step()


class Keywords(nn.Module):
    """The layer gets its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=torch.tanh(self.net(input=x)))


def test_inputs_by_name() -> None:
    model = Keywords()
    kfac = KFACPreconditioner(model, likelihood="categorical")
    model(X)
    kfac.accumulate()
    model(X).sum().backward()
    kfac.step()
    factor = kfac.state_dict()["layers"]["net"]["factors"]["A"]
    rows = torch.cat([X, torch.ones(8, 1)], 1)
    assert torch.allclose(factor[0], rows.T @ rows / 8, rtol=1e-5)


def test_names_without_the_segments_of_wrappers() -> None:
    class OptimizedModule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    model = nn.Sequential(nn.Linear(5, 4), OptimizedModule(nn.Linear(4, 3)))
    assert [layer.name for layer in KFACPreconditioner(model, "gaussian").layers] == ["0", "1"]
    kfac = KFACPreconditioner(OptimizedModule(net()), "gaussian")
    assert [layer.name for layer in kfac.layers] == ["0", "2", "4"]


def test_parameter_groups_hold_every_trainable_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)  # a frozen bias beside a trained weight
    model[2].requires_grad_(False)
    kfac = KFACPreconditioner(model, "gaussian", skip_layers=("^4$", "Norm"))
    covered, rest = kfac.parameter_groups(lr=1.0, uncovered_lr=0.1, uncovered_momentum=0.9)
    assert (covered["lr"], covered["momentum"], rest["lr"], rest["momentum"]) == (1.0, 0.0, 0.1, 0.9)
    assert [id(p) for p in covered["params"]] == [id(p) for p in (model[0].weight, *model[3].parameters())]
    assert [id(p) for p in rest["params"]] == [id(p) for p in (*model[1].parameters(), *model[4].parameters())]
    together = [id(p) for group in (covered, rest) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.SGD([covered, rest], lr=0.5)  # an optimizer takes them
    (only,) = KFACPreconditioner(net(), "gaussian").parameter_groups(1.0, 0.1)
    assert len(only["params"]) == 5


@pytest.mark.parametrize("likelihood", FISHERS)
@pytest.mark.parametrize("trained", [True, False])
def test_activations_and_graphs_are_freed_at_once(
    likelihood: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector, which sees no cycle through a graph; also of forwards that no backward follows."""
    inputs: list[weakref.ref] = []

    def spy(layer: Any, x: Tensor, *more: Any) -> Call:
        inputs.append(weakref.ref(x))
        return Call(layer, x, *more)

    monkeypatch.setattr("kfac_dist.capture.Call", spy)
    model = net()
    kfac = KFACPreconditioner(model, likelihood=likelihood, factor_every_n_steps=1)
    gc.disable()
    try:
        for _ in range(3):
            loss = F.cross_entropy(model(X), Y)
            if trained:
                kfac.accumulate()
                loss.backward()
                kfac.step()
            else:
                kfac.forget()
            del loss
        assert len(inputs) == 3 * len(kfac.layers)
        assert not [ref for ref in inputs if ref() is not None]
    finally:
        gc.enable()
    kfac.close()
