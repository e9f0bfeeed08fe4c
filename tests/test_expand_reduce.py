"""What weight sharing is taken for: "expand" and "reduce" (Eschenhagen et al. 2023), against dense references.

In a deep linear net with a Gaussian likelihood "expand" is exact where the loss is a sum over the locations' own
outputs, and "reduce" where it looks at the average over the locations (their sections on the two settings).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import Setup, relative
from tests.helpers.dense import (
    cotangents,
    gradient_matrix,
    kfac_direction,
    kronecker_factors,
    output_rows,
    patches,
    treated,
)
from tests.test_accumulation import WHOLE, masked_loss, window
from tests.test_traps import dense_state, one_step

ALL = cases()
LAM = 0.03


class Mean(nn.Module):
    """The average over locations, of rows of features (B, .., d) or of maps (B, C, *size)."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if self.maps else x.flatten(1, -2).mean(1)


# -- where each of the two is exact ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """A deep linear net, the shape of its input, and the setting in which it computes."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    setting: str


EXACT = {
    "sequences": Exact(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (5, 3, 3), "expand"),
    "averaged sequences": Exact(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), Mean(False), nn.Linear(3, 2)),
        (5, 4, 3),
        "reduce",
    ),
    "maps": Exact(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2, stride=(2, 1), padding=1), nn.Conv2d(4, 2, 1, groups=2)),
        (4, 2, 3, 2),
        "expand",
    ),
    "averaged maps": Exact(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, padding="same", padding_mode="circular"),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2),
            Mean(True),
            nn.Linear(4, 2),
        ),
        (5, 2, 3, 4),
        "reduce",
    ),
    "lines": Exact(lambda: nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.Conv1d(3, 2, 1)), (5, 2, 7), "expand"),
    "averaged volumes": Exact(
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Conv3d(3, 2, 1, bias=False), Mean(True)), (4, 2, 3, 2, 3), "reduce"
    ),
    "transposed maps": Exact(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=(1, 0), groups=2), nn.Conv2d(4, 2, 1)
        ),
        (3, 2, 2, 2),
        "expand",
    ),
    "averaged transposed maps": Exact(
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, 1), Mean(True)),
        (4, 2, 2, 3),
        "reduce",
    ),
}


