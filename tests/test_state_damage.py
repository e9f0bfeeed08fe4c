"""A state that does not fit: the error says what differs, and neither the state nor the training has changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from tests.helpers.cases import cases
from tests.helpers.training import EVERY_KIND
from tests.test_state import assert_state_equal

COARSE = CoarseConfig(space="layer_step_momentum", damping=0.1)


def made(width: int = 4, **options: Any) -> KFACPreconditioner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    defaults = {"factor_every_n_steps": 2, "inverse_every_n_steps": 3, "coarse": COARSE}
    return KFACPreconditioner(model, likelihood="gaussian", **defaults | options)


def advance(kfac: KFACPreconditioner, first: int, last: int) -> list[Tensor]:
    """The weights after these steps."""
    for step in range(first, last):
        kfac.model.zero_grad()
        out = kfac.model(torch.randn(5, 3, generator=torch.Generator().manual_seed(step)))
        kfac.accumulate()
        (0.5 * out.square().sum() / 5).backward()
        kfac.step(lr=1.0)
        with torch.no_grad():
            for p in kfac.model.parameters():
                p -= 0.1 * p.grad
    return [p.detach().clone() for p in kfac.model.parameters()]


def saved(**options: Any) -> dict[str, Any]:
    """The state of such a run after 4 steps, as a file would hold it."""
    kfac = made(**options)
    advance(kfac, 0, 4)
    return copy.deepcopy(kfac.state_dict())


def without(*path: str) -> dict[str, Any]:
    state = saved()
    part: Any = state
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return state


def with_value(value: Any, *path: str) -> dict[str, Any]:
    state = saved()
    part: Any = state
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value(part[path[-1]]) if callable(value) else value
    return state


def not_finite(tensor: Tensor) -> Tensor:
    return tensor.flatten().index_fill(0, torch.tensor(1), float("nan")).view_as(tensor)


DAMAGES: dict[str, tuple[Callable[[], Any], str]] = {
    # Foreign and older.
    "nothing": (lambda: None, r"this NoneType is no K-FAC state"),
    "empty": (dict, r"this dict is no K-FAC state"),
    "a model's state": (lambda: made().model.state_dict(), r"this OrderedDict is no K-FAC state"),
    "older": (lambda: with_value(0, "version"), r"version 0; this release reads version \d+: go on with the release"),
    "newer": (lambda: with_value(99, "version"), r"version 99; this release reads version \d+"),
    # Other layers.
    "shape": (
        lambda: saved(width=5),
        r"layer '0': factor G has shape \(1, 5, 5\) in the checkpoint and \(1, 4, 4\) in this model; load it into the "
        r"model it was saved from, with the same skip_layers$",
    ),
    "names": (lambda: saved(skip_layers="^2$"), r"other layers: .*only in the model \['2'\].*same skip_layers"),
    "sides": (
        lambda: saved(factor_sides="input"),
        r"factor G has shape None.*same factor_sides, which was 'input' and is 'both'; skip_layers$",
    ),
    # Truncated or corrupt, one level.
    "no step": (lambda: without("step"), r"without step: the checkpoint is damaged"),
    "no counts": (lambda: without("counts"), r"without counts"),
    "no config": (lambda: without("config"), r"without config"),
    "no coarse": (lambda: without("coarse"), r"without coarse"),
    "layers": (lambda: with_value(None, "layers"), r"the K-FAC state is damaged"),
    "step": (lambda: with_value("many", "step"), r"the K-FAC state is damaged: invalid literal"),
    "negative step": (lambda: with_value(-1, "step"), r"the K-FAC state is damaged: step=-1"),
    "counts": (lambda: with_value(None, "counts"), r"the K-FAC state is damaged"),
    "config": (lambda: with_value("x", "config"), r"the K-FAC state is damaged.*'str'"),
    "loss_scale": (lambda: with_value(float("nan"), "loss_scale"), r"the K-FAC state is damaged: loss_scale=nan"),
    "no updates": (lambda: without("layers", "2", "updates"), r"layer '2' is damaged: KeyError\('updates'\)"),
    "no factor": (lambda: without("layers", "2", "factors", "G"), r"layer '2' is damaged: KeyError\('G'\)"),
    "no average": (lambda: with_value(None, "layers", "2", "factors"), r"layer '2' is damaged.*2 updates of no moving"),
    "layer": (lambda: with_value("x", "layers", "2"), r"layer '2' is damaged"),
    "factor": (
        lambda: with_value(not_finite, "layers", "2", "inverted", "A"),
        r"layer '2' is damaged: factor A is not",
    ),
    "locations": (
        lambda: with_value(-1.0, "layers", "2", "factors", "locations"),
        r"layer '2' is damaged: locations=-1",
    ),
    "text": (lambda: with_value("x", "layers", "2", "factors", "locations"), r"layer '2' is damaged: locations='x'"),
    # The coarse level.
    "coarse": (lambda: with_value(3, "coarse"), r"the K-FAC state is damaged.*'int'"),
    "no kept": (lambda: without("coarse", "kept"), r"coarse level lacks kept: it is damaged"),
    "momentum": (lambda: with_value(3, "coarse", "momentum"), r"coarse level is damaged"),
    "momentum's shape": (
        lambda: with_value(lambda m: m[:, 1:], "coarse", "momentum", "0"),
        r"momentum of layer '0' has",
    ),
    "momentum's bits": (
        lambda: with_value(not_finite, "coarse", "momentum", "0"),
        r"momentum of layer '0' is not finite",
    ),
    "kept": (lambda: with_value({"layers": ["0", "2"]}, "coarse", "kept"), r"coarse level is damaged.*'coefficients'"),
    "kept's layers": (lambda: with_value(["0", "1"], "coarse", "kept", "layers"), r"coefficients of the layers .*'1'"),
    "damping": (lambda: with_value("x", "coarse", "damping"), r"coarse level is damaged.*convert string"),
    "no damping": (lambda: with_value(0.0, "coarse", "damping"), r"coarse level is damaged.*damping=0"),
    "solves": (lambda: with_value([], "coarse", "solves"), r"coarse level is damaged"),
}


@pytest.fixture(scope="module")
def undisturbed() -> list[Tensor]:
    return advance(made(), 0, 5)


@pytest.mark.parametrize("how", DAMAGES)
def test_what_cannot_be_loaded_is_named_and_nothing_is_taken_over(how: str, undisturbed: list[Tensor]) -> None:
    make, message = DAMAGES[how]
    state = make()
    kfac = made()
    advance(kfac, 0, 2)
    before = copy.deepcopy(kfac.state_dict())
    with pytest.raises(ValueError, match=message):
        kfac.load_state_dict(state)
    assert_state_equal(kfac.state_dict(), before)
    for mine, theirs in zip(advance(kfac, 2, 5), undisturbed, strict=True):
        assert torch.equal(mine, theirs)


def halving(step: int) -> float:
    return 0.5 ** (step + 1)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "damping": ({"damping": 0.5}, r": damping was 0.01 and is 0.5$"),
    "schedule": ({"damping": halving}, r": damping was 0.01 and is '<function halving>'$"),
    "decay": ({"factor_decay": 0.5}, r": factor_decay was 0.95 and is 0.5$"),
    "two": (
        {"factor_every_n_steps": 1, "inverse_every_n_steps": 7},
        r": factor_every_n_steps was 2 and is 1; inverse_every_n_steps was 3 and is 7$",
    ),
    "clip": ({"kl_clip": 0.1}, r": kl_clip was 'None' and is 0.1$"),
    "coarse": (
        {"coarse": CoarseConfig(space="layer_step_momentum", damping=0.2, every_n_steps=2)},
        r": coarse damping was 0.1 and is 0.2; coarse every_n_steps was 1 and is 2$",
    ),
    "no coarse": ({"coarse": None}, r": coarse space was 'layer_step_momentum' and is 'None'$"),
}


@pytest.mark.parametrize("how", OTHER)
def test_other_settings_are_named_once_with_both_values(how: str) -> None:
    options, message = OTHER[how]
    kfac = made(**options)
    with pytest.warns(UserWarning, match=r"resumed with other settings .* count from now on" + message) as warned:
        kfac.load_state_dict(saved())
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac.load_state_dict(saved())
    assert kfac.state_dict()["config"]["damping"] == made(**options).state_dict()["config"]["damping"]


def of_every_kind(**options: Any) -> KFACPreconditioner:
    case = cases()["every kind"]
    kfac = KFACPreconditioner(case.model(), "categorical", **EVERY_KIND | options)
    logits = kfac.model(case.x)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    kfac.step()
    return kfac


SHAPING: dict[str, tuple[dict[str, Any], str]] = {
    "bound": (
        {"max_factor_dim": 16},
        r"layer 'conv': factor A has shape \(2, 7, 7\) in the checkpoint and \(1, 13, 13\) in .*"
        r"with the same max_factor_dim, which was 8 and is 16; skip_layers$",
    ),
    "form": (
        {"large_factors": "diagonal"},
        r"\(2, 7, 7\) .* and \(13, 1, 1\) in .*same large_factors, which was 'blocks' and is 'diagonal'; skip_layers$",
    ),
    "norms": (
        {"norm_blocks": "full"},
        r"layer 'norm': factor A has shape \(4, 2, 2\) .* and \(1, 8, 8\) in .*"
        r"same norm_blocks, which was 'channel' and is 'full'; skip_layers$",
    ),
    "uncovered": (
        {"uncovered": "plain"},
        r"other layers: only in the checkpoint \['slope'\], only in the model \[\]; .*"
        r"same uncovered, which was 'diagonal' and is 'plain'; skip_layers$",
    ),
}


@pytest.mark.filterwarnings("ignore:factors larger", "ignore:these modules keep")
@pytest.mark.parametrize("how", SHAPING)
def test_settings_that_shape_the_factors_are_named_with_both_values(how: str) -> None:
    options, message = SHAPING[how]
    kfac = of_every_kind(**options)
    before = copy.deepcopy(kfac.state_dict())
    with pytest.raises(ValueError, match=message):
        kfac.load_state_dict(of_every_kind().state_dict())
    assert_state_equal(kfac.state_dict(), before)


@pytest.mark.filterwarnings("ignore:factors larger")
def test_another_approximation_fits_and_is_named() -> None:
    kfac = of_every_kind(kfac_approx={"conv": "reduce"})
    with pytest.warns(UserWarning, match=r": kfac_approx was 'expand' and is \"\{'conv': 'reduce'\}\"$"):
        kfac.load_state_dict(of_every_kind().state_dict())


def test_another_likelihood_is_named() -> None:
    torch.manual_seed(0)
    model = made().model
    kfac = KFACPreconditioner(model, likelihood="categorical", coarse=COARSE)
    with pytest.warns(UserWarning, match=r"likelihood was 'gaussian' and is 'categorical'$"):
        kfac.load_state_dict(saved())


@pytest.mark.parametrize(
    "options", [{}, {"distribution": "mem_opt"}, {"skip_layers": "^1$"}, {"damping": 1e-2, "coarse": COARSE}]
)
def test_the_same_settings_say_nothing(options: dict[str, Any]) -> None:
    kfac = made(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac.load_state_dict(saved())


def test_within_a_step_and_after_one_that_failed_the_state_is_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a signal's handler and an exception's checkpoint would save it; the step can then be made again."""
    kfac = made()
    advance(kfac, 0, 4)
    before = copy.deepcopy(kfac.state_dict())
    weights = copy.deepcopy(kfac.model.state_dict())
    within = []

    def failing(*_: Any, **__: Any) -> None:
        within.append(copy.deepcopy(kfac.state_dict()))
        raise OSError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("kfac_dist.preconditioner.plan_step", failing)  # factors and counts have changed by then
        with pytest.raises(OSError, match="on purpose"):
            advance(kfac, 4, 5)
    for state in (*within, kfac.state_dict()):
        assert_state_equal(state, before)
    resumed = made()
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(kfac.state_dict())
    for mine, theirs in zip(advance(resumed, 4, 7), advance(made(), 0, 7), strict=True):
        assert torch.equal(mine, theirs)
