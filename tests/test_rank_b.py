"""preconditioning="samples": the same directions without weight gradients, whatever else is done to the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_dist import DistributionConfig, KFACPreconditioner, rank_b
from kfac_dist.compat import ignored_by_ddp, let_ddp_ignore
from kfac_dist.config import KFACConfig
from kfac_dist.inverse import DensePreconditioner
from kfac_dist.layers import find_layers
from kfac_dist.rank_b import product_over_pairs, served_layers
from tests.helpers.ranks import RankPool

BATCH, WIDTH, CLASSES = 6, 20, 3
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
TOLERANCE = 1e-12
COMMON: list[dict[str, Any]] = [
    {},
    {"kl_clip": 1e-4},
    {"likelihood": "empirical"},
    {"factor_sides": "input"},
    {"damping_method": "eigen"},
]
"""Options that both ways to make directions of rows are tried with."""


class Net(nn.Module):
    """Wide and narrow linear maps, one without a bias, one with a frozen one, a norm, a head with no more than rows."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.plain = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.bias.requires_grad_(False)
        self.last = nn.Linear(WIDTH, CLASSES)
        self.recompute = recompute

    def hidden(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=x.dim() == 2)
        return torch.tanh(self.frozen(self.norm(self.plain(x))))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.hidden, x, use_reentrant=False) if self.recompute else self.hidden(x)
        return self.last(hidden)


class Positions(Net):
    """(B, T, d) inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(BATCH // 2, 2, -1)).flatten(0, 1)


class Repeated(Net):
    """A linear map that is called twice."""

    def hidden(self, x: Tensor) -> Tensor:
        x = super().hidden(x)
        return x + torch.tanh(self.frozen(x))


def cross_entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
        made.append((x, torch.randint(CLASSES, (BATCH,), generator=generator)))
    return made


def preconditioner(net: nn.Module, preconditioning: str = "samples", **options: Any) -> KFACPreconditioner:
    defaults = {"likelihood": "categorical", "damping": 0.05, "factor_every_n_steps": 2, "inverse_every_n_steps": 3}
    return KFACPreconditioner(net, **(defaults | options), preconditioning=preconditioning)  # type: ignore[arg-type]


def directions(
    net: nn.Module,
    preconditioning: str,
    loss: Loss = cross_entropy,
    micro_batches: int = 1,
    overwrite: bool = True,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """``param.grad`` after each of five steps that train the net."""
    net = net.double()
    kfac = preconditioner(net, preconditioning, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    found = []
    for x, y in batches(5):
        optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            value = loss(net, x_part, y_part) / micro_batches
            kfac.accumulate(loss_divisor=micro_batches)
            value.backward()
            if overwrite:
                x_part.zero_()  # the caller's own, to be filled again
        kfac.step(lr=optimizer)
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
    kfac.close()
    return found


def check_equal(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], tolerance: float = TOLERANCE) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert torch.linalg.norm(mine[name] - value) <= tolerance * torch.linalg.norm(value), name


def has_rows(net: Net) -> list[str]:
    """The layers whose backward left no gradient."""
    linears = ("first", "plain", "frozen", "last")
    return [name for name in linears if (grad := getattr(net, name).weight.grad) is not None and grad.is_sparse]


@pytest.mark.parametrize(
    "options",
    [
        *COMMON,
        {"damping_method": "eigen", "kl_clip": 1e-4, "factor_sides": "input"},
        {"damping": lambda step: 0.05 + step, "kl_clip": 1e-4},
        {"max_factor_dim": 7, "kl_clip": 1e-4},
        {"max_factor_dim": 7, "damping_method": "eigen"},
        {"max_factor_dim": 30, "large_factors": "diagonal"},
        {"loss_reduction": 3.0},
        {"skip_layers": "frozen"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:factors larger than", "ignore:these modules keep their plain gradient")
def test_directions_are_those_of_the_dense_gradients(options: dict[str, Any]) -> None:
    check_equal(directions(Net(), "samples", **options), directions(Net(), "gradients", **options))


@pytest.mark.parametrize("sides", ["both", "input"])
@pytest.mark.parametrize("pairs", [1, 4, 11, 64])
def test_products_over_pairs_are_those_of_the_matrices(sides: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_b, "PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(1, 11, d, generator=generator, dtype=torch.float64) for d in (7, 5))
    A, G = (torch.linalg.inv(s.mT @ s / 11 + torch.eye(s.shape[2], dtype=s.dtype)) for s in (a, g))
    inverses = DensePreconditioner(A, G if sides == "both" else None, 1.0)
    found = product_over_pairs((a, g), inverses.rows(a, g))
    assert float(found) == pytest.approx(float((inverses.apply(g.mT @ a, 0.0) * (g.mT @ a)).sum()), rel=1e-12)


@pytest.mark.parametrize("net", [Positions, Repeated, lambda: Net(recompute=True)], ids=["3d", "twice", "recomputed"])
def test_every_way_to_call_a_layer(net: Callable[[], Net]) -> None:
    check_equal(directions(net(), "samples", kl_clip=1e-4), directions(net(), "gradients", kl_clip=1e-4))


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_rows_of_several_micro_batches(micro_batches: int) -> None:
    found = directions(Net(), "samples", micro_batches=micro_batches)
    check_equal(found, directions(Net(), "gradients", micro_batches=micro_batches))


def penalised(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A gradient that reaches weights, and a bias alone, on another way than through the layer."""
    assert isinstance(net, Net)
    return cross_entropy(net, x, y) + net.first.weight.square().sum() + net.last.bias.sum() + net.first.bias.norm()


