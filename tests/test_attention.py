"""nn.MultiheadAttention in models: what is found, and that training and evaluation are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_dist import KFACPreconditioner
from kfac_dist.compat import current_function_mode
from kfac_dist.layers import find_layers
from tests.helpers.cases import Attending, Case, cases
from tests.helpers.dense import cotangents, gradient_matrix, kfac_direction, kronecker_factors, treated
from tests.helpers.explicit import explicit
from tests.helpers.steps import assert_equal, one_step
from tests.test_exact_blocks import dense_blocks

FISHERS = ("categorical", "empirical")
PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]
CASE: Case = cases()["attention"]


def test_a_module_that_is_called_twice() -> None:
    class Twice(Attending):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for _ in range(2):
                h = h + self.itself(h, h, h)[0]
            return self.head(h.mean(1) + self.places(x[:, 0]))

    def build() -> nn.Module:
        torch.manual_seed(1)
        model = Twice().double()
        del model.other
        return model

    found, states = one_step(CASE, build(), coarse="layer_step")
    wanted, _ = one_step(CASE, explicit(build()), coarse="layer_step")
    assert_equal(found, wanted)
    assert states["itself.q_proj"]["factors"]["locations"] == 8


# -- what is found ----------------------------------------------------------------------------------------------------


class Own(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


def test_out_proj_belongs_to_its_module() -> None:
    model = nn.TransformerDecoderLayer(4, 2, 8)
    found = find_layers(model).layers
    assert [layer.name for layer in found if "attn" in layer.name] == [
        f"{module}.{part}" for module in ("self_attn", "multihead_attn") for part in PARTS
    ]
    assert {"linear1", "linear2"} <= {layer.name for layer in found}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (r"\.q_proj$", ["0.k_proj", "0.v_proj", "0.out_proj"]),
        (r"\.[qkv]_proj$", ["0.out_proj"]),
        (r"out_proj", ["0.q_proj", "0.k_proj", "0.v_proj"]),
        ("NonDynamicallyQuantizableLinear", ["0.q_proj", "0.k_proj", "0.v_proj"]),
        ("MultiheadAttention", []),
        ("^0$", []),
    ],
)
def test_parts_can_be_skipped(skip: str, left: list[str]) -> None:
    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x, x, x)[0]).sum(0)

    torch.manual_seed(0)
    model = Model(nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
    kfac = KFACPreconditioner(model, "gaussian", skip_layers=[skip])
    assert [layer.name for layer in kfac.layers] == [*left, "1"]
    out = model(torch.randn(3, 5, 4))
    kfac.accumulate()
    out.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.step()
    assert {name for name, state in kfac.state_dict()["layers"].items() if state["updates"]} == {*left, "1"}
    for number, part in enumerate(PARTS[:3]):
        rows = slice(4 * number, 4 * number + 4)
        same = torch.equal(model[0].in_proj_weight.grad[rows], plain["0.in_proj_weight"][rows])
        assert same == (f"0.{part}" not in left)
    assert torch.equal(model[0].out_proj.weight.grad, plain["0.out_proj.weight"]) == ("0.out_proj" not in left)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Own(4, 2), "Own is a MultiheadAttention with a forward of its own"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
            "a parametrization",
        ),
    ],
)
def test_what_cannot_be_treated_is_named(build: Any, reason: str) -> None:
    _, refused = find_layers(nn.Sequential(build(), nn.Linear(4, 4)))
    assert reason in refused["0"]


def test_a_parametrized_out_proj_is_named() -> None:
    model = nn.MultiheadAttention(4, 2)
    nn.utils.parametrizations.weight_norm(model.out_proj)
    found, refused = find_layers(model)
    assert not found
    assert "out_proj is a ParametrizedNonDynamicallyQuantizableLinear" in refused[""]


def test_appended_keys_and_values_keep_their_plain_gradient_and_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x)[0].mean(0)

    torch.manual_seed(0)
    model = Model().double()
    with pytest.warns(UserWarning, match="attend .no layer holds its bias_k, bias_v."):
        kfac = KFACPreconditioner(model, "gaussian", fisher_samples="exact")
    x = torch.randn(3, 5, 4).double()
    out = model(x)
    kfac.accumulate()
    out.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.grad, plain[name])}
    assert changed == {"attend.in_proj_weight", "attend.in_proj_bias", "attend.out_proj.weight", "attend.out_proj.bias"}
    assert [layer.name for layer in kfac.layers] == [f"attend.{part}" for part in PARTS]


# -- training is left alone -------------------------------------------------------------------------------------------


def transformer(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **options)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(20, 3))


SEQUENCES = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(7) % 3


@pytest.mark.parametrize("likelihood", FISHERS)
def test_training_gradients_are_bitwise_what_they_are_without(likelihood: str) -> None:
    """With dropout, also inside attention: nothing is computed a second time."""
    gradients: dict[bool, list[Tensor | None]] = {}
    for watched in (True, False):
        model = transformer(dropout=0.3)
        kfac = KFACPreconditioner(model, likelihood) if watched else None
        torch.manual_seed(5)
        logits = model(SEQUENCES)
        if kfac is not None:
            kfac.accumulate()
        F.cross_entropy(logits, TARGETS).backward()
        gradients[watched] = [p.grad.clone() for p in model.parameters()]
        if kfac is not None:
            kfac.step()
            updates = {name: state["updates"] for name, state in kfac.state_dict()["layers"].items()}
            assert set(updates.values()) == {1}
            assert {f"0.layers.{i}.self_attn.{part}" for i in range(2) for part in PARTS} <= set(updates)
    assert all(torch.equal(a, b) for a, b in zip(gradients[True], gradients[False], strict=True))


def test_the_fast_path_of_evaluation_agrees_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: list[int] = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: fast.append(1) or kernel(*a, **k))
    model = transformer().eval()
    with torch.no_grad():
        wanted = model(SEQUENCES)
        assert len(fast) == 2
        kfac = KFACPreconditioner(model, "categorical")
        found = model(SEQUENCES)
        assert len(fast) == 2
        kfac.close()
        again = model(SEQUENCES)
    assert len(fast) == 4
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    assert torch.equal(again, wanted)


def test_what_was_recorded_in_training_survives_an_evaluation() -> None:
    model = transformer(dropout=0.0)
    kfac = KFACPreconditioner(model, "categorical")
    logits = model(SEQUENCES)
    model.eval()
    with torch.no_grad():
        model(SEQUENCES * 100)
    copy.deepcopy(model)(SEQUENCES * 100).sum().backward()
    model.train()
    kfac.accumulate()
    F.cross_entropy(logits, TARGETS).backward()
    kfac.step()
    other = transformer(dropout=0.0)
    plain = KFACPreconditioner(other, "categorical")
    logits = other(SEQUENCES)
    plain.accumulate()
    F.cross_entropy(logits, TARGETS).backward()
    plain.step()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_an_exception_inside_leaves_no_mode_behind() -> None:
    model = CASE.model()
    kfac = KFACPreconditioner(model, "categorical")
    with pytest.raises(AssertionError, match="embedding dimension"):
        model.itself(torch.zeros(2, 3, 5).double(), torch.zeros(2, 3, 5).double(), torch.zeros(2, 3, 5).double())
    assert current_function_mode() is None
    kfac.forget()
    model.zero_grad()
    logits = model(CASE.x)
    kfac.accumulate(sample_ids=torch.arange(12))
    CASE.loss(logits, CASE.y).backward()
    kfac.step()
    assert kfac.metrics["factor_updates"] == 1


def test_an_interrupt_by_the_keyboard_is_cleaned_up_at_the_next_call() -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model = CASE.model()
    kfac = KFACPreconditioner(model, "categorical")
    handle = model.itself.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(CASE.x)
    handle.remove()
    assert current_function_mode() is not None
    kfac.forget()
    model(CASE.x)
    assert current_function_mode() is None


def test_a_default_device_is_a_mode_too() -> None:
    wanted, _ = one_step(CASE, CASE.model())
    with torch.device("cpu"):
        found, _ = one_step(CASE, CASE.model())
    assert_equal(found, wanted, 0.0)


@pytest.mark.parametrize("likelihood", FISHERS)
def test_checkpointed_attention(likelihood: str) -> None:
    class Checkpointed(Attending):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    def build() -> nn.Module:
        torch.manual_seed(1)
        return Checkpointed().double()

    wanted, _ = one_step(CASE, CASE.model(), likelihood=likelihood)
    found, _ = one_step(CASE, build(), likelihood=likelihood)
    assert_equal(found, wanted)


def test_autocast() -> None:
    torch.manual_seed(0)
    model = transformer(dropout=0.0)
    kfac = KFACPreconditioner(model, "categorical", damping=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(SEQUENCES)
        loss = F.cross_entropy(logits, TARGETS)
    kfac.accumulate(sample_ids=torch.arange(7))
    loss.backward()
    kfac.step()
    other = transformer(dropout=0.0)
    exact = KFACPreconditioner(other, "categorical", damping=0.1)
    logits = other(SEQUENCES)
    exact.accumulate(sample_ids=torch.arange(7))
    F.cross_entropy(logits, TARGETS).backward()
    exact.step()
    for name, state in exact.state_dict()["layers"].items():
        found = kfac.state_dict()["layers"][name]["factors"]["A"]
        assert found.dtype == torch.float32
        assert torch.linalg.norm(found - state["factors"]["A"]) < 0.02 * torch.linalg.norm(state["factors"]["A"])


# -- attention written with functions ---------------------------------------------------------------------------------


class Functional(nn.Module):
    """F.scaled_dot_product_attention between nn.Linear: every map is a module that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, 4), nn.Linear(4, 12)
        self.out, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((h + self.out(mixed.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("likelihood", FISHERS)
def test_functional_attention_is_covered_and_exact(likelihood: str) -> None:
    case = Case(Functional, CASE.x, CASE.y, "categorical")
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood, damping=0.03, damping_method="eigen", seed=3)
    assert {id(p) for layer in kfac.layers for p in layer.parameters} == {id(p) for p in model.parameters()}
    ids = torch.arange(12)
    fisher = "empirical" if likelihood == "empirical" else "true"
    factors = kronecker_factors(case, case.model(), case.x, lambda z: cotangents(case, z, case.y, fisher, 1, 3, 0, ids))
    logits = model(case.x)
    kfac.accumulate(sample_ids=ids)
    case.loss(logits, case.y).backward()
    gradients = {name: gradient_matrix(module) for name, module in treated(model).items()}
    kfac.step()
    wanted = {name: kfac_direction(*factors[name], gradient, 0.03) for name, gradient in gradients.items()}
    assert_equal({name: gradient_matrix(module) for name, module in treated(model).items()}, wanted, 1e-9)


def test_every_parameter_of_a_transformer_is_covered() -> None:
    model = nn.Transformer(4, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=6)
    found, refused = find_layers(model)
    assert not refused
    assert {id(p) for layer in found for p in layer.parameters} == {id(p) for p in model.parameters()}
    assert sum(layer.output_dim * layer.input_dim for layer in found) == sum(p.numel() for p in model.parameters())


class OnePosition(nn.Module):
    """Sequences of one position: the softmax is 1, and values and outputs are a linear net."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x[:, None], x[:, None], x[:, None])[0][:, 0])


def test_blocks_of_one_position_are_those_of_the_dense_fisher() -> None:
    torch.manual_seed(4)
    model, x = OnePosition().double(), torch.randn(9, 4, dtype=torch.float64)
    nn.init.normal_(model.attend.in_proj_bias)
    blocks = dense_blocks(explicit(model), x)
    kfac = KFACPreconditioner(model, "gaussian", fisher_samples="exact")
    outputs = model(x)
    kfac.accumulate()
    (0.5 * outputs.square().sum() / len(x)).backward()
    kfac.step()
    states = kfac.state_dict()["layers"]
    assert states.keys() == blocks.keys()
    for name, (block,) in blocks.items():
        factors = states[name]["factors"]
        found = torch.kron(factors["G"][0], factors["A"][0])
        assert torch.allclose(found, block, rtol=0, atol=1e-12)
        assert (block.abs().max() > 1e-2) == (name not in ("attend.q_proj", "attend.k_proj"))
