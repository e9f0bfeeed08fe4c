"""Which modules are left alone, and how the user learns of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kfac_dist import KFACPreconditioner
from kfac_dist.comm import communicators
from kfac_dist.config import LayerOptions
from kfac_dist.layers import find_layers


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


class ScaledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScaledTransposed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return 2 * super().forward(x, output_size)


class ScaledNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Subclass(nn.Linear):
    """No forward of its own: as good as a Linear."""


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "own forward": (lambda: Scaled(4, 4), {"0": "Scaled is a Linear with a forward of its own"}),
    "own convolution": (lambda: ScaledConv(4, 4, 1), {"0": "ScaledConv is a Conv2d with a forward of its own"}),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        {
            "0": "its weight is computed from other parameters (a parametrization)",
            "0.parametrizations.weight": "0 computes with it: its weight is computed from other parameters "
            "(a parametrization)",
        },
    ),
    "own embedding": (
        lambda: ScaledEmbedding(4, 4),
        {"0": "ScaledEmbedding is an Embedding with a forward of its own"},
    ),
    "sparse embedding": (
        lambda: nn.Embedding(4, 4, sparse=True),
        {"0": "its gradient is sparse: build it with sparse=False"},
    ),
    "embedding scaled by frequency": (
        lambda: nn.Embedding(4, 4, scale_grad_by_freq=True),
        {"0": "scale_grad_by_freq=True makes its gradient none of the loss: build it without"},
    ),
    "embedding with a bound": (
        lambda: nn.Embedding(4, 4, max_norm=1.0),
        {
            "0": "max_norm changes its weight in the forward, on every rank for the tokens seen there: build it "
            "without and clip the rows after the optimizer's step (weight.data.renorm_(2, 0, max_norm))"
        },
    ),
    "only padding": (lambda: nn.Embedding(1, 4, padding_idx=0), {"0": "its only row is that of padding_idx"}),
    "bag": (lambda: nn.EmbeddingBag(4, 4), {"0": "no layer type is registered for EmbeddingBag"}),
    "own transposed convolution": (
        lambda: ScaledTransposed(4, 4, 1),
        {"0": "ScaledTransposed is a ConvTranspose1d with a forward of its own"},
    ),
    "complex convolution": (lambda: nn.Conv3d(2, 2, 1, dtype=torch.complex64), {"0": "its weight is complex"}),
    "synchronised norm": (
        lambda: nn.SyncBatchNorm(4),
        {"0": "SyncBatchNorm normalises with the samples of other processes"},
    ),
    "own norm": (lambda: ScaledNorm(4), {"0": "ScaledNorm is a LayerNorm with a forward of its own"}),
    "scale of a norm": (
        lambda: parametrizations.spectral_norm(nn.LayerNorm(4)),
        {
            "0": "its scale or shift is computed from other parameters (a parametrization)",
            "0.parametrizations.weight": "0 computes with it: its scale or shift is computed from other parameters "
            "(a parametrization)",
        },
    ),
    "activation": (lambda: nn.PReLU(), {"0": "no layer type is registered for PReLU"}),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), {"0": "its weight is complex"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reasons(name: str) -> None:
    build, wanted = REFUSED[name]
    found, refused = find_layers(nn.Sequential(build(), nn.Linear(4, 3)))
    assert [layer.name for layer in found] == ["1"]
    assert refused == wanted


def test_modules_without_anything_to_train_are_no_news() -> None:
    all_frozen = nn.Linear(4, 4).requires_grad_(False)
    bare_norm = nn.BatchNorm1d(4, affine=False)
    found, refused = find_layers(nn.Sequential(all_frozen, bare_norm, nn.Dropout(), Subclass(4, 3)))
    assert [layer.name for layer in found] == ["3"]
    assert refused == {}


def test_a_shared_module_is_one_layer() -> None:
    twice = nn.Linear(4, 4)
    found, refused = find_layers(nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(4, 3)))
    assert [layer.name for layer in found] == ["0", "3"]
    assert refused == {}


def caught_by(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def one_step(kfac: KFACPreconditioner, model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    logits = model(x)
    kfac.accumulate()
    F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)).backward()
    kfac.step()


def test_one_warning_names_all_and_they_keep_their_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.PReLU(), Scaled(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(6, 4)
    F.cross_entropy(model(x), torch.zeros(6, dtype=torch.long)).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kept: list[KFACPreconditioner] = []
    messages = caught_by(lambda: kept.append(KFACPreconditioner(model, likelihood="categorical")))
    assert messages == [
        "these modules keep their plain gradient: 0 (no layer type is registered for PReLU); "
        "1 (Scaled is a Linear with a forward of its own)"
    ]
    assert caught_by(lambda: [one_step(kept[0], model, x) for _ in range(3)]) == []
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, plain[name]) == (not name.startswith("3.")), name


class Root(nn.Module):
    """Parameters of the model itself, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale + self.token)