def penalised_late(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What the forward began with comes last in the backward: after the rows."""
    assert isinstance(net, Net)
    penalty = net.first.weight.square().sum() + net.plain.weight.sum()
    return penalty + cross_entropy(net, x, y)


def smooth(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A penalty on the gradient of the inputs: a backward within the forward, and one through it."""
    x = x.clone().requires_grad_()
    loss = cross_entropy(net, x, y)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


@pytest.mark.parametrize("loss", [penalised, penalised_late, smooth])
def test_gradients_that_come_on_another_way_are_added(loss: Loss) -> None:
    found = directions(Net(), "samples", loss, likelihood="empirical" if loss is penalised else "categorical")
    wanted = directions(Net(), "gradients", loss, likelihood="empirical" if loss is penalised else "categorical")
    check_equal(found, wanted)


def test_the_backward_leaves_out_what_does_not_pay_and_nothing_else() -> None:
    net = Net().double()
    kfac = preconditioner(net)
    (x, y) = batches(1)[0]
    loss = cross_entropy(net, x, y)
    kfac.accumulate()
    loss.backward()
    assert has_rows(net) == ["first", "plain", "frozen"]  # six rows against a width of three
    assert net.first.bias.grad is None
    assert net.last.bias.grad is not None
    assert all(p.requires_grad for name, p in net.named_parameters() if name != "frozen.bias")
    kfac.step()
    assert all(p.grad is not None and not p.grad.is_sparse for p in net.parameters() if p.requires_grad)
    assert net.frozen.bias.grad is None
    kfac.close()


@pytest.mark.parametrize("rows", [13, 14])
def test_a_batch_of_two_thirds_of_the_width_is_too_large(rows: int) -> None:
    """20 x (20 + 1): R (20^2 + 21^2) < 20 * 21 * 41 up to R = 20 without the clip, up to 13 with it."""
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH)).double()
    kfac = KFACPreconditioner(layer, "gaussian", kl_clip=1.0, preconditioning="samples")
    layer(torch.randn(rows, WIDTH, dtype=torch.float64)).square().sum().backward()
    assert layer[0].weight.grad is not None
    assert layer[0].weight.grad.is_sparse == (rows == 13)
    kfac.close()


def test_after_close_gradients_are_what_they_were_without_it() -> None:
    net, other = Net().double(), Net().double()
    kfac = preconditioner(net)
    (x, y) = batches(1)[0]
    cross_entropy(net, x, y).backward()
    kfac.close()  # with rows that no step took
    cross_entropy(net, x, y).backward()
    for _ in range(2):
        cross_entropy(other, x, y).backward()
    check_equal([gradients_of(net)], [gradients_of(other)])
    assert not any(module._forward_hooks for module in net.modules())
    assert not any(p._backward_hooks for p in net.parameters())


def gradients_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_backward_whose_gradients_are_zeroed_leaves_no_rows(set_to_none: bool) -> None:
    results = []
    for preconditioning in ("samples", "gradients"):
        net = Net().double()
        kfac = preconditioner(net, preconditioning)
        first, second = batches(2)
        cross_entropy(net, *first).backward()  # a step that is not made
        kfac.forget()
        loss = cross_entropy(net, *second)
        kfac.accumulate()
        net.zero_grad(set_to_none)
        loss.backward()
        kfac.step()
        results.append(gradients_of(net))
        kfac.close()
    check_equal([results[0]], [results[1]])


