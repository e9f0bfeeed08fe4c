"""preconditioning="auto": directions of rows where the gradient is theirs, and of the gradient wherever it is not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner, kept_rows
from kfac_dist.config import KFACConfig
from kfac_dist.kept_rows import KeptRows, worthwhile
from kfac_dist.layers import find_layers
from kfac_dist.rank_b import plain_linears
from tests.helpers.ranks import RankPool
from tests.test_rank_b import (
    COMMON,
    WIDTH,
    Loss,
    Net,
    Positions,
    Repeated,
    batches,
    check_equal,
    cross_entropy,
    penalised,
    penalised_late,
    preconditioner,
    smooth,
)
from tests.test_rank_b import directions as directions_of

Taken = list[set[str]]
directions = partial(directions_of, overwrite=False)


@pytest.fixture(autouse=True)
def small_layers_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_rows, "WORTH", 0)


@pytest.mark.parametrize(
    "options",
    [
        *COMMON,
        {"damping_method": "eigen", "factor_sides": "input"},
        {"damping": lambda step: 0.05 + step},
        {"max_factor_dim": 30, "large_factors": "diagonal"},
        {"max_factor_dim": 15, "kl_clip": 1e-4},
        {"loss_reduction": 3.0},
        {"inverse_schedule": "staggered"},
        {"coarse": "layer_step"},
        {"coarse": "layer_step_momentum"},
        {"coarse": "layer_step_residual"},
        {"coarse": "pcg"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:factors larger than", "ignore:these modules keep their plain gradient")
def test_directions_are_those_of_the_gradients(options: dict[str, Any], taken: Taken) -> None:
    if "coarse" in options:
        options = options | {"kl_clip": 1e-4}
    found = directions(Net(), "auto", **options)
    assert taken == [{"first", "plain", "frozen"}] * 5
    check_equal(found, directions(Net(), "gradients", **options), 1e-9 if "coarse" in options else 1e-12)


class Named(Net):
    """Inputs that are given by name, and do not lie in one piece."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(
            self.frozen(input=self.norm(self.plain(input=F.relu(self.first(input=x.mT.contiguous().mT)))))
        )


@pytest.mark.parametrize(
    ("net", "micro_batches", "names"),
    [
        (Positions, 1, {"first", "plain", "frozen"}),
        (Repeated, 1, {"first", "plain", "frozen"}),
        (Repeated, 2, {"first", "plain", "frozen"}),
        (Net, 3, {"first", "plain", "frozen"}),
        (Named, 1, {"first", "plain", "frozen"}),
    ],
)
def test_every_way_to_call_a_layer(net: Callable[[], Net], micro_batches: int, names: set[str], taken: Taken) -> None:
    found = directions(net(), "auto", micro_batches=micro_batches)
    assert taken == [names] * 5
    check_equal(found, directions(net(), "gradients", micro_batches=micro_batches))


def test_other_types_than_those_it_was_built_for_take_the_dense_route(taken: Taken) -> None:
    found = []
    for route in ("auto", "gradients"):
        net = Net()
        kfac = preconditioner(net, route)
        net.double()
        x, y = batches(1)[0]
        value = cross_entropy(net, x, y)
        kfac.accumulate()
        value.backward()
        kfac.step()
        found.append([gradients(net)])
        kfac.close()
    assert taken[0] == set()
    check_equal(*found)


def test_a_gradient_that_is_not_finite_is_nobodys_rows(taken: Taken) -> None:
    net = Net().double()
    kfac = preconditioner(net, "auto")
    x, y = batches(1)[0]
    value = cross_entropy(net, x, y)
    kfac.accumulate()
    value.backward()
    net.first.weight.grad[0, 0] = float("nan")
    kfac.step()
    assert all("first" not in names for names in taken)
    kfac.close()


@pytest.mark.parametrize("route", ["auto", "gradients", "samples"])
@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_functional_transforms_of_the_model_leave_nothing(route: str, likelihood: str, taken: Taken) -> None:
    """Gradients of single samples, as one looks at them between two steps."""
    net = Net().double()
    kfac = preconditioner(net, route, likelihood=likelihood)
    x, y = batches(1)[0]
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x[None],)), y[None])

    single = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    assert not any(held._calls for held in kfac._kept_rows._layers.values())
    assert not kfac._fisher.capture.outputs
    value = cross_entropy(net, x, y)
    kfac.accumulate()
    value.backward()
    if route != "samples":
        torch.testing.assert_close(single["first.weight"].mean(0), net.first.weight.grad)
    kfac.step()
    assert taken == [{"first", "plain", "frozen"} if route == "auto" else set()]
    kfac.close()


