"""The coarse level on 2, 3 and 4 gloo ranks: equal to one rank, traffic by formula, no hang when a solve fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kfac_dist import CoarseConfig
from kfac_dist.coarse_solver import CoarseOperator, Status, factorise
from kfac_dist.fisher import Fisher
from tests.helpers.ranks import RankError, RankPool
from tests.helpers.training import Run, Trajectory, advance, build, train, train_all
from tests.test_coarse_identities import SPACES

TOLERANCE = 1e-10
STEPS = 5
"""Factors at 0, 2 and 4; a rank without samples (or with one only) sees the curvature batch of step 4."""
STRATEGIES: dict[int, tuple[str | float, ...]] = {2: ("comm_opt", "mem_opt"), 3: ("comm_opt", "mem_opt"), 4: (0.5,)}
LAYERS = {"mlp-categorical": [(1, 6, 6), (1, 4, 6), (1, 3, 5)], "cnn": [(1, 4, 19), (2, 2, 12), (1, 2, 17), (1, 3, 33)]}
"""groups, d_out, d_in"""


def run_of(case: str, space: str, k: int = 1, variant: str | None = None, fisher: str = "true", **more: Any) -> Run:
    options = {key: more.pop(key) for key in ("kl_clip", "damping_method", "factor_sides") if key in more}
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


# -- a solve that fails -----------------------------------------------------------------------------------------------


def failed(E: Tensor) -> CoarseOperator:
    return factorise(torch.full_like(E, float("nan")))


def not_finite(E: Tensor) -> CoarseOperator:
    return CoarseOperator(E, Status.SOLVED, 1.0, torch.full_like(E, float("nan")))


def gives_up(E: Tensor) -> CoarseOperator:
    """A singular operator, and an eigenvalue iteration that raises."""
    with mock.patch("torch.linalg.eigh", side_effect=torch.linalg.LinAlgError("did not converge")):
        return factorise(torch.ones_like(E))


BROKEN = 3


def broken_steps(rank: int, world_size: int, key: str, strategy: str, how: str) -> list[dict[str, Any]]:
    """The first three solves fail on rank 0, which is the only one that solves."""
    run = replace(RUNS[key], strategy=strategy)
    case, model, kfac, optimizer = build(run, world_size)
    result = []
    for step in range(STEPS):
        broken = rank == 0 and step < BROKEN
        with mock.patch("kfac_dist.two_level.factorise", globals()[how] if broken else factorise):
            gradients = advance(run, case, model, kfac, optimizer, step, rank, world_size)
        result.append({"gradients": gradients, "metrics": dict(kfac.metrics)})
    kfac.close()
    return result


@pytest.mark.parametrize(
    ("key", "strategy", "how"),
    [
        ("cnn momentum", "mem_opt", "failed"),
        ("nicolaides", "comm_opt", "failed"),
        ("nicolaides", "mem_opt", "not_finite"),
        ("nicolaides", "mem_opt", "gives_up"),
        ("nicolaides balanced", "mem_opt", "failed"),
        ("nicolaides deflated", "comm_opt", "not_finite"),
    ],
)
def test_a_failed_solve_is_a_one_level_step_on_every_rank(ranks: RankPool, key: str, strategy: str, how: str) -> None:
    one_level = train(0, 1, replace(RUNS[key], options=RUNS[key].options | {"coarse": None}))
    answers = ranks.run(2, broken_steps, key, strategy, how, timeout=60)
    for answer in answers:
        assert [step["metrics"]["corrected"] for step in answer] == [0, 0, 0, 1, 1]
        assert [step["metrics"]["coarse/failures"] for step in answer] == [1, 2, 3, 3, 3]
    for step in range(STEPS):
        first, second, wanted = (
            torch.cat([g.flatten() for g in gradients.values()])
            for gradients in (answers[0][step]["gradients"], answers[1][step]["gradients"], one_level.gradients[step])
        )
        assert torch.equal(first, second)
        difference = torch.linalg.norm(first - wanted) / torch.linalg.norm(wanted)
        assert difference < 1e-10 if step < BROKEN else difference > 1e-3


# -- a rank whose samples are not finite ------------------------------------------------------------------------------


def overflow_on_rank_1(rank: int, world_size: int) -> list[dict[str, float]]:
    """Its sampled pass of step 0 gives no finite gradients; the next curvature batch is that of step 2."""
    run = run_of("mlp-categorical", "layer_step_residual")
    case, model, kfac, optimizer = build(replace(run, even=True), world_size)
    original, metrics = Fisher._gradients_at, []

    def overflows(self: Fisher, calls: Any, *more: Any) -> Any:
        return [g * float("inf") for g in original(self, calls, *more)]

    for step in range(3):
        broken = rank == 1 and step == 0
        with mock.patch.object(Fisher, "_gradients_at", overflows if broken else original):
            advance(replace(run, even=True), case, model, kfac, optimizer, step, rank, world_size)
        metrics.append(dict(kfac.metrics))
    kfac.close()
    return metrics


def test_samples_that_are_not_finite_stay_out(ranks: RankPool) -> None:
    """As that rank's statistics do: the coarse level goes on with what the other rank has."""
    for metrics in ranks.run(2, overflow_on_rank_1, timeout=60):
        assert [m["failed_ranks"] for m in metrics] == [1, 1, 1]
        assert [m["corrected"] for m in metrics] == [1, 1, 1]
        assert [m["coarse/failures"] for m in metrics] == [0, 0, 0]
        if "coarse/samples" in metrics[0]:  # rank 0 solves
            assert [m["coarse/samples"] for m in metrics] == [6, 6, 12]
