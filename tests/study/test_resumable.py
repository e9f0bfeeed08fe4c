from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from kfac_dist.study.resumable import ResumableLoader

DATA = TensorDataset(torch.arange(10.0))


def batches(loader: ResumableLoader) -> list[list[float]]:
    return [batch[0].tolist() for batch in loader]


def shuffled() -> ResumableLoader:
    return ResumableLoader(DATA, batch_size=3, shuffle=True)


@pytest.mark.parametrize("served", [1, 2, 3])
def test_a_resumed_epoch_gets_the_rest_in_the_same_order_and_so_do_the_later_ones(served):
    torch.manual_seed(3)
    loader = shuffled()
    first, second = batches(loader), batches(loader)
    torch.manual_seed(3)
    interrupted = shuffled()
    assert [batch[0].tolist() for batch in itertools.islice(interrupted, served)] == first[:served]
    state = interrupted.state_dict()
    assert state["batches"] == served
    torch.manual_seed(99)
    resumed = shuffled()
    resumed.load_state_dict(state)
    assert batches(resumed) == first[served:]
    assert batches(resumed) == second


def test_the_random_stream_goes_on_from_where_the_state_was_taken():
    torch.manual_seed(3)
    loader = shuffled()
    next(iter(loader))
    state, wanted = loader.state_dict(), torch.rand(3)
    torch.manual_seed(99)
    resumed = shuffled()
    resumed.load_state_dict(state)
    next(iter(resumed))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("served", [0, 4])
def test_between_epochs_there_is_nothing_to_resume(served):
    loader = shuffled()
    list(itertools.islice(loader, served))
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    assert len(batches(loader)) == 4


def test_a_sampler_with_a_seed_of_its_own():
    def seeded() -> ResumableLoader:
        sampler = DistributedSampler(DATA, num_replicas=2, rank=1, seed=5)
        sampler.set_epoch(7)
        return ResumableLoader(DATA, batch_size=2, sampler=sampler)

    loader = seeded()
    wanted = batches(loader)
    list(itertools.islice(loader, 2))
    resumed = seeded()
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed) == wanted[2:]


def test_the_state_is_fit_for_a_checkpoint_of_weights_only(tmp_path):
    loader = shuffled()
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["batches"] == 1
