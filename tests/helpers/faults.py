"""Faults on purpose: where in the step and what; and worlds of gloo ranks of their own, which may die of them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from kfac_dist import KFACPreconditioner, two_level
from kfac_dist.comm.torch_dist import TorchCommunicator
from kfac_dist.one_level import OneLevel
from tests.helpers.ranks import _free_port

START_SECONDS = 60.0

# -- where and what ---------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Any, str]] = {
    "capture": (KFACPreconditioner, "accumulate"),
    "inversion": (OneLevel, "update_inverses"),
    "coarse solve": (two_level, "factorise"),  # on rank 0 alone
}
COLLECTIVES = {
    "gradients": ("all_reduce", "gradients"),
    "factors": ("all_reduce", "factors"),
    "inverses": ("all_reduce", "inverses"),
    "directions": ("all_reduce", "directions"),
    "coarse product": ("all_reduce", "coarse_product"),
    "coarse eigenvectors": ("all_reduce", "coarse_eigenvectors"),
    "coarse reduce": ("reduce", "coarse"),
    "coarse broadcast": ("broadcast", "coarse"),
}


@contextmanager
def fault(point: str, act: Callable[[], None]) -> Iterator[None]:
    """``act`` just before the ``point`` of every step in this process: one of CALLS or of COLLECTIVES."""
    if point in CALLS:
        owner, name = CALLS[point]
        phase = None
    else:
        owner, (name, phase) = TorchCommunicator, COLLECTIVES[point]
    original = getattr(owner, name)

    def disturbed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if phase is None or phase in (*args, *kwargs.values()):
            act()
        return original(self, *args, **kwargs)

    with mock.patch.object(owner, name, disturbed):
        yield


def kill() -> None:
    """End as the kernel would end a process: no message, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """Stop all threads of this process, and keep its connections open."""
    os.kill(os.getpid(), signal.SIGSTOP)


def make_a_mistake() -> None:
    """An exception that is none of K-FAC's."""
    raise KeyError("a batch without labels")


# -- ranks that may die -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """``function(rank, world_size, *args)`` on all ranks; ``doomed`` ranks are not waited for."""

    world_size: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    doomed: tuple[int, ...]


def run_doomed(jobs: Sequence[Job], timeout: float, at_once: int = 4) -> list[dict[int, Any]]:
    """For each job the results of its surviving ranks; ranks are forked from a server that has imported torch.

    Args:
        jobs: each on a gloo group of its own, whose store rank 0 holds.
        timeout: seconds for a survivor.
        at_once: jobs side by side.

    Raises:
        AssertionError: a survivor raised, died, did not answer in time, or did not end after its answer.
    """
    context = multiprocessing.get_context("forkserver")
    # The first optimizer imports torch._dynamo, which takes seconds in every rank that has not inherited it.
    context.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "kfac_dist", __name__])
    answers: list[dict[int, Any]] = []
    for start in range(0, len(jobs), at_once):
        worlds = [_start(context, job) for job in jobs[start : start + at_once]]
        try:
            for job, (processes, pipes) in zip(jobs[start : start + at_once], worlds, strict=True):
                answers.append(_survivors(job, processes, pipes, timeout))
        finally:
            for process in (process for processes, _ in worlds for process in processes):
                process.kill()
                process.join(10)
    return answers


def _start(context: Any, job: Job) -> tuple[list[Any], list[Connection]]:
    port, processes, pipes = _free_port(), [], []
    for rank in range(job.world_size):
        here, there = context.Pipe()
        process = context.Process(target=_rank, args=(there, rank, job, port))
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    return processes, pipes


def _survivors(job: Job, processes: Sequence[Any], pipes: Sequence[Connection], timeout: float) -> dict[int, Any]:
    answers = {}
    end = time.monotonic() + timeout
    for rank in (rank for rank in range(job.world_size) if rank not in job.doomed):
        assert pipes[rank].poll(max(0.0, end - time.monotonic())), f"{job}: rank {rank} is silent for {timeout:g} s"
        try:
            ok, answers[rank] = pickle.loads(pipes[rank].recv_bytes())
        except EOFError:
            raise AssertionError(f"{job}: rank {rank} died") from None
        assert ok, f"{job}: rank {rank} raised {answers[rank]}"
    for rank in answers:
        processes[rank].join(10)
        assert processes[rank].exitcode == 0, f"{job}: rank {rank} does not end: {processes[rank].exitcode}"
    return answers


def _rank(pipe: Connection, rank: int, job: Job, port: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    limit = timedelta(seconds=START_SECONDS)
    store = dist.TCPStore("127.0.0.1", port, job.world_size, is_master=rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=limit)
    try:
        answer = (True, job.function(rank, job.world_size, *job.args))
    except BaseException as error:
        answer = (False, repr(error))
    pipe.send_bytes(pickle.dumps(answer))  # by value: multiprocessing would share tensors through file descriptors
    dist.destroy_process_group()
