"""How often ranks talk and how much they say, against formulas; counted at torch.distributed itself as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankPool
from tests.helpers.training import Run, advance, build

BYTES = 8  # float64
STEPS, FACTOR_STEPS, INVERSE_STEPS = range(7), (0, 2, 4, 6), (0, 3, 6)
PARAMETERS = {"mlp-categorical": 36 + 24 + 15, "cnn": 4 * 19 + 4 * 12 + 2 * 17 + 3 * 33}
TENSORS = {"mlp-categorical": 5, "cnn": 7}
LAYERS = {  # name -> groups, a, g
    "mlp-categorical": {"0": (1, 6, 6), "2": (1, 6, 4), "4": (1, 5, 3)},
    "cnn": {"0": (1, 19, 4), "2": (2, 12, 2), "4": (1, 17, 2), "6": (1, 33, 3)},
}
OPERATIONS = (
    "all_reduce",
    "reduce",
    "broadcast",
    "gather",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "scatter",
    "send",
    "barrier",
    "all_gather_object",
    "broadcast_object_list",
)
RUNS = {
    "comm_opt": Run("mlp-categorical"),
    "mem_opt": Run("mlp-categorical", strategy="mem_opt"),
    "half": Run("mlp-categorical", strategy=0.5),
    "eigen": Run("cnn", options={"damping_method": "eigen"}),
    "input side": Run("cnn", "empirical", "mem_opt", options={"factor_sides": "input"}),
}


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(operation, bytes) of every collective of torch.distributed."""
    calls: list[tuple[str, int]] = []
    before = {name: getattr(dist, name) for name in OPERATIONS}

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            size = sum(a.numel() * a.element_size() for a in args if isinstance(a, torch.Tensor))
            calls.append((name, size))
            return function(*args, **kwargs)

        return call

    try:
        for name, function in before.items():
            setattr(dist, name, spy(name, function))
        yield calls
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def traffic(rank: int, world_size: int) -> dict[str, list[tuple[dict[str, float], list[tuple[str, int]]]]]:
    """Run -> by step, the metrics of the traffic and what torch.distributed was asked to send."""
    result: dict[str, Any] = {}
    for key, run in RUNS.items():
        case, model, kfac, optimizer = build(run, world_size)
        result[key] = []
        for step in STEPS:
            with counted() as calls:
                advance(run, case, model, kfac, optimizer, step, rank, world_size)
            said = {name: kfac.metrics[name] for name in kfac.metrics if name.startswith(("collectives/", "bytes/"))}
            result[key].append((said, calls))
        kfac.close()
    return result


@pytest.fixture(scope="module")
def measured(ranks: RankPool) -> dict[int, list[dict]]:
    return {world_size: ranks.run(world_size, traffic) for world_size in (2, 4)}


def triangle(d: int) -> int:
    return d * (d + 1) // 2


def factor_words(case: str, world_size: int, sides: str = "both") -> int:
    """Upper triangles, and the header: 3 flags, samples, elements, sum, taken, rows per layer, 2 checksums per rank."""
    layers = LAYERS[case].values()
    sums = sum(n * (triangle(a) + (triangle(g) if sides == "both" else 0)) for n, a, g in layers)
    return sums + 7 + len(layers) + 2 * world_size


def check(steps: list[tuple[dict[str, float], list[tuple[str, int]]]], wanted: dict[str, tuple[tuple, int]]) -> None:
    """``wanted``: phase -> the steps on which it talks, once, and the words it sends then."""
    for step, (said, calls) in enumerate(steps):
        talks = {phase: words * BYTES for phase, (when, words) in wanted.items() if step in when and words}
        assert {key: value for key, value in said.items() if key.startswith("bytes/")} == {
            f"bytes/{phase}": size for phase, size in talks.items()
        }, step
        assert {key: value for key, value in said.items() if key.startswith("collectives/")} == {
            f"collectives/{phase}": 1 for phase in talks
        }, step
        assert calls == [("all_reduce", talks[phase]) for phase in wanted if phase in talks]


def gradient_words(case: str) -> int:
    return PARAMETERS[case] + TENSORS[case]  # the flags: who has a gradient


@pytest.mark.parametrize("world_size", [2, 4])
def test_comm_opt(world_size: int, measured: dict[int, list[dict]]) -> None:
    case = "mlp-categorical"
    inverses = sum(n * (triangle(a) + triangle(g)) + 2 for n, a, g in LAYERS[case].values())
    for answer in measured[world_size]:
        check(
            answer["comm_opt"],
            {
                "gradients": (tuple(STEPS), gradient_words(case)),
                "factors": (FACTOR_STEPS, factor_words(case, world_size)),
                "inverses": (INVERSE_STEPS, inverses),
            },
        )


@pytest.mark.parametrize("world_size", [2, 4])
def test_eigenbases_send_full_matrices_and_values(world_size: int, measured: dict[int, list[dict]]) -> None:
    inverses = sum(n * (a * a + a + g * g + g) + 2 for n, a, g in LAYERS["cnn"].values())
    for answer in measured[world_size]:
        check(
            answer["eigen"],
            {
                "gradients": (tuple(STEPS), gradient_words("cnn")),
                "factors": (FACTOR_STEPS, factor_words("cnn", world_size)),
                "inverses": (INVERSE_STEPS, inverses),
            },
        )


@pytest.mark.parametrize(
    ("key", "case", "sides"), [("mem_opt", "mlp-categorical", "both"), ("input side", "cnn", "input")]
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_mem_opt_sends_directions_and_no_inverses(
    world_size: int, key: str, case: str, sides: str, measured: dict[int, list[dict]]
) -> None:
    for answer in measured[world_size]:
        check(
            answer[key],
            {
                "gradients": (tuple(STEPS), gradient_words(case)),
                "factors": (FACTOR_STEPS, factor_words(case, world_size, sides)),
                "directions": (tuple(STEPS), sum(n * a * g for n, a, g in LAYERS[case].values())),
            },
        )


def test_half_of_four_ranks_does_both(measured: dict[int, list[dict]]) -> None:
    case, layers = "mlp-categorical", LAYERS["mlp-categorical"]
    sent = []
    for answer in measured[4]:
        sent.append(answer["half"][0][0]["bytes/inverses"] / BYTES)
        check(
            answer["half"],
            {
                "gradients": (tuple(STEPS), gradient_words(case)),
                "factors": (FACTOR_STEPS, factor_words(case, 4)),
                "inverses": (INVERSE_STEPS, round(sent[-1])),
                "directions": (tuple(STEPS), sum(n * a * g for n, a, g in layers.values())),
            },
        )
    # Two columns of two ranks: each sends the inverses of its own layers among itself.
    assert sent[0] == sent[1]
    assert sent[2] == sent[3]
    assert sent[0] + sent[2] == sum(n * (triangle(a) + triangle(g)) + 2 for n, a, g in layers.values())
    assert 0 < sent[0] < sent[0] + sent[2]


def test_one_rank_sends_nothing() -> None:
    run = RUNS["mem_opt"]
    case, model, kfac, optimizer = build(run)
    advance(run, case, model, kfac, optimizer, 0)
    assert not [name for name in kfac.metrics if name.startswith(("collectives/", "bytes/"))]
    kfac.close()
