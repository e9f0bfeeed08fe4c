from __future__ import annotations

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankError, RankPool

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")


def sum_over_ranks(rank: int, world_size: int, scale: float, offset: float = 0.0) -> dict[str, object]:
    warnings.warn("a warning is no failure", stacklevel=1)
    total = torch.full((2,), scale * (rank + 1), dtype=torch.float64)
    dist.all_reduce(total)
    return {"sum": total + offset, "rank": dist.get_rank(), "size": dist.get_world_size(), "pid": os.getpid()}


def raise_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the factor of layer 3")


def leave_peers_alone(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ValueError("rank 0 gave up")
    dist.all_reduce(torch.ones(1))


def sleep_on_rank_one(rank: int, world_size: int) -> int:
    if rank == 1:
        time.sleep(60)
    return rank


def exit_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def launch_variables(rank: int, world_size: int) -> dict[str, str | None]:
    assert not dist.is_initialized()
    os.environ["LEFT_BEHIND"] = "1"
    dist.init_process_group("gloo")  # env://, and left open on purpose
    return {name: os.environ.get(name) for name in LAUNCH_VARIABLES}


def traces_of_an_earlier_job(rank: int, world_size: int) -> list[str]:
    return [name for name in (*LAUNCH_VARIABLES, "LEFT_BEHIND") if name in os.environ]


@pytest.fixture(scope="module")
def own_pool():
    """Tests that kill the workers leave the shared ones alone."""
    pool = RankPool(workers=2)
    yield pool
    pool.close()


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_values_come_back_by_rank(ranks, world_size):
    results = ranks.run(world_size, sum_over_ranks, 2.0, offset=1.0)
    total = 2.0 * world_size * (world_size + 1) / 2 + 1.0
    for rank, result in enumerate(results):
        assert torch.equal(result["sum"], torch.full((2,), total, dtype=torch.float64))
        assert (result["rank"], result["size"]) == (rank, world_size)


def test_workers_are_reused_also_after_an_exception(ranks):
    before = [result["pid"] for result in ranks.run(3, sum_over_ranks, 1.0)]
    with pytest.raises(RankError, match=r"(?s)failed on 1 of 3 ranks.*rank 1 of 3.*KeyError: 'the factor of layer 3'"):
        ranks.run(3, raise_on_rank_one)
    assert [result["pid"] for result in ranks.run(3, sum_over_ranks, 1.0)] == before


def test_every_ranks_traceback_is_listed(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2.*ValueError: rank 0 gave up.*rank 1 of 2.*all_reduce"):
        ranks.run(2, leave_peers_alone)


def test_a_result_that_cannot_travel_is_an_error(ranks):
    with pytest.raises(RankError, match="pickle"):
        ranks.run(1, unpicklable)


def test_without_a_group_the_variables_are_torchruns_and_nothing_is_left(ranks):
    for rank, seen in enumerate(ranks.run(2, launch_variables, init=False)):
        assert seen == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_RUN_ID": "rank-pool",
        }
    assert ranks.run(2, traces_of_an_earlier_job) == [[], []]


def test_silence_and_death_are_reported_and_the_next_run_recovers(own_pool):
    with pytest.raises(RankError, match=r"failed on 1 of 2 ranks\n--- rank 1 of 2: silent for 3 s"):
        own_pool.run(2, sleep_on_rank_one, timeout=3)
    with pytest.raises(RankError, match=r"failed on 1 of 2 ranks\n--- rank 1 of 2: the process died with exit code 3"):
        own_pool.run(2, exit_on_rank_one, timeout=20)
    assert len(own_pool.run(2, sum_over_ranks, 1.0)) == 2


@pytest.mark.parametrize("world_size", [0, 5])
def test_world_size_is_bounded(ranks, world_size):
    with pytest.raises(ValueError, match=f"world_size={world_size} must be at least 1 and at most 4"):
        ranks.run(world_size, sum_over_ranks, 1.0)