def test_gradients_that_are_zeroed_are_no_direction() -> None:
    net = Net().double()
    kfac = preconditioner(net)
    loss = cross_entropy(net, *batches(1)[0])
    kfac.accumulate()
    loss.backward()
    net.zero_grad()
    kfac.step()
    assert gradients_of(net) == {}
    kfac.close()


def test_nobody_may_change_the_gradients_that_are_not_there() -> None:
    net = Net().double()
    kfac = preconditioner(net)
    loss = cross_entropy(net, *batches(1)[0])
    kfac.accumulate()
    loss.backward()
    assert net.first.weight.grad is not None
    net.first.weight.grad *= 0.5
    with pytest.raises(RuntimeError, match=r"'first': its gradient was changed between backward\(\) and step\(\)"):
        kfac.step()
    net.zero_grad()
    kfac.close()


def test_a_gradient_of_the_inputs_adds_nothing() -> None:
    net = Net().double()
    kfac = preconditioner(net)
    x, y = batches(1)[0]
    x.requires_grad_()
    torch.autograd.grad(cross_entropy(net, x, y), x)
    assert gradients_of(net) == {}
    kfac.close()


def test_copies_and_frozen_layers_are_left_alone() -> None:
    net = Net().double()
    kfac = preconditioner(net)
    x, y = batches(1)[0]
    replica = copy.deepcopy(net)
    cross_entropy(replica, x, y).backward()
    assert has_rows(replica) == []
    net.first.requires_grad_(False)
    cross_entropy(net, x, y).backward()
    assert has_rows(net) == ["plain", "frozen"]
    assert not net.first.weight.requires_grad
    kfac.close()


@pytest.mark.filterwarnings("ignore:these modules keep their plain gradient")
def test_tied_weights_and_compiled_code_take_the_dense_route() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    net[2].weight = net[0].weight
    kfac = KFACPreconditioner(net, "gaussian", preconditioning="samples")
    net(torch.randn(2, WIDTH)).square().sum().backward()
    assert [layer.weight.grad.is_sparse for layer in (net[0], net[3])] == [False, True]  # type: ignore[union-attr]
    net.zero_grad()
    torch.compile(net, backend="eager")(torch.randn(2, WIDTH)).square().sum().backward()
    assert net[3].weight.grad is not None
    assert not net[3].weight.grad.is_sparse
    kfac.close()