def dense_blocks(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Layer -> per group (1/B) sum over samples and outputs of u u^T, u the gradient of one output of one sample."""
    blocks: dict[str, list[Tensor]] = {}
    for sample in x:
        outputs = model(sample[None]).flatten()
        for output in outputs:
            model.zero_grad()
            output.backward(retain_graph=True)
            for name, module in treated(model).items():
                u = gradient_matrix(module).flatten(1)
                found = blocks.setdefault(name, [torch.zeros(len(v), len(v)).double() for v in u])
                for group, v in enumerate(u):
                    found[group] += torch.outer(v, v) / len(x)
    model.zero_grad()
    return blocks


def factors_of(model: nn.Module, x: Tensor, approximation: str) -> dict[str, dict]:
    kfac = KFACPreconditioner(model, "gaussian", fisher_samples="exact", kfac_approx=approximation)
    outputs = model(x)
    kfac.accumulate()
    (0.5 * outputs.square().sum() / len(x)).backward()
    kfac.step()
    kfac.close()
    return {name: state["factors"] for name, state in kfac.state_dict()["layers"].items()}


@pytest.mark.parametrize("name", EXACT)
def test_block_is_that_of_the_dense_fisher_in_its_setting(name: str) -> None:
    case = EXACT[name]
    torch.manual_seed(4)
    model = case.build().double()
    x = torch.randn(*case.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    blocks = dense_blocks(model, x)
    errors: dict[str, list[float]] = {"expand": [], "reduce": []}
    for approximation, found in errors.items():
        factors = factors_of(model, x, approximation)
        assert set(factors) == set(blocks)
        for layer, each in blocks.items():
            A, G, T = (factors[layer][key] for key in ("A", "G", "locations"))
            for group, block in enumerate(each):
                found.append(relative(T * torch.kron(G[group], A[group]), block))
    other = "reduce" if case.setting == "expand" else "expand"
    assert max(errors[case.setting]) < 1e-12
    assert max(errors[other]) > 0.05  # the two are not the same here


# -- factors and directions -----------------------------------------------------------------------------------------


def step(case: Case, approximation: str | dict[str, str], fisher: str, **options: object) -> KFACPreconditioner:
    model = case.model()
    likelihood = "empirical" if fisher == "empirical" else case.likelihood
    kfac = KFACPreconditioner(model, likelihood, damping=LAM, seed=3, kfac_approx=approximation, **options)
    logits = model(case.x)
    kfac.accumulate(sample_ids=torch.arange(len(case.x)))
    case.loss(logits, case.y).backward()
    kfac.step()
    kfac.close()
    return kfac


def dense_factors(case: Case, reduced: Callable[[str], bool], fisher: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    model, ids = case.model(), torch.arange(len(case.x))
    factors = kronecker_factors(
        case, model, case.x, lambda z: cotangents(case, z, case.y, fisher, 1, 3, 0, ids), reduced
    )
    for name, module in treated(model).items():
        if isinstance(module, nn.Embedding):  # averages of one-hot vectors have products, of which it keeps the squares
            A, G, T = factors[name]
            factors[name] = A[0].diagonal().diag()[None], G, T
    return factors


def assert_directions(kfac: KFACPreconditioner, case: Case, factors: dict, method: str) -> None:
    model = case.model()
    case.loss(model(case.x), case.y).backward()
    found = treated(kfac.model)
    for name, module in treated(model).items():
        wanted = kfac_direction(*factors[name], gradient_matrix(module), LAM, method)
        assert relative(gradient_matrix(found[name]), wanted) < 1e-9, name


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("method", ["eigen", "factored"])
@pytest.mark.parametrize("name", ["cnn", "convolutions", "sequences", "shared", "tokens"])
def test_reduce_averages_inputs_and_sums_gradients(name: str, method: str, fisher: str) -> None:
    case = ALL[name]
    kfac = step(case, "reduce", fisher, damping_method=method)
    factors = dense_factors(case, lambda name: True, fisher)
    states = kfac.state_dict()["layers"]
    for layer, (A, G, T) in factors.items():
        assert states[layer]["factors"]["locations"] == T == (2.0 if layer == "twice" else 1.0)  # calls, no locations
        assert relative(states[layer]["factors"]["G"], G) < 1e-12
        found, module = states[layer]["factors"]["A"], treated(kfac.model)[layer]
        if isinstance(module, nn.Embedding):
            found = found[:, 0, 0].diag()[None]
        assert relative(found, A) < 1e-12
        if getattr(module, "bias", None) is not None:  # its coordinate is still the constant
            assert found[:, -1, -1].tolist() == pytest.approx([1.0] * len(found), abs=1e-14)
    assert_directions(kfac, case, factors, method)


@pytest.mark.parametrize("name", ["mlp-categorical", "shared"])
def test_without_locations_both_are_the_same(name: str) -> None:
    expanded, reduced = (treated(step(ALL[name], a, "true").model) for a in ("expand", "reduce"))
    for layer, module in expanded.items():
        assert relative(gradient_matrix(reduced[layer]), gradient_matrix(module)) < 1e-13


@pytest.mark.parametrize(
    ("patterns", "reduced"),
    [
        ({"^0$": "reduce"}, {"0"}),
        ({"Conv": "reduce"}, {"0", "2", "4"}),
        ({"^2$": "expand", "Conv2d": "reduce"}, {"0", "4"}),  # the first that is found decides
        ({"nothing": "reduce"}, set()),
    ],
)
def test_layers_are_chosen_by_patterns(patterns: dict[str, str], reduced: set[str]) -> None:
    case = ALL["cnn"]
    kfac = step(case, patterns, "true", damping_method="eigen")
    assert {layer.name for layer in kfac.layers if layer.approximation == "reduce"} == reduced
    assert_directions(kfac, case, dense_factors(case, lambda name: name in reduced, "true"), "eigen")


# -- masks, windows, the coarse level -------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_masked_positions_stand_in_no_average(fisher: str) -> None:
    """Sequences of 1 to 6 positions, and samples without any: their averages, over the samples that have one."""
    case = ALL["sequences"]
    lengths = torch.tensor([6, 1, 0, 4, 3, 2, 6, 5, 0, 1, 2, 3])
    mask = torch.arange(6) < lengths[:, None]
    model = case.model()
    likelihood = "empirical" if fisher == "empirical" else case.likelihood
    kfac = KFACPreconditioner(model, likelihood, seed=3, kfac_approx="reduce")
    logits = model(case.x)
    kfac.accumulate(sample_ids=torch.arange(12), mask=mask)
    masked_loss(case, logits, case.y, mask).backward()
    kfac.step()
    states = kfac.state_dict()["layers"]
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    reference = case.model()
    for module in treated(reference).values():
        module.register_forward_hook(lambda m, args, out: seen.append((m, args[0].detach(), out)))
    logits = reference(case.x)
    (cotangent, _) = next(cotangents(case, logits, case.y, fisher, 1, 3, 0, torch.arange(12)))
    gradients = torch.autograd.grad(logits, [out for *_, out in seen], cotangent * mask[:, None])
    kept = lengths > 0
    for (name, module), (_, x, _), g in zip(treated(reference).items(), seen, gradients, strict=True):
        rows = (patches(module, x)[:, :, 0] * mask[..., None]).sum(1)[kept] / lengths[kept][:, None]
        summed = output_rows(module, g)[:, :, 0].sum(1)[kept]
        factors = states[name]["factors"]
        assert factors["locations"] == 1.0
        assert relative(factors["A"][0], rows.T @ rows / kept.sum()) < 1e-12
        assert relative(factors["G"][0], summed.T @ summed / kept.sum()) < 1e-12


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("name", ["cnn", "convolutions", "sequences", "tokens"])
def test_micro_batches_equal_the_big_batch(name: str, fisher: str) -> None:
    wanted = window(ALL[name], WHOLE, fisher, kfac_approx="reduce")
    window(ALL[name], torch.arange(12).split([5, 1, 6]), fisher, kfac_approx="reduce").assert_equal(wanted)


@pytest.mark.parametrize("name", ["cnn", "sequences"])
def test_the_coarse_operator_does_not_depend_on_it(name: str) -> None:
    """M is another one, and zeta with it; F is that of whole samples in both."""
    case, draws = ALL[name], {"space": "layer_step"}
    found, plain = (one_step(case, Setup(**draws, options={"kfac_approx": a})) for a in ("reduce", "expand"))
    state = dense_state(case, Setup(**draws))
    expanded = state.zeta
    assert relative(plain, state.corrected(state.basis("layer_step", 1), "error_minimizing")) < 1e-9
    state.factors = kronecker_factors(case, copy.deepcopy(state.model), case.x, state._cotangents, lambda name: True)
    state.zeta = state.precondition(state.grad)
    assert relative(found, state.corrected(state.basis("layer_step", 1), "error_minimizing")) < 1e-9
    assert relative(state.zeta, expanded) > 1e-2


class LocationsFirst(nn.Module):
    """A layer that sees one row more than there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.cat([x, x[:1]])))[:-1])


def test_rows_that_belong_to_no_sample_are_refused() -> None:
    model = LocationsFirst()
    kfac = KFACPreconditioner(model, "categorical", kfac_approx={"inner": "reduce"})
    model(torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"layer 'inner' has 6 rows for 5 samples: kfac_approx='reduce' must tell"):
        kfac.accumulate()
