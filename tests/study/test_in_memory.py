from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from kfac_dist.study.in_memory import InMemoryDataset, already_collated
from kfac_dist.study.mnist import MNISTDigits


def rows(count: int) -> InMemoryDataset:
    return InMemoryDataset(torch.arange(count), torch.arange(count) * 10)


def test_batches_keep_rows_together_and_drop_nothing() -> None:
    batches = list(DataLoader(rows(10), batch_size=4, shuffle=True, collate_fn=already_collated))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert all(torch.equal(y, 10 * x) for x, y in batches)
    assert sorted(torch.cat([x for x, _ in batches]).tolist()) == list(range(10))


def test_a_batch_is_what_its_samples_are_one_by_one() -> None:
    data = rows(6)
    batch = data.__getitems__([4, 1])
    singles = [data[4], data[1]]
    assert all(torch.equal(batch[k], torch.stack([s[k] for s in singles])) for k in (0, 1))


def test_distributed_samplers_share_the_samples_out() -> None:
    seen = []
    for rank in (0, 1):
        sampler = DistributedSampler(rows(10), num_replicas=2, rank=rank, shuffle=True, seed=3)
        loader = DataLoader(rows(10), batch_size=3, sampler=sampler, collate_fn=already_collated)
        seen.append(torch.cat([x for x, _ in loader]).tolist())
    assert [len(part) for part in seen] == [5, 5]
    assert sorted(seen[0] + seen[1]) == list(range(10))


def test_data_set_can_be_pickled_for_workers() -> None:
    assert torch.equal(pickle.loads(pickle.dumps(rows(3))).tensors[1], torch.tensor([0, 10, 20]))
    assert pickle.loads(pickle.dumps(already_collated)) is already_collated


def test_tensors_of_unlike_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        InMemoryDataset(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="at least one tensor"):
        InMemoryDataset()


def test_wrong_use_of_a_data_module_names_the_cure() -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        MNISTDigits(batch_size=0)
    with pytest.raises(RuntimeError, match=r"MNISTDigits\.setup\(\)"):
        MNISTDigits().train_dataloader()