def test_what_is_reported() -> None:
    for options, reported in (({}, False), ({"kl_clip": 1e-4}, True)):
        values = {}
        for preconditioning in ("samples", "gradients"):
            net = Net().double()
            kfac = preconditioner(net, preconditioning, **options)
            loss = cross_entropy(net, *batches(1)[0])
            kfac.accumulate()
            loss.backward()
            kfac.step(lr=0.1)
            values[preconditioning] = dict(kfac.metrics)
            kfac.close()
        assert "grad_norm" not in values["samples"]
        assert ("direction_dot_gradient" in values["samples"]) == reported
        for name in {"direction_dot_gradient", "direction_norm", "kl_clip_scale"} & values["samples"].keys():
            assert values["samples"][name] == pytest.approx(values["gradients"][name], rel=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse": "layer_step"}, r"coarse='layer_step' is made of them.*\"gradients\", or coarse=None"),
        ({"damping": "adaptive"}, r'damping="adaptive" predicts the loss: use .*, or a number'),
        ({"skip_layers": "Linear"}, r"serves nn.Linear layers, and none is preconditioned here: use"),
    ],
)
def test_what_it_does_not_go_with(options: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        preconditioner(net, **options)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_gradient_scaler_is_refused() -> None:
    net = Net()
    kfac = preconditioner(net)
    with pytest.raises(ValueError, match=r'grad_scale=1024.0: .* use bfloat16, or preconditioning="gradients"'):
        kfac.step(grad_scale=1024.0)
    kfac.close()


def test_a_wrapper_of_ddp_that_waits_for_gradients_is_refused() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    net = Net()
    with pytest.raises(ValueError, match="for which DistributedDataParallel would wait: use the model without it"):
        preconditioner(DistributedDataParallel(net))
    restore = let_ddp_ignore(net, ["plain.weight"])
    kfac = preconditioner(DistributedDataParallel(net))
    net(torch.randn(2, WIDTH)).sum().backward()
    assert has_rows(net) == ["plain"]
    kfac.close()
    restore()
    assert ignored_by_ddp(net) is None


# -- ranks --------------------------------------------------------------------------------------------------------

SHARES = {1: [(6,)], 2: [(3, 3), (4, 2), (6, 0)]}
"""World size -> samples per rank, step by step in turn; with DDP the first entry only."""


def train(
    rank: int, world_size: int, preconditioning: str, options: dict[str, Any], ddp: bool = False
) -> list[dict[str, Tensor]]:
    """The directions of four steps on batches that the ranks share."""
    net = Net().double()
    if ddp:
        if rank:  # DDP gives all ranks the parameters of rank 0, but for those that it ignores
            nn.init.zeros_(net.first.weight)
        let_ddp_ignore(net, [name for name, _ in net.named_parameters() if not name.startswith(("norm", "frozen"))])
    model = nn.parallel.DistributedDataParallel(net) if ddp else net
    distribution = DistributionConfig(average_gradients=world_size > 1 and not ddp)
    kfac = preconditioner(model, preconditioning, distribution=distribution, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for step, (x, y) in enumerate(batches(4)):
        sizes = SHARES[world_size][0 if ddp else step % len(SHARES[world_size])]
        part = torch.arange(BATCH).split(sizes)[rank]
        scale = world_size * len(part) / BATCH
        optimizer.zero_grad()
        if len(part):
            logits = model(x[part])
            kfac.accumulate(sample_ids=part, loss_divisor=1 / scale)
            (F.cross_entropy(logits, y[part]) * scale).backward()
        kfac.step(lr=optimizer)
        found.append({name: grad.clone() for name, grad in gradients_of(net).items()})
        optimizer.step()
    kfac.close()
    return found


@pytest.mark.parametrize("ddp", [False, True], ids=["own average", "ddp"])
@pytest.mark.parametrize("options", [{"kl_clip": 1e-4}, {"damping_method": "eigen"}], ids=["clip", "eigen"])
def test_two_ranks_equal_one_with_dense_gradients(ranks: RankPool, options: dict[str, Any], ddp: bool) -> None:
    first, second = ranks.run(2, train, "samples", options, ddp)
    check_equal(first, train(0, 1, "gradients", options), 1e-10)
    for mine, other in zip(first, second, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def traffic(rank: int, world_size: int) -> tuple[dict[str, float], int]:
    """Bytes of a step without a factor update, and the number of the served layers' parameters."""
    net = Net()
    kfac = preconditioner(net, distribution=DistributionConfig(average_gradients=True), kl_clip=1e-4)
    for x, y in batches(2):
        net.zero_grad()
        loss = cross_entropy(net, x.float(), y)
        kfac.accumulate()
        loss.backward()
        kfac.step(lr=0.1)
    served = [net.first, net.plain, net.frozen, net.last]
    count = sum(p.numel() for module in served for p in module.parameters() if p.requires_grad)
    values = {name: value for name, value in kfac.metrics.items() if name.startswith("bytes/")}
    kfac.close()
    return values, count


def test_the_directions_of_the_ranks_are_exchanged_in_the_place_of_their_gradients(ranks: RankPool) -> None:
    for values, count in ranks.run(2, traffic):
        flags, norm = 4, 2 * WIDTH
        assert values == {
            "bytes/directions": 4 * (count + flags),
            "bytes/gradients": 4 * (norm + 2),
            "bytes/clip": 4 * 4,
        }


def test_what_it_does_not_go_with_on_several_ranks() -> None:
    net = Net()
    config = KFACConfig(preconditioning="samples")
    layers = find_layers(net).layers
    sharded = DistributionConfig(strategy="mem_opt", average_gradients=True)
    with pytest.raises(
        ValueError, match="distribution='mem_opt': every rank preconditions its own samples and needs all"
    ):
        served_layers(net, layers, config, None, sharded, 2)
    with pytest.raises(ValueError, match="for which DistributedDataParallel would wait"):
        served_layers(net, layers, config, None, DistributionConfig(), 2)
    averaging = DistributionConfig(average_gradients=True)
    names = [layer.name for layer in served_layers(net, layers, config, None, averaging, 2)]
    assert names == ["first", "plain", "frozen", "last"]
