"""A rank that is killed or freezes, at every stage of the step: the others raise in time and say where, and who."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.comm import CommunicationError
from tests.helpers import faults
from tests.helpers.faults import Job, fault, run_doomed
from tests.helpers.training import Run, advance, build, layer_states

TIMEOUT = 6.0
PATIENCE = TIMEOUT / 4
STEP = 2  # of the fault; the steps before it are good ones

# Where it happens, how the work is spread, and the phases in which the others notice: a leaf of a reduce or a broadcast
# may be missed at the next step only.
STAGES = {
    "capture": ("comm_opt", ("gradients",)),
    "factors": ("comm_opt", ("factors",)),
    "inversion": ("comm_opt", ("inverses",)),
    "inverses": ("comm_opt", ("inverses",)),
    "directions": ("mem_opt", ("directions",)),
    "coarse product": ("comm_opt", ("coarse_product",)),
    "coarse eigenvectors": ("comm_opt", ("coarse_eigenvectors",)),
    "coarse reduce": ("mem_opt", ("coarse", "gradients")),
    "coarse solve": ("comm_opt", ("coarse",)),
    "coarse broadcast": ("mem_opt", ("coarse", "gradients")),
}
SPACES = {"coarse product": "residual", "coarse eigenvectors": "spectral"}
BEFORE_THE_AVERAGE = ("capture", "factors")
# (what, where, the victim counted from the last rank)
CASES = [
    *(("kill", stage, -1) for stage in STAGES if stage != "coarse solve"),
    *(("freeze", stage, -1) for stage in ("capture", "inversion", "coarse broadcast")),
    ("make_a_mistake", "capture", -1),  # an exception in the user's own part of the step
    *((what, stage, 0) for what in ("kill", "freeze") for stage in ("factors", "coarse solve")),
]


def space_of(stage: str) -> str:
    return SPACES.get(stage, "layer_step")


def run_of(stage: str) -> Run:
    options = {"factor_every_n_steps": 1, "inverse_every_n_steps": 1}
    coarse = {"coarse": CoarseConfig(space=space_of(stage), max_samples=None)}
    return Run("mlp-categorical", strategy=STAGES[stage][0], timeout=TIMEOUT, options=options | coarse)


def averages(kfac: KFACPreconditioner) -> list[Tensor]:
    states = layer_states(kfac).values()
    return [side for state in states if state.factors is not None for side in state.factors.sides().values()]


def struck(rank: int, world_size: int, what: str, stage: str, victim: int) -> dict[str, Any]:
    """What a survivor sees; the victim does not come back."""
    run = run_of(stage)
    case, model, kfac, optimizer = build(run, world_size)
    for step in range(STEP):
        advance(run, case, model, kfac, optimizer, step, rank, world_size)
    begin = time.monotonic()
    try:
        if rank == victim:
            with fault(stage, getattr(faults, what)):
                advance(run, case, model, kfac, optimizer, STEP, rank, world_size)
        for step in (STEP, STEP + 1):
            advance(run, case, model, kfac, optimizer, step, rank, world_size)
    except CommunicationError as error:
        return {"message": str(error), "seconds": time.monotonic() - begin, "averages": averages(kfac)}
    finally:
        kfac.close()
    raise AssertionError("nobody noticed")


@functools.cache
def on_one_rank(space: str) -> list[list[Tensor]]:
    """The averages after each step of the same training without a fault."""
    run = run_of(next(stage for stage in STAGES if space_of(stage) == space))
    case, model, kfac, optimizer = build(run)
    found = []
    for step in range(STEP + 1):
        advance(run, case, model, kfac, optimizer, step)
        found.append([side.clone() for side in averages(kfac)])
    kfac.close()
    return found


@pytest.fixture(scope="module")
def answers() -> dict[tuple[int, str, str, int], dict[int, dict[str, Any]]]:
    """All of them, side by side: most of the time they wait."""
    keys = [(size, what, stage, victim % size) for what, stage, victim in sorted(CASES) for size in (2, 3)]
    jobs = [Job(key[0], struck, key[1:], (key[-1],)) for key in keys]
    return dict(zip(keys, run_doomed(jobs, timeout=60.0), strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("what", "stage", "victim"), CASES)
def test_the_others_raise_in_time_and_say_where_and_who(
    answers: dict, what: str, stage: str, victim: int, world_size: int
) -> None:
    victim %= world_size
    survivors = answers[world_size, what, stage, victim]
    assert sorted(survivors) == [rank for rank in range(world_size) if rank != victim]
    for rank, seen in survivors.items():
        message = seen["message"]
        assert message.partition(":")[0] in STAGES[stage][1], message
        assert f" on rank {rank} of {world_size} failed: " in message
        if f"no word from global rank {victim} within {PATIENCE:g} s: ended, frozen or " not in message:
            assert rank != 0  # only the others can be left without the store: rank 0 has died, or has given up before
            assert "the store, held by global rank 0, does not answer" in message
        waited = TIMEOUT if what == "freeze" else 0.0
        assert waited <= seen["seconds"] < TIMEOUT + 2 * PATIENCE + 10.0, seen
        wanted = on_one_rank(space_of(stage))[STEP - (stage in BEFORE_THE_AVERAGE)]
        for found, there in zip(seen["averages"], wanted, strict=True):
            assert torch.linalg.norm(found - there) <= 1e-10 * torch.linalg.norm(there)