def test_an_empty_batch_has_no_rows(taken: Taken) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH))
    kfac = KFACPreconditioner(net, "gaussian", factor_every_n_steps=100)
    for rows in (4, 0):
        net.zero_grad()
        loss = net(torch.randn(rows, WIDTH)).square().sum()
        kfac.accumulate()
        loss.backward()
        kfac.step()
    assert net[0].weight.grad is not None
    assert not net[0].weight.grad.any()
    kfac.close()


def test_a_forward_that_is_forgotten_does_not_count(taken: Taken) -> None:
    net = Net().double()
    kfac = preconditioner(net, "auto")
    x, y = batches(1)[0]
    for number, micro_batch in enumerate(x.chunk(2)):
        for factor in (2.0, 1.0):  # a loss that is skipped, and one that is trained on
            kfac.forget()
            value = F.cross_entropy(net(factor * micro_batch), y[: len(micro_batch)]) / 2
        held = kfac._kept_rows._layers["first"]
        assert (len(held._calls), held._rows) == (1 + number, 3 + 3 * number)
        kfac.accumulate(loss_divisor=2)
        value.backward()
    kfac.step()
    assert taken == [{"first", "plain", "frozen"}]
    kfac.close()


def held_back(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A forward whose loss is never asked for, before the one that is."""
    net(2.0 * x)
    return cross_entropy(net, x, y)


def test_forwards_without_a_backward_do_not_count(taken: Taken) -> None:
    found = directions(Net(), "auto", held_back, likelihood="empirical")
    assert taken == [{"first", "plain", "frozen"}] * 5
    check_equal(found, directions(Net(), "gradients", held_back, likelihood="empirical"))


@pytest.mark.parametrize("loss", [penalised, penalised_late, smooth])
def test_gradients_that_come_on_another_way_are_seen(loss: Loss, taken: Taken) -> None:
    likelihood = "empirical" if loss is penalised else "categorical"
    found = directions(Net(), "auto", loss, likelihood=likelihood)
    assert all("first" not in names for names in taken)
    check_equal(found, directions(Net(), "gradients", loss, likelihood=likelihood))


def test_a_checkpointed_forward_counts_once(taken: Taken) -> None:
    found = directions(Net(recompute=True), "auto")
    assert taken == [{"first", "plain", "frozen"}] * 5
    check_equal(found, directions(Net(recompute=True), "gradients"))


def scaled(net: Net, x: Tensor) -> None:
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def one_entry(net: Net, x: Tensor) -> None:
    net.first.weight.grad[3, 5] += 1e-6 * net.first.weight.grad.abs().max()


def only_the_bias(net: Net, x: Tensor) -> None:
    net.first.bias.grad[3] *= 1.0 + 1e-6


def accumulated(net: Net, x: Tensor) -> None:
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad += 0.1


def reused_input(net: Net, x: Tensor) -> None:
    x.mul_(0.5)


DOUBLE = [(change, torch.float64) for change in (scaled, one_entry, only_the_bias, accumulated, reused_input)]
SINGLE = [(change, torch.float32) for change in (scaled, accumulated, reused_input)]  # the others are rounding there


@pytest.mark.parametrize(("change", "dtype"), DOUBLE + SINGLE)
def test_whatever_is_done_to_a_gradient_counts(
    change: Callable[[Net, Tensor], None], dtype: torch.dtype, taken: Taken
) -> None:
    """Without the question to a random vector the direction would be that of the gradient before the change."""
    found = {}
    for route in ("auto", "gradients"):
        net = Net().to(dtype)
        kfac = preconditioner(net, route)
        x, y = batches(1)[0]
        x = x.to(dtype)
        value = cross_entropy(net, x, y)
        kfac.accumulate()
        value.backward()
        change(net, x)
        kfac.step()
        found[route] = [{name: p.grad for name, p in net.named_parameters() if p.grad is not None}]
        kfac.close()
    assert "first" not in taken[0]
    check_equal(found["auto"], found["gradients"], 1e-12 if dtype == torch.float64 else 1e-4)


def test_a_second_backward_without_zero_grad_takes_the_sum_of_both(taken: Taken) -> None:
    net, other = Net().double(), Net().double()
    for model, route in ((net, "auto"), (other, "gradients")):
        kfac = preconditioner(model, route)
        for x, y in batches(2):
            value = cross_entropy(model, x, y)
            kfac.accumulate()
            value.backward()
        kfac.step()
        kfac.close()
    check_equal([gradients(net)], [gradients(other)])
    assert taken[0] == {"first", "plain", "frozen"}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("width", [250, 420, 619, 1024])
@pytest.mark.parametrize("cancelling", [False, True])
def test_rounding_is_no_change_and_little_more_is_one(width: int, cancelling: bool) -> None:
    """In float32, in a weight and in a bias, also where the rows' gradients nearly cancel, as near a minimum."""
    torch.manual_seed(width)
    rows, d_out = 64, 200
    net = nn.Sequential(nn.Linear(width, d_out))
    layers = plain_linears(net, find_layers(net, KFACConfig()).layers)
    kept = KeptRows(layers, KFACConfig(), torch.float32)
    x, weights = torch.randn(rows, width) + 1.0, torch.randn(rows, d_out)
    if cancelling:
        x[rows // 2 :] = x[: rows // 2] * (1.0 + 1e-3 * torch.randn(rows // 2, 1))
        weights[rows // 2 :] = -weights[: rows // 2]

    def seen(change: float, column: int) -> bool:
        net.zero_grad()
        (net(x) * weights).sum().backward()
        gradient = layers[0].gradient()
        assert gradient is not None
        gradient[0, 7, column] += change
        return not kept.take({"0": gradient}, 1.0)

    terms = float(torch.cat([x, torch.ones(rows, 1)], dim=1).norm() * weights.norm())  # the size of what was summed
    bound = kept_rows.ROUNDING * torch.finfo(torch.float32).eps * terms
    for column in (0, width // 3, -1):  # the last one is the bias
        assert not seen(0.0, column)
        assert seen(2.0 * bound, column)
    kept.close()


def test_the_scale_of_the_loss_is_taken_out_of_the_rows(taken: Taken) -> None:
    found = directions(Net(), "auto", lambda net, x, y: 4.0 * cross_entropy(net, x, y), loss_reduction=4.0)
    assert taken == [{"first", "plain", "frozen"}] * 5
    check_equal(found, directions(Net(), "gradients"))


def test_adaptive_damping_makes_the_directions_anew_of_the_rows(taken: Taken) -> None:
    found = {}
    for route in ("auto", "gradients"):
        net = Net().double()
        kfac = preconditioner(net, route, damping="adaptive", initial_damping=1e-4)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        dampings = []
        for x, y in batches(4):
            optimizer.zero_grad()
            loss = cross_entropy(net, x, y)
            kfac.accumulate()
            loss.backward()
            kfac.step(lr=optimizer, closure=lambda net=net, x=x, y=y: cross_entropy(net, x, y))  # type: ignore[misc]
            dampings.append(kfac.metrics["damping"])
            optimizer.step()
        found[route] = [{name: p.detach() for name, p in net.named_parameters()}]
        assert dampings[0] > 1e-4  # the first attempt was refused
        kfac.close()
    assert taken[:4] == [{"first", "plain", "frozen"}] * 4
    check_equal(found["auto"], found["gradients"], 1e-9)


def test_what_is_not_worth_it_is_not_held() -> None:
    layer = find_layers(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH)), KFACConfig()).layers[0]
    most = max(rows for rows in range(1, 100) if worthwhile(layer, rows, KFACConfig()))
    # R (g^2 + a^2 + g a + 2 (g + a)) + g a at most g a (g + a), for g = 40 and a = 21
    assert most == (840 * 61 - 840) // (1600 + 441 + 840 + 122)
    one_sided = KFACConfig(factor_sides="input")
    assert max(rows for rows in range(1, 100) if worthwhile(layer, rows, one_sided)) < most


def test_layers_of_small_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    net = Net()
    kfac = preconditioner(net, "auto")
    assert not kfac._kept_rows._layers
    kfac.close()


@pytest.mark.parametrize("rows", [200, 5])
def test_nothing_is_held_longer_than_to_the_step(rows: int) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
    kfac = KFACPreconditioner(net, "gaussian", factor_every_n_steps=100)
    losses: list[Tensor] = []
    for step in range(3):
        hidden: list[weakref.ref[Tensor]] = []
        handle = net[1].register_forward_hook(lambda _, __, output: hidden.append(weakref.ref(output)))  # noqa: B023
        loss = net(torch.randn(rows, WIDTH)).square().sum() / rows
        kfac.accumulate()
        loss.backward()
        assert len(kfac._kept_rows._layers["2"]._calls) == (0 if rows == 200 else 1)
        kfac.step()
        handle.remove()
        losses.append(loss)  # as one does for a plot, though with its graph
        gc.collect()
        assert hidden[0]() is None, step
    assert all(not held._calls for held in kfac._kept_rows._layers.values())
    kfac.close()
    assert not any(module._forward_hooks for module in net.modules())


def test_forwards_that_no_step_follows_do_not_pile_up() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH))
    kfac = KFACPreconditioner(net, "gaussian")
    for _ in range(50):
        net(torch.randn(5, WIDTH))
    assert len(kfac._kept_rows._layers["0"]._calls) <= 4
    kfac.close()


