"""How processes of each launcher find one another; that they do is shown by the trainings of test_end_to_end.py."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from kfac_dist.comm import mpi, torch_dist
from kfac_dist.launch import connect, train
from tests.helpers.launched import FOREIGN
from tests.test_environment import MPICH, OPEN_MPI, SLURM, TORCHRUN


class FakeMPI:
    """An MPI world in which this process is ``rank`` of ``size``, and rank 0 says what it is given."""

    def __init__(self, rank: int, size: int) -> None:
        self.Get_rank, self.Get_size = lambda: rank, lambda: size

    def Bcast(self, place: bytearray, root: int) -> None:  # noqa: N802 - mpi4py's name
        if not any(place):
            place[:10] = b"1234 first"


@pytest.fixture
def connecting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Connect under a launcher's variables: what torch.distributed was asked for."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, **options: asked.update(options, args=args)
    )
    monkeypatch.setattr(mpi, "load_mpi", lambda: types.SimpleNamespace(COMM_WORLD=FakeMPI(1, 2)))

    def run(variables: dict[str, str], **options: Any) -> dict[str, Any]:
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        here = connect(**options)
        return {} if not asked else asked | {"here": here.rank}

    return run


@pytest.mark.parametrize(
    ("variables", "rank", "size", "method"),
    [
        (TORCHRUN, 3, 4, "env://"),
        (SLURM, 5, 6, "tcp://node08:19567"),
        (OPEN_MPI, 1, 2, "tcp://first:1234"),
    ],
)
def test_each_launcher_says_where_to_meet(connecting, variables, rank, size, method):
    asked = connecting(variables, backend="gloo", timeout=9.0)
    assert asked == {
        "args": ("gloo",),
        "init_method": method,
        "rank": rank,
        "world_size": size,
        "timeout": timedelta(seconds=9),
        "here": rank,
    }


def test_one_process_stays_as_it_is(connecting):
    assert connecting({}) == {}


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (1, "gloo"), (2, "nccl")])
def test_nccl_needs_a_gpu_for_each_process_of_the_node(connecting, monkeypatch, gpus, backend):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert connecting(TORCHRUN)["args"] == (backend,)
    assert chosen == ([1] if backend == "nccl" else [])


def test_an_mpi_that_is_not_the_launchers_is_refused(connecting):
    with pytest.raises(ValueError, match="this is rank 1 of 3 to the launcher, and rank 1 of 2 to mpi4py: start the"):
        connecting(MPICH)


def test_a_launcher_without_an_address_is_refused(connecting):
    nowhere = {name: value for name, value in SLURM.items() if "NODELIST" not in name}
    with pytest.raises(ValueError, match="slurm names no place to meet: set MASTER_ADDR and MASTER_PORT"):
        connecting(nowhere)


def test_rank_0_offers_a_free_port_of_its_own(monkeypatch):
    monkeypatch.setattr(mpi, "load_mpi", lambda: types.SimpleNamespace(COMM_WORLD=FakeMPI(0, 2)))
    host, port = mpi.rendezvous(0, 2)
    assert host
    assert 1024 <= port < 65536


@pytest.mark.parametrize("begin", ["connect()", "KFAC on a group", "kfac-dist fit"])
def test_the_end_of_the_process_waits_for_the_threads_of_gloo(connecting, monkeypatch, begin):
    at_exit: list[Callable[[], None]] = []
    slept: list[float] = []
    monkeypatch.setattr(torch_dist.atexit, "register", at_exit.append)
    monkeypatch.setattr(torch_dist.atexit, "unregister", lambda function: None)
    monkeypatch.setattr(torch_dist.time, "sleep", slept.append)
    if begin == "connect()":
        connecting(TORCHRUN, backend="gloo")
    elif begin == "kfac-dist fit":
        monkeypatch.setattr(train, "TrainingCLI", lambda argv: None)
        train.main(["fit"])
    else:
        monkeypatch.setattr(torch_dist.TorchCommunicator, "world", lambda self: (0, 2))
        monkeypatch.setattr(torch_dist.dist, "get_rank", lambda group: 0)
        monkeypatch.setattr(torch_dist.dist, "get_world_size", lambda group: 2)
        torch_dist.TorchCommunicator(object())
    for function in at_exit:
        function()
    assert slept == [torch_dist.SETTLE_SECONDS]
