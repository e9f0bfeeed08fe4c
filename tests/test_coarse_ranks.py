"""The coarse level on 2, 3 and 4 gloo ranks: equal to one rank, and its traffic by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kfac_dist import CoarseConfig
from tests.helpers.ranks import RankError, RankPool
from tests.helpers.training import Run, Trajectory, train, train_all
from tests.test_coarse_identities import SPACES

TOLERANCE = 1e-10
STEPS = 5
"""Factors at 0, 2 and 4; a rank without samples (or with one only) sees the curvature batch of step 4."""
STRATEGIES: dict[int, tuple[str | float, ...]] = {2: ("comm_opt", "mem_opt"), 3: ("comm_opt", "mem_opt"), 4: (0.5,)}
LAYERS = {"mlp-categorical": [(1, 6, 6), (1, 4, 6), (1, 3, 5)], "cnn": [(1, 4, 19), (2, 2, 12), (1, 2, 17), (1, 3, 33)]}
LAYERS["tied"] = [(1, 4, 5), (1, 6, 5)]
LAYERS["tokens"] = [(1, 4, 6), (1, 4, 5), (1, 5, 5), (1, 3, 6)]
LAYERS["norms"] = [(1, 1, 8), (1, 5, 7), (1, 1, 5), (1, 1, 40), (1, 3, 21)]
LAYERS["slopes"] = [(1, 6, 6), (1, 1, 6), (1, 4, 7), (1, 1, 1), (1, 3, 5)]
"""groups, d_out, d_in"""


def run_of(case: str, space: str, k: int = 1, variant: str | None = None, fisher: str = "true", **more: Any) -> Run:
    options = {
        key: more.pop(key)
        for key in ("kl_clip", "damping_method", "factor_sides", "uncovered", "max_factor_dim", "large_factors")
        if key in more
    }
    coarse = CoarseConfig(
        space=space, vectors_per_layer=k, variant=variant, **({"damping": 0.3, "max_samples": None} | more)
    )
    return Run(case, fisher, steps=STEPS, options={"coarse": coarse} | options)


RUNS = {
    **{key: run_of("mlp-categorical", *spec) for key, spec in SPACES.items()},
    "tselepidis": run_of("mlp-categorical", "tselepidis"),
    "cnn tselepidis": run_of("cnn", "tselepidis", kl_clip=0.01),
    "cnn momentum": run_of("cnn", "layer_step_momentum", kl_clip=0.01),
    "cnn bands": run_of("cnn", "spectral_bands", 2, kl_clip=0.01, damping_method="eigen"),
    "cnn empirical": run_of("cnn", "layer_step_residual", fisher="empirical", kl_clip=0.01),
    "norms": run_of("norms", "layer_step_momentum", kl_clip=0.01),
    "slopes": run_of("slopes", "layer_step", uncovered="diagonal"),
    "tokens": run_of("tokens", "layer_step_residual", kl_clip=0.01),
    "tied": run_of("tied", "pcg", 2),
    "tied diagonal": run_of("tied", "spectral", 2, max_factor_dim=3, large_factors="diagonal"),
    "input side": run_of("shared", "layer_step_momentum", factor_sides="input"),
    "kept coefficients": run_of("mlp-categorical", "layer_step_momentum", every_n_steps=3),
    **{
        f"{space} {correction}": run_of("mlp-categorical", space, correction=correction)
        for space in ("nicolaides", "layer_step_momentum", "spectral")
        for correction in ("additive", "deflated", "balanced")
    },
}
FRACTION_RUNS = ("layer_step_momentum", "pcg", "spectral", "cnn bands", "nicolaides balanced")


def jobs_of(world_size: int) -> dict[str, Run]:
    names = FRACTION_RUNS if world_size == 4 else tuple(RUNS)
    return {
        f"{name}/{strategy}": replace(RUNS[name], strategy=strategy)
        for name in names
        for strategy in STRATEGIES[world_size]
    }


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Trajectory]:
    return {name: train(0, 1, run) for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def many_ranks(ranks: RankPool) -> Callable[[int], dict[str, list[Trajectory]]]:
    """World size -> "run/strategy" -> trajectories by rank; one job of the pool for each world size."""
    done: dict[int, Any] = {}

    def get(world_size: int) -> dict[str, list[Trajectory]]:
        if world_size not in done:
            jobs = jobs_of(world_size)
            try:
                answers = ranks.run(world_size, train_all, jobs, timeout=120)
                done[world_size] = {key: [answer[key] for answer in answers] for key in jobs}
            except RankError as error:  # once is enough: all cases wait for the same job
                done[world_size] = error
        if isinstance(done[world_size], RankError):
            raise done[world_size]
        return done[world_size]

    return get


@pytest.mark.parametrize(("world_size", "key"), [(n, key) for n in STRATEGIES for key in jobs_of(n)])
def test_ranks_equal_one_rank(
    world_size: int, key: str, one_rank: dict[str, Trajectory], many_ranks: Callable[[int], dict]
) -> None:
    wanted, found = one_rank[key.split("/")[0]], many_ranks(world_size)[key]
    for step, gradients in enumerate(wanted.gradients):
        for name, value in gradients.items():
            error = torch.linalg.norm(found[0].gradients[step][name] - value)
            assert error <= TOLERANCE * torch.linalg.norm(value), (step, name)
            for other in found[1:]:  # bit by bit on all ranks
                assert torch.equal(other.gradients[step][name], found[0].gradients[step][name])
        if not wanted.metrics[step]["corrected"] or "coarse/decrease" not in wanted.metrics[step]:
            continue
        for metric in ("coarse/decrease", "coarse/decrease_ratio", "coarse/samples"):
            assert found[0].metrics[step][metric] == pytest.approx(wanted.metrics[step][metric], rel=1e-8, abs=1e-12)
    assert all(trajectory.metrics[-1]["coarse/failures"] == 0 for trajectory in found)
    saved = [trajectory.state["coarse"] for trajectory in found]
    assert all(state["solves"] == wanted.state["coarse"]["solves"] > 1 for state in saved)
    for name, delta in (saved[0]["momentum"] or {}).items():
        assert all(torch.equal(delta, state["momentum"][name]) for state in saved[1:])


def sampled(rank: int, world_size: int, max_samples: int) -> list[float]:
    run = run_of("mlp-categorical", "layer_step", max_samples=max_samples)
    return [metrics.get("coarse/samples", -1.0) for metrics in train(rank, world_size, run).metrics]


def test_max_samples_is_shared_among_the_ranks(ranks: RankPool) -> None:
    """A quota each: 5 and 4 of (5, 7), (12, 0) and (6, 6) samples; what one has too few of the other does not add."""
    answers = ranks.run(2, sampled, 9)
    assert answers[0] == [9, 9, 9, 9, 5]  # curvature at steps 0, 2 and 4, where rank 1 has none
    assert ranks.run(3, sampled, 1)[0][:2] == [1, 1]


# -- traffic ----------------------------------------------------------------------------------------------------------


def formula(key: str, step: int, mem_opt: bool) -> dict[str, tuple[int, int]]:
    """Phase -> (collectives, words) of the coarse level in one step; world size does not enter."""
    run = RUNS[key]
    coarse, layers = run.options["coarse"], LAYERS[run.case]
    p, first = sum(g * o * i for g, o, i in layers), step == 0
    count = 1 if "scalar" in coarse.space else len(layers)
    k = coarse.vectors_per_layer + (coarse.space == "layer_step_residual")
    k += coarse.space.endswith("momentum") and not first  # no delta yet
    m = count * k
    zeta = coarse.space in ("pcg", "spectral_bands", "scalar") or "layer_step" in coarse.space
    zeta = zeta or coarse.space == "scalar_momentum"
    moments = 3 if coarse.space == "tselepidis" else 1
    words = {"coarse": (2, moments * m * (m + 1) // 2 + m + 1 + (not zeta) + m + 1)}
    products = {"pcg": k - 1, "residual": 1, "layer_step_residual": 1}.get(coarse.space, 0)
    products += coarse.variant == "residual"
    applied = {"krylov": k - 1 + (coarse.variant == "residual"), "pcg": k - 1, "spectral_bands": k}.get(coarse.space, 0)
    applied += "residual" in coarse.space
    if coarse.correction in ("deflated", "balanced"):
        products, applied = products + 1, applied + 1
    if coarse.correction == "balanced":  # a second restricted residual, and a second solution
        words["coarse"] = (4, words["coarse"][1] + 2 * (m + 1))
    if products:
        words["coarse_product"] = (products, products * (p + 1))
    if mem_opt:
        words["directions"] = (1 + applied, (1 + applied) * p)
    if coarse.space == "spectral" and step % 2 == 0:
        words["coarse_eigenvectors"] = (1, sum(k * g * (o + i) for g, o, i in layers))
    return words


PHASES = ("coarse", "coarse_product", "coarse_eigenvectors", "directions")


@pytest.mark.parametrize("strategy", ["comm_opt", "mem_opt"])
@pytest.mark.parametrize("key", [key for key in RUNS if key not in ("input side", "kept coefficients")])
def test_collectives_and_bytes(key: str, strategy: str, many_ranks: Callable[[int], dict]) -> None:
    for world_size in (2, 3):
        for trajectory in many_ranks(world_size)[f"{key}/{strategy}"]:
            for step, metrics in enumerate(trajectory.metrics):
                wanted = formula(key, step, strategy == "mem_opt")
                found = {
                    phase: (metrics[f"collectives/{phase}"], metrics[f"bytes/{phase}"] / 8)
                    for phase in PHASES
                    if f"bytes/{phase}" in metrics
                }
                assert found == wanted, step


def test_kept_coefficients_are_not_sent_again(many_ranks: Callable[[int], dict]) -> None:
    for trajectory in many_ranks(2)["kept coefficients/comm_opt"]:
        talks = ["bytes/coarse" in metrics for metrics in trajectory.metrics]
        assert talks == [True, True, False, True, False]  # step 1 has the first delta