def test_a_copy_of_the_model_has_no_part_in_it(taken: Taken) -> None:
    net = Net().double()
    kfac = preconditioner(net, "auto")
    average = copy.deepcopy(net)
    x, y = batches(1)[0]
    loss = cross_entropy(net, x, y)
    kfac.accumulate()
    loss.backward()
    cross_entropy(average, x, y).backward()
    kfac.step()
    assert taken == [{"first", "plain", "frozen"}]
    kfac.close()


def test_half_precision_and_autocast_take_the_dense_route(taken: Taken) -> None:
    for dtype, mixed in ((torch.bfloat16, False), (torch.float32, True)):
        net = Net().to(dtype)
        kfac = preconditioner(net, "auto")
        x, y = batches(1)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = cross_entropy(net, x.to(dtype), y)
        kfac.accumulate()
        loss.backward()
        kfac.step()
        kfac.close()
    assert taken == [set(), set()]


def test_a_step_asks_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(9)))
    kfac = KFACPreconditioner(net, "gaussian", factor_every_n_steps=100)
    asked: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: asked.append(self.numel()) or tolist(self))
    for _ in range(2):
        asked.clear()
        net.zero_grad()
        loss = net(torch.randn(3, WIDTH)).square().sum() / 3
        kfac.accumulate()
        loss.backward()
        kfac.step()
    assert asked == [9]
    kfac.close()