def test_a_container_is_left_alone_only_with_its_own_parameters_and_the_model_has_a_name() -> None:
    messages = caught_by(lambda: KFACPreconditioner(Root(), likelihood="categorical"))
    reason = "only its own token, scale: no layer type is registered for Root"
    assert messages == [f"these modules keep their plain gradient: (the model) ({reason})"]


@pytest.mark.parametrize("skip", [("^0$", "^1$"), ("Norm", "Scaled"), "Norm|Scaled"])
def test_skipped_layers_are_silent(skip: str | tuple[str, ...]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Scaled(4, 4), nn.Linear(4, 3))
    kept: list[KFACPreconditioner] = []
    assert caught_by(lambda: kept.append(KFACPreconditioner(model, "categorical", skip_layers=skip))) == []
    assert [layer.name for layer in kept[0].layers] == ["2"]


def test_skipped_by_name_or_class_wherever_they_lie() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1)), "head": nn.Linear(4, 3)})

    def names(*patterns: str) -> list[str]:
        return [layer.name for layer in find_layers(model, LayerOptions(skip_layers=patterns)).layers]

    assert names() == ["body.0", "body.1", "head"]
    assert names("head") == ["body.0", "body.1"]
    assert names(r"body\.\d") == ["head"]
    assert names("^Linear$") == ["body.1"]


class Partly(nn.Module):
    """One layer that is never used, and one of which only the weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.by_hand, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.used(x)), self.by_hand.weight))


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_layers_whose_hooks_never_fire(likelihood: str) -> None:
    torch.manual_seed(0)
    model, x = Partly(), torch.randn(6, 4)
    F.cross_entropy(model(x), torch.zeros(6, dtype=torch.long)).backward()
    plain = model.by_hand.weight.grad.clone()
    used = model.used.weight.grad.clone()
    kfac = KFACPreconditioner(model, likelihood=likelihood, factor_every_n_steps=1)
    (message,) = caught_by(lambda: [one_step(kfac, model, x) for _ in range(3)])
    assert message.startswith("these layers keep their plain gradient: unused, by_hand; their hooks did not fire")
    assert torch.equal(model.by_hand.weight.grad, plain)
    assert model.unused.weight.grad is None
    assert not torch.equal(model.used.weight.grad, used)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.Sequential(nn.PReLU()),
            {},
            r"Sequential has no layer that K-FAC can treat \(0: no layer type is regis",
        ),
        (nn.Linear(4, 3), {"skip_layers": "Linear"}, r"Linear has no layer.*check skip_layers"),
        (nn.Linear(4, 3).requires_grad_(False), {}, r"it trains no such module"),
        (nn.Sequential(nn.LazyLinear(3)), {}, r"module '0' is lazy: run one forward pass before K-FAC is built"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, device="meta")),
            {},
            r"several devices \(cpu, meta\); put the model on one",
        ),
        (nn.Linear(4, 3), {"output_module": "head"}, r"output_module='head' is no module of the model"),
        (nn.Sequential(nn.Linear(4, 3)), {"output_module": "1"}, r"there are: 0"),
    ],
)
def test_models_that_cannot_be_treated(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFACPreconditioner(model, likelihood="categorical", **options)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("failing", "options"),
    [
        ("kfac_dist.preconditioner.OneLevel", {}),
        ("kfac_dist.preconditioner.make_channel", {"coarse": "layer_step"}),
        ("kfac_dist.preconditioner.RankB", {}),
    ],
)
def test_a_construction_that_fails_leaves_no_hook_and_no_communicator(
    failing: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise ValueError("it cannot be made")

    closed: list[Any] = []
    monkeypatch.setattr(communicators["single"], "close", lambda self: closed.append(self))
    monkeypatch.setattr(failing, fail)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="it cannot be made"):
        KFACPreconditioner(model, "categorical", **options)
    assert closed
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize(
    "options", [{"output_module": "nowhere"}, {"preconditioning": "samples", "coarse": "layer_step"}]
)
def test_refusals_come_before_the_groups_of_ranks_are_made(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a group of ranks was made")

    monkeypatch.setattr("kfac_dist.preconditioner.OneLevel", made)
    monkeypatch.setattr("kfac_dist.preconditioner.make_channel", made)
    with pytest.raises(ValueError, match=r"nowhere|is made of them"):
        KFACPreconditioner(nn.Sequential(nn.Linear(4, 2)), "categorical", **options)
