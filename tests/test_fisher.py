"""The sampled-target pass changes nothing that it should not, in every kind of graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from kfac_dist import KFACPreconditioner
from tests.helpers.cases import Shared, mlp


class Checkpointed(nn.Module):
    """The first half is computed again in the backward, dropout included."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.body, x, use_reentrant=self.reentrant)))


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))


VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "dropout": (dropout_net, {"likelihood": "categorical"}),
    "draws": (dropout_net, {"likelihood": "bernoulli", "fisher_samples": 3}),
    "exact": (dropout_net, {"likelihood": "gaussian", "fisher_samples": "exact"}),
    "batch norm": (norm_net, {"likelihood": "categorical", "skip_layers": "BatchNorm"}),
    "in place": (mlp, {"likelihood": "categorical"}),
    "shared": (Shared, {"likelihood": "categorical"}),
    "checkpoint": (Checkpointed, {"likelihood": "categorical"}),
    "empirical": (dropout_net, {"likelihood": "empirical"}),
}


def gradients(
    build: Callable[[], nn.Module],
    options: dict | None,
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda m: m,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], KFACPreconditioner | None]:
    """Gradients, loss, the state of the random stream afterwards, buffers; with K-FAC where there are ``options``."""
    torch.manual_seed(1)
    model = build()
    x, y = torch.randn(16, 5), torch.randint(0, 3, (16,))
    kfac = None if options is None else KFACPreconditioner(model, **options)
    logits = wrap(model)(x)
    if kfac is not None:
        kfac.accumulate()
    loss = F.cross_entropy(logits, y)
    loss.backward()
    return [p.grad for p in model.parameters()], loss, torch.get_rng_state(), list(model.buffers()), kfac


def assert_untouched(
    build: Callable[[], nn.Module], options: dict, wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda m: m
) -> None:
    plain, loss, stream, buffers, _ = gradients(build, None, wrap)
    found, its_loss, its_stream, its_buffers, kfac = gradients(build, options, wrap)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(its_buffers, buffers, strict=True))
    assert torch.equal(its_loss, loss)
    assert torch.equal(its_stream, stream)
    assert kfac is not None
    kfac.step()  # and the pass was made: every layer has its factors
    layers = kfac.state_dict()["layers"]
    assert all(layer["updates"] == 1 and float(layer["factors"]["G"].abs().max()) > 0 for layer in layers.values())
    kfac.close()


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_and_the_random_stream_stay_bitwise(name: str) -> None:
    assert_untouched(*VARIANTS[name])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_they_stay_under_torch_compile(backend: str) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()  # hooks are not guarded: code compiled for the model without them would serve again
        return torch.compile(model, backend=backend)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))

    with functorch_config.patch(donated_buffer=False):
        assert_untouched(build, {"likelihood": "categorical"}, compiled)


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_they_stay_under_autocast(likelihood: str) -> None:
    def autocast(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return forward

    assert_untouched(dropout_net, {"likelihood": likelihood}, autocast)


@pytest.mark.parametrize("coarse", [None, "layer_step_residual"])
@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_the_method_itself_never_runs_under_autocast(likelihood: str, coarse: str | None) -> None:
    """A training_step of manual optimization runs under it from end to end, backward and step included."""

    def factors_and_direction(outside: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(1)
        model = mlp()
        x, y = torch.randn(16, 5), torch.randint(0, 3, (16,))
        kfac = KFACPreconditioner(model, likelihood=likelihood, coarse=coarse)
        logits = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            kfac.accumulate()
            F.cross_entropy(logits, y).backward()
            for p in model.parameters():
                p.grad = p.detach().clone()  # the backward itself is the user's
            kfac.step()
        layers = kfac.state_dict()["layers"].values()
        return [layer["factors"]["A"] for layer in layers], [p.grad for p in model.parameters()]

    inside, wanted = factors_and_direction(True), factors_and_direction(False)
    assert all(torch.equal(a, b) for a, b in zip(inside[0], wanted[0], strict=True))
    if likelihood != "empirical":  # there G is made of what the backward delivered
        assert all(torch.equal(a, b) for a, b in zip(inside[1], wanted[1], strict=True))


def test_a_model_that_was_compiled_before_is_named() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(4, 5))
    KFACPreconditioner(model, likelihood="categorical")
    compiled(torch.randn(4, 5))
    kfac = KFACPreconditioner(compiled, likelihood="categorical")
    compiled(torch.randn(4, 5))
    with pytest.raises(RuntimeError, match=r"compiled and already called, build K-FAC before.*torch._dynamo.reset\(\)"):
        kfac.accumulate()
    torch._dynamo.reset()
    compiled(torch.randn(4, 5))
    kfac.accumulate()


def test_a_recomputed_forward_is_not_counted_twice() -> None:
    """Under the empirical Fisher hooks stay on during the training backward, which computes the body again."""
    torch.manual_seed(2)
    model = Checkpointed()
    model.body[1].p = 0.0
    plain = nn.Sequential(*model.body, nn.Tanh(), model.head)
    x, y = torch.randn(16, 5), torch.randint(0, 3, (16,))
    factors = []
    for net in (model, plain):
        for likelihood in ("empirical", "categorical"):
            kfac = KFACPreconditioner(net, likelihood=likelihood)
            net.zero_grad()
            logits = net(x)
            kfac.accumulate()
            F.cross_entropy(logits, y).backward()
            kfac.step()
            factors.append([layer["factors"] for layer in kfac.state_dict()["layers"].values()])
            kfac.close()
    for found, wanted in zip(factors[:2], factors[2:], strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert a["locations"] == b["locations"] == 1
            assert torch.allclose(a["A"], b["A"], rtol=1e-5)
            assert torch.allclose(a["G"], b["G"], rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_named() -> None:
    model = Checkpointed(reentrant=True)
    kfac = KFACPreconditioner(model, likelihood="categorical")
    logits = model(torch.randn(4, 5, requires_grad=True))
    try:
        kfac.accumulate()
    except RuntimeError as error:
        assert "use_reentrant=False" in str(error)  # noqa: PT017 - the other way out is a warning, below
        return
    logits.sum().backward()
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        kfac.step()


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_two_forwards_of_one_micro_batch_count_like_two_micro_batches(likelihood: str) -> None:
    torch.manual_seed(2)
    model = mlp().double()
    x, y = torch.randn(2, 6, 5, dtype=torch.float64), torch.randint(0, 3, (2, 6))
    found = []
    for together in (True, False):
        kfac = KFACPreconditioner(model, likelihood=likelihood, fisher_samples="exact")
        model.zero_grad()
        if together:
            first, second = model(x[0]), model(x[1])
            kfac.accumulate(loss_divisor=2)
            ((F.cross_entropy(first, y[0]) + F.cross_entropy(second, y[1])) / 2).backward()
        else:
            for part in range(2):
                logits = model(x[part])
                kfac.accumulate(loss_divisor=2)
                (F.cross_entropy(logits, y[part]) / 2).backward()
        kfac.step()
        found.append([layer["factors"] for layer in kfac.state_dict()["layers"].values()])
        kfac.close()
    for one, other in zip(*found, strict=True):
        assert one["locations"] == other["locations"] == 1
        assert torch.allclose(one["A"], other["A"], rtol=1e-12)
        assert torch.allclose(one["G"], other["G"], rtol=1e-12)