def on_ranks(rank: int, world_size: int) -> tuple[int, list[float]]:
    kept_rows.WORTH = 0
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)).double()
    from kfac_dist import DistributionConfig  # noqa: PLC0415 - in the rank's own process

    kfac = KFACPreconditioner(net, "gaussian", distribution=DistributionConfig(average_gradients=True))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64).chunk(world_size)[rank]
    ids = torch.arange(8).chunk(world_size)[rank]
    loss = net(x).square().sum() / len(x)
    kfac.accumulate(sample_ids=ids)
    loss.backward()
    kfac.step()
    served = len(kfac._kept_rows._layers)
    kfac.close()
    return served, [float(p.grad.norm()) for p in net.parameters() if p.grad is not None]


def test_on_several_ranks_gradients_are_no_ranks_own(ranks: RankPool) -> None:
    alone, together = ranks.run(1, on_ranks)[0], ranks.run(2, on_ranks)
    assert alone[0] == 2
    assert [served for served, _ in together] == [0, 0]
    for _, norms in together:
        assert norms == pytest.approx(alone[1], rel=1e-10)


def test_the_loss_that_is_trained_falls_alike(taken: Taken) -> None:
    """Float32, thirty steps, as one trains."""
    ends = []
    for route in ("auto", "gradients"):
        torch.manual_seed(3)
        net = Net()
        kfac = preconditioner(net, route, kl_clip=1e-2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches(10) * 3:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.float()), y)
            kfac.accumulate()
            loss.backward()
            kfac.step(lr=optimizer)
            optimizer.step()
        ends.append(float(loss.detach()))
        kfac.close()
    assert sum(bool(names) for names in taken[:30]) == 30
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)
