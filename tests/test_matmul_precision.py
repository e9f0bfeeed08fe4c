"""TF32 and bfloat16 products, which users choose for their networks, reach neither statistics nor factorisations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.compat import full_float32
from tests.helpers.cases import mlp

BACKENDS = torch.backends
STRICT = set(product(("none", "ieee"), repeat=3))
STRICT_BY_LEGACY = ("ieee", "none", "ieee")


def in_force() -> tuple[str, str, str]:
    """Precision of float32 products of the CPU, of its convolutions, and of CUDA."""
    places = (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.cuda.matmul)
    return tuple(place.fp32_precision for place in places)  # type: ignore[return-value]


def everywhere(precision: str) -> None:
    BACKENDS.fp32_precision = precision


def here(place: Any, precision: str) -> None:
    place.fp32_precision = precision


CHOICES: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "everywhere bf16": lambda: everywhere("bf16"),
    "everywhere tf32": lambda: everywhere("tf32"),
    "one backend": lambda: here(BACKENDS.mkldnn.matmul, "bf16"),
    "allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
}


@pytest.fixture(autouse=True)
def default_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for place in (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.cuda.matmul, BACKENDS):
        place.fp32_precision = "none"


@contextmanager
def products() -> Iterator[dict[str, set[tuple[str, str, str]]]]:
    """Name -> the settings in force at every product and factorisation, hooks in the backward included."""
    seen: dict[str, set[tuple[str, str, str]]] = {}

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(in_force())
            return function(*args, **kwargs)

        return noted

    places = [(torch.Tensor, "__matmul__"), (torch, "einsum"), (torch.linalg, "cholesky_ex"), (torch.linalg, "eigh")]
    with pytest.MonkeyPatch.context() as patch:
        for place, name in places:
            patch.setattr(place, name, noting(name, getattr(place, name)))
        yield seen


def step(likelihood: str, method: str, coarse: Any, damping: Any = 0.1) -> dict[str, set[tuple[str, str, str]]]:
    torch.manual_seed(0)
    model = mlp()
    x, y = torch.randn(16, 5), torch.randint(0, 3, (16,))
    kfac = KFACPreconditioner(model, likelihood, damping=damping, damping_method=method, coarse=coarse)
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    with products() as seen:
        kfac.accumulate()
        loss.backward()
        kfac.step(lr=0.1)
    kfac.close()
    return seen


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("likelihood", "method", "coarse"),
    [
        ("categorical", "factored", None),
        ("empirical", "eigen", CoarseConfig(space="layer_step", damping=0.1)),
    ],
)
def test_every_product_and_factorisation_is_in_float32(choice: str, likelihood: str, method: str, coarse: Any) -> None:
    CHOICES[choice]()
    chosen = in_force()
    assert not set(chosen) <= {"none", "ieee"}
    seen = step(likelihood, method, coarse)
    assert {"__matmul__", "eigh" if method == "eigen" else "cholesky_ex"} <= set(seen)
    assert {settings for of_one in seen.values() for settings in of_one} <= STRICT
    assert in_force() == chosen


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_is_given_back_after_an_error(choice: str) -> None:
    CHOICES[choice]()
    chosen, seen = (in_force(), legacy()), []

    def schedule(number: int) -> float:
        seen.append(in_force())
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        step("categorical", "factored", None, damping=schedule)
    assert set(seen) <= STRICT
    assert len(seen) == 1
    assert (in_force(), legacy()) == chosen


def legacy() -> Any:
    """What the older functions report; they raise where the user has mixed them with the newer settings."""
    try:
        return torch.get_float32_matmul_precision(), BACKENDS.cuda.matmul.allow_tf32
    except RuntimeError as error:
        return type(error)


def test_flags_can_be_read_inside() -> None:
    """torch raises at the mere look at a TF32 flag where the older and the newer settings disagree."""
    torch.set_float32_matmul_precision("medium")
    with full_float32():
        assert legacy() == ("highest", False)
    assert legacy() == ("medium", True)


def test_what_took_after_its_backend_still_does() -> None:
    BACKENDS.fp32_precision = "bf16"
    with full_float32():
        assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
    BACKENDS.fp32_precision = "tf32"
    assert in_force() == ("tf32", "tf32", "tf32")


def test_threads_that_overlap_give_back_the_users_choice() -> None:
    torch.set_float32_matmul_precision("medium")
    chosen, seen = in_force(), []
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with full_float32():
            entered.set()
            left.wait(10)
            seen.append(in_force())

    thread = threading.Thread(target=other)
    with full_float32():
        thread.start()
        assert entered.wait(10)
    seen.append(in_force())
    left.set()
    thread.join(10)
    assert seen == [STRICT_BY_LEGACY] * 2
    assert in_force() == chosen


def test_the_network_itself_keeps_the_users_precision() -> None:
    """Only what K-FAC computes is guarded: forwards and the passes through the network are the user's."""
    torch.set_float32_matmul_precision("medium")
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(in_force()[0])
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(in_force()[0])
            return gradient

    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[1].register_forward_hook(lambda module, args, output: Watch.apply(output))
    kfac = KFACPreconditioner(model, "categorical")
    loss = F.cross_entropy(model(torch.randn(4, 5)), torch.zeros(4, dtype=torch.long))
    kfac.accumulate()
    loss.backward()
    assert seen == ["bf16"] * 3
