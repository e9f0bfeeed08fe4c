"""Every argument with values it cannot have: an error at construction, with the value, the bound and the cure."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from kfac_dist import DistributionConfig, KFACPreconditioner
from kfac_dist.callbacks import KFAC
from kfac_dist.config import KFACConfig, evaluate

NAN, INF = math.nan, math.inf
POSITIVE_INT = r"must be an integer of at least 1"
POSITIVE = r"must be a finite number above 0"

# argument -> (bad values, what the message says after "argument=value")
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "likelihood": (("softmax", "Categorical"), r"known: bernoulli, categorical, gaussian"),
    "fisher_samples": ((0, -1, 1.5, True, "all", None), r"must be .*integer of at least 1"),
    "class_dim": ((0, 1.0, True, None), r"must be an integer other than 0 \(0 is the batch dimension\)"),
    "damping": ((0, -0.1, NAN, INF, True, None), POSITIVE),
    "initial_damping": ((0, -0.1, NAN, INF, True, "0.1", None), POSITIVE),
    "damping_method": (("tikhonov", None), r"is unknown; choose one of 'factored', 'eigen'"),
    "factor_sides": (("output", "A"), r"is unknown; choose one of 'both', 'input'"),
    "factor_decay": ((-0.1, 1.1, NAN, "0.9", None), r"must be a finite number at least 0 and at most 1"),
    "factor_every_n_steps": ((0, -3, 2.0, True, None), POSITIVE_INT),
    "inverse_every_n_steps": ((0, -3, 2.0, False), POSITIVE_INT),
    "factor_samples": ((0.0, -0.5, 1.5, NAN, "half", True, None), r"must be a finite number above 0 and at most 1"),
    "inverse_schedule": (("background", None, 1), r"is unknown; choose one of 'together', 'staggered'"),
    "kl_clip": ((0, -1.0, NAN, INF, "1"), POSITIVE),
    "loss_reduction": (("none", "batchmean"), r"is unknown; choose one of 'mean', 'sum', 'mean_all'"),
    "seed": ((-1, 2**63, 1.0, True, None), r"must be an integer in \[0, 2\^63\)"),
    "distribution": (("hybrid", "fsdp"), r"is unknown; choose one of 'comm_opt', 'mem_opt'"),
    "kfac_approx": (("sum", "Expand", None, 1), r"is unknown; choose one of 'expand', 'reduce'"),
    "max_factor_dim": ((0, -1, 64.0, True, None, "512"), POSITIVE_INT),
    "large_factors": (("dense", None), r"is unknown; choose one of 'blocks', 'diagonal'"),
    "norm_blocks": (("dense", None, 2), r"is unknown; choose one of 'diagonal', 'channel', 'full'"),
    "uncovered": (("kfac", None, False), r"is unknown; choose one of 'plain', 'diagonal'"),
    "preconditioning": (("rows", None, True), r"is unknown; choose one of 'auto', 'gradients', 'samples'"),
    "output_module": (("head",), r"is no module of the model; there are: 0, 1, 2"),
    "coarse": (("multigrid", ""), r"unknown coarse space .*; known: krylov, layer_step"),
}
# Everything else that may be given, and where its bad values are tried.
ELSEWHERE = {
    "model": "tests/test_refusals.py",
    "skip_layers": "test_patterns",
    "process_group": "tests/comm/test_communicators.py",
}
CASES = [(name, value, message) for name, (values, message) in BAD.items() for value in values]
CASES += [
    ("damping", "0.1", r"is unknown; choose one of 'adaptive'"),
    ("loss_reduction", 0.0, POSITIVE),
    ("loss_reduction", -1, POSITIVE),
    ("loss_reduction", NAN, POSITIVE),
    ("factor_decay", 1, r"would never forget the first batch; choose a number below 1, such as 0\.95"),
    ("distribution", 0.0, r"must be a finite number above 0 and at most 1"),
    ("distribution", 1.5, r"must be a finite number above 0 and at most 1"),
    ("distribution", NAN, r"must be a finite number above 0 and at most 1"),
]


def test_every_argument_has_its_bad_values() -> None:
    arguments = set(inspect.signature(KFACPreconditioner).parameters)
    assert arguments == set(BAD) | set(ELSEWHERE)
    assert {field.name for field in fields(KFACConfig)} <= arguments


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(("name", "value", "message"), CASES, ids=[f"{name}={value!r}" for name, value, _ in CASES])
def test_bad_values(name: str, value: Any, message: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=message) as error:
        KFACPreconditioner(net, **({"likelihood": "categorical"} | {name: value}))
    assert repr(value) in str(error.value)
    assert name in str(error.value)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("where", ["backend", "coarse_backend"])
def test_an_unknown_backend(where: str) -> None:
    config = DistributionConfig(**{where: "nccl"})
    message = r"unknown communication backend 'nccl'; known: mpi, single, torch"
    with pytest.raises(ValueError, match=message):
        KFACPreconditioner(model(), "categorical", coarse="layer_step", distribution=config)
    with pytest.raises(MisconfigurationException, match=message):  # before there is a model
        KFAC("categorical", distribution=config)


def test_patterns_of_an_approximation() -> None:
    with pytest.raises(ValueError, match=r"kfac_approx: '\(' is not a regular expression"):
        KFACPreconditioner(model(), "categorical", kfac_approx={"(": "reduce"})
    with pytest.raises(ValueError, match=r"kfac_approx\['0'\]='sum' is unknown; choose one of 'expand', 'reduce'"):
        KFACPreconditioner(model(), "categorical", kfac_approx={"0": "sum"})


@pytest.mark.parametrize(
    ("skip", "message"),
    [("(", r"skip_layers: '\(' is not a regular expression"), ((3,), r"skip_layers: 3 is not a reg")],
)
def test_patterns(skip: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFACPreconditioner(model(), likelihood="categorical", skip_layers=skip)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "opt"}, r"strategy='opt' is unknown; choose one of 'comm_opt', 'mem_opt', 'hybrid'"),
        ({"strategy": "hybrid"}, r"gradient_worker_fraction=None.*'hybrid' needs it"),
        (
            {"strategy": "mem_opt", "gradient_worker_fraction": 0.5},
            r"strategy='mem_opt' with gradient_worker_fraction=0\.5: the fraction goes with strategy='hybrid'",
        ),
        ({"strategy": "hybrid", "gradient_worker_fraction": 0}, r"gradient_worker_fraction=0 must be .*at most 1"),
        ({"backend": 3}, r"backend=3 must be the name of a communication backend, such as 'torch'"),
        ({"coarse_backend": ["mpi"]}, r"coarse_backend=\['mpi'\] must be the name of a communication backend"),
        ({"timeout": 0}, r"timeout=0 must be a finite number above 0"),
        ({"timeout": INF}, r"timeout=inf must be a finite number above 0"),
    ],
)
def test_distribution(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributionConfig(**options)


def test_the_torch_backend_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"init_process_group\(\) first.*or choose backend='single'"):
        KFACPreconditioner(model(), "categorical", distribution=DistributionConfig(backend="torch"))


def test_good_values_are_kept() -> None:
    kfac = KFACPreconditioner(
        model(),
        likelihood="gaussian",
        fisher_samples="exact",
        class_dim=-1,
        damping=0.5,
        factor_decay=0.0,
        loss_reduction=2,
        skip_layers="^0$",
        distribution=0.25,
        seed=2**63 - 1,
    )
    assert kfac.config == KFACConfig(
        likelihood="gaussian",
        fisher_samples="exact",
        class_dim=-1,
        damping=0.5,
        factor_decay=0.0,
        loss_reduction=2,
        skip_layers=("^0$",),
        seed=2**63 - 1,
    )
    assert kfac.distribution == DistributionConfig(strategy="hybrid", gradient_worker_fraction=0.25)
    assert DistributionConfig(gradient_worker_fraction=0.25) == kfac.distribution
    config = DistributionConfig(strategy="mem_opt")
    assert DistributionConfig.parse(config) is config
    with pytest.raises(AttributeError):
        kfac.config.damping = 1.0  # type: ignore[misc]


def test_without_a_likelihood_it_warns_and_is_empirical() -> None:
    with pytest.warns(
        UserWarning, match=r"no likelihood is given: the empirical Fisher is used.*\"categorical\""
    ) as caught:
        kfac = KFACPreconditioner(model())
    assert kfac.config.likelihood == "empirical"
    assert caught[0].filename == __file__  # it points at the user's line


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, None, "0.1"])
def test_a_schedule_that_returns_nonsense_is_named_with_its_step(value: Any) -> None:
    with pytest.raises(ValueError, match=r"damping\(7\)=.*must be a finite number above 0"):
        evaluate("damping", lambda step: value, 7)
    net = model()
    kfac = KFACPreconditioner(net, likelihood="categorical", damping=lambda step: value)
    logits = net(torch.randn(4, 3))
    kfac.accumulate()
    logits.logsumexp(1).mean().backward()
    with pytest.raises(ValueError, match=r"damping\(0\)="):
        kfac.step()


@pytest.mark.parametrize("value", [0.0, -2.0, NAN, INF])
def test_divisor_and_scale_of_a_call(value: float) -> None:
    net = model()
    kfac = KFACPreconditioner(net, likelihood="empirical")
    logits = net(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"loss_divisor=.*must be a finite number above 0"):
        kfac.accumulate(loss_divisor=value)
    kfac.accumulate()
    logits.logsumexp(1).mean().backward()
    with pytest.raises(ValueError, match=r"grad_scale=.*must be a finite number above 0"):
        kfac.step(grad_scale=value)
    kfac.step()
