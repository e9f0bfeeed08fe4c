"""One body for every backend: what a communicator of any kind must answer, at one rank and at three."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kfac_dist.comm import CommunicationError, Communicator, communicators, make_communicator

# How the ranks of a backend come to be here; a backend that needs another launcher has its file beside this one.
IN_THE_POOL = {"single", "torch"}


def value(rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.arange(6, dtype=dtype) + 10 * rank).reshape(2, 3)


def check_collectives(comm: Communicator) -> None:
    rank, size, last = comm.rank, comm.size, comm.size - 1
    total = sum((value(r) for r in range(size)), torch.zeros(2, 3, dtype=torch.float64))
    for dtype in (torch.float64, torch.float32, torch.int64):
        tensor = value(rank, dtype)
        comm.all_reduce(tensor, "sums")
        assert torch.equal(tensor, total.to(dtype))
    for root in range(size):
        tensor = value(rank)
        comm.reduce(tensor, root, "sums")
        if rank == root:
            assert torch.equal(tensor, total)
        tensor = value(rank)
        comm.broadcast(tensor, root, "inverses")
        assert torch.equal(tensor, value(root))
        tensor = value(rank)
        received = comm.gather(tensor, root, "sums")
        assert (received is not None) == (rank == root)
        if received is not None:
            assert len(received) == size
            assert all(torch.equal(there, value(r)) for r, there in enumerate(received))
            assert all(there.data_ptr() != tensor.data_ptr() for there in received)
    empty = torch.empty(0)
    comm.all_reduce(empty, "sums")
    comm.barrier("end")
    comm.traffic.clear()
    comm.all_reduce(torch.zeros(5, dtype=torch.float32), "factors")
    comm.broadcast(torch.zeros(7, dtype=torch.float64), last, "inverses")
    comm.broadcast(torch.zeros(2, dtype=torch.float64), 0, "inverses")
    counted = size > 1
    assert comm.traffic.collectives == ({"factors": 1, "inverses": 2} if counted else {})
    assert comm.traffic.payload_bytes == ({"factors": 20, "inverses": 72} if counted else {})


def check_pending(comm: Communicator) -> None:
    """The non-blocking forms, several under way at once, some beside a blocking one, waited for in another order."""
    rank, size, last = comm.rank, comm.size, comm.size - 1
    total = sum((value(r) for r in range(size)), torch.zeros(2, 3, dtype=torch.float64))
    comm.traffic.clear()
    reduced, summed, sent, gathered = (value(rank) for _ in range(4))
    pending = [
        comm.all_reduce_async(summed, "sums"),
        comm.reduce_async(reduced, last, "sums"),
        comm.broadcast_async(sent, last, "inverses"),
        comm.gather_async(gathered, last, "sums"),
    ]
    comm.all_reduce(between := value(rank), "between")
    assert torch.equal(between, total)
    results = [each.wait() for each in reversed(pending)]
    received = results[0]
    assert results[1:] == [None, None, None]
    assert torch.equal(summed, total)
    assert torch.equal(sent, value(last))
    assert torch.equal(gathered, value(rank))
    assert (received is not None) == (rank == last)
    if received is not None:
        assert torch.equal(reduced, total)
        assert all(torch.equal(there, value(r)) for r, there in enumerate(received))
        assert all(there.data_ptr() != gathered.data_ptr() for there in received)
    assert pending[3].wait() is received  # waiting twice gives the same
    assert torch.equal(summed, total)
    assert comm.traffic.collectives == ({"sums": 3, "inverses": 1, "between": 1} if size > 1 else {})


def check_arguments(comm: Communicator) -> None:
    comm.traffic.clear()
    crooked = torch.zeros(2, 3).t()
    for call in (
        lambda: comm.all_reduce(crooked, "factors"),
        lambda: comm.reduce(crooked, 0, "factors"),
        lambda: comm.broadcast(crooked, 0, "factors"),
        lambda: comm.gather(crooked, 0, "factors"),
        lambda: comm.all_reduce_async(crooked, "factors"),
        lambda: comm.reduce_async(crooked, 0, "factors"),
        lambda: comm.broadcast_async(crooked, 0, "factors"),
        lambda: comm.gather_async(crooked, 0, "factors"),
    ):
        with pytest.raises(ValueError, match=r"shape \(3, 2\) with strides \(1, 3\) is not contiguous"):
            call()
    for call in (
        lambda: comm.reduce(torch.zeros(1), comm.size, "factors"),
        lambda: comm.broadcast(torch.zeros(1), -1, "factors"),
        lambda: comm.gather(torch.zeros(1), comm.size, "factors"),
        lambda: comm.gather_async(torch.zeros(1), -1, "factors"),
    ):
        with pytest.raises(ValueError, match=f"below the number of ranks, {comm.size}"):
            call()
    for groups in ([], [[0], [0]], [list(range(comm.size + 1))]):
        with pytest.raises(ValueError, match="must hold every rank"):
            comm.split(groups)
    assert comm.traffic.collectives == {}


def check_split(comm: Communicator) -> None:
    rank, size = comm.rank, comm.size
    comm.traffic.clear()
    pair = [0, size - 1] if size > 1 else [0]
    groups = [pair, *([r] for r in range(size) if r not in pair)]
    mine = next(group for group in groups if rank in group)
    part = comm.split(groups)
    assert (part.rank, part.size) == (mine.index(rank), len(mine))
    assert part.traffic is comm.traffic
    tensor = value(rank)
    part.all_reduce(tensor, "rows")
    assert torch.equal(tensor, sum((value(r) for r in mine), torch.zeros(2, 3, dtype=torch.float64)))
    part.broadcast(tensor := value(rank), part.size - 1, "rows")
    assert torch.equal(tensor, value(mine[-1]))
    received = part.gather(value(rank), 0, "rows")
    assert (received is not None) == (rank == mine[0])
    if received is not None:
        assert all(torch.equal(there, value(r)) for r, there in zip(mine, received, strict=True))
    part.barrier("rows")
    # reversed order, and the whole as one group: the same ranks once more
    whole = comm.split([list(reversed(range(size)))])
    assert (whole.rank, whole.size) == (rank, size)
    whole.all_reduce(tensor := value(rank), "rows")
    sent = {"rows": (3 if len(mine) > 1 else 0) + (1 if size > 1 else 0)}
    assert comm.traffic.collectives == {phase: n for phase, n in sent.items() if n}


def conformance(rank: int, world_size: int, backend: str) -> tuple[int, int]:
    comm = make_communicator(backend, timeout=30.0)
    assert isinstance(comm, Communicator)
    assert type(comm).world() == (comm.rank, comm.size)
    check_collectives(comm)
    check_pending(comm)
    check_arguments(comm)
    check_split(comm)
    comm.close()
    comm.close()
    return comm.rank, comm.size


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("backend", list(communicators))
def test_backend_conforms(ranks, backend, world_size):
    if backend not in IN_THE_POOL:
        own_file = Path(__file__).with_name(f"test_{backend}.py")
        assert own_file.exists(), f"{backend!r} needs its own launcher: run conformance() under it in {own_file}"
        return
    seen = ranks.run(world_size, conformance, backend)
    assert seen == ([(0, 1)] * world_size if backend == "single" else [(r, world_size) for r in range(world_size)])


def failing_peer(rank: int, world_size: int) -> str:
    comm = make_communicator("torch", timeout=4.0)
    comm.barrier("setup")
    if rank == 1:
        dist.destroy_process_group()
        return "left"
    with pytest.raises(CommunicationError) as caught:
        comm.all_reduce(torch.zeros(3), "factors")
    assert isinstance(caught.value.__cause__, RuntimeError)
    return str(caught.value)


def test_an_error_names_phase_operation_rank_and_size(ranks):
    message, left = ranks.run(2, failing_peer)
    assert left == "left"
    start = "factors: all_reduce on rank 0 of 2 failed: no word from global rank 1 within 1 s: ended, frozen or far"
    assert message.startswith(start)
    assert len(message) > len(start) + len(" behind; ")  # what the transport said


def failing_peer_of_a_part(rank: int, world_size: int) -> str | None:
    """In the group of the ranks 1 and 3, one leaves; the others fail elsewhere."""
    comm = make_communicator("torch", timeout=4.0)
    part = comm.split([[1, 3], [0, 2]])
    comm.barrier("setup")
    if rank == 3:
        dist.destroy_process_group()
        return None
    with pytest.raises(CommunicationError) as caught:
        part.all_reduce(torch.zeros(3), "rows") if rank == 1 else comm.barrier("the end")
    return str(caught.value)


def test_who_did_not_come_has_the_number_of_the_whole_job(ranks):
    first, second, third, fourth = ranks.run(4, failing_peer_of_a_part)
    assert fourth is None
    assert "rows: all_reduce on rank 0 of 2 failed: no word from global rank 3 within 1 s: " in second
    for other in (first, third):
        assert other.startswith("the end: barrier on rank ")
        assert (
            "failed: no word from global rank 3 within 1 s: ended, frozen or far behind; global rank 1 failed in "
            in other
        )


def cannot_be_summed(rank: int, world_size: int) -> str:
    comm = make_communicator("torch", timeout=20.0)
    comm.barrier("setup")
    with pytest.raises(CommunicationError) as caught:
        comm.all_reduce(torch.zeros(3, dtype=torch.uint16), "factors")
    return str(caught.value)


def test_where_all_ranks_fail_nobody_is_missing(ranks):
    for rank, message in enumerate(ranks.run(2, cannot_be_summed)):
        assert message.startswith(f"factors: all_reduce on rank {rank} of 2 failed: ")
        assert "global rank" not in message


def late_peer(rank: int, world_size: int) -> str:
    comm = make_communicator("torch", timeout=2.0)
    comm.barrier("setup")
    outcome = "late"
    if rank == 1:
        with pytest.raises(CommunicationError) as caught:
            comm.all_reduce(torch.zeros(3), "factors")
        outcome = str(caught.value)
    dist.barrier()  # on the default group: rank 0 waits here until rank 1 has given up
    return outcome


def test_our_own_time_out_holds_on_our_own_group(ranks):
    late, gave_up = ranks.run(2, late_peer)
    assert late == "late"
    assert gave_up.startswith("factors: all_reduce on rank 1 of 2 failed: ")


def closing(rank: int, world_size: int) -> None:
    outer = dist.new_group()
    given = make_communicator("auto", outer)
    part = given.split([[0, 1], [2]])
    given.close()
    for closed in (given, part):
        if closed.size > 1:
            with pytest.raises(CommunicationError, match=r"factors: all_reduce on rank \d of \d: .* is closed"):
                closed.all_reduce(torch.zeros(1), "factors")
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=outer)  # a group that we were given stays open
    assert tensor.item() == 3
    made = make_communicator("auto")
    dist.destroy_process_group()
    made.close()


def test_close_gives_back_only_what_it_made(ranks):
    ranks.run(3, closing)


def on_some_ranks_only(rank: int, world_size: int) -> tuple[int, int] | None:
    members = [1, 2, 3]
    group = dist.new_group(members)
    if rank not in members:
        with pytest.raises(ValueError, match="not a member of process_group"):
            make_communicator("torch", group)
        return None
    comm = make_communicator("auto", group, timeout=20.0)
    check_collectives(comm)
    check_split(comm)
    comm.close()
    return comm.rank, comm.size


def test_group_ranks_count_in_a_group_of_some_ranks(ranks):
    assert ranks.run(4, on_some_ranks_only) == [None, (0, 3), (1, 3), (2, 3)]


def test_auto_is_one_process_where_torch_distributed_is_not_initialised():
    comm = make_communicator()
    assert (comm.rank, comm.size) == (0, 1)
    check_collectives(comm)
    with pytest.raises(ValueError, match=r"torch backend needs torch\.distributed"):
        make_communicator("torch")
    with pytest.raises(ValueError, match=r"unknown communication backend 'nccl'; known: .*single, torch"):
        make_communicator("nccl")
