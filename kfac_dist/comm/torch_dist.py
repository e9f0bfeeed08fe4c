"""Ranks of torch.distributed: gloo, NCCL or whatever else the process group runs on.

Ranks are GROUP ranks throughout. Nothing is sent, and nothing counted, by a group of one rank.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from kfac_dist.comm.base import (
    CommunicationError,
    Communicator,
    Done,
    Pending,
    Traffic,
    check_arguments,
    communicators,
    own_group,
)
from kfac_dist.roll_call import roll_call

T = TypeVar("T")

ROLL_CALL_SECONDS = 10.0
"""How long a rank on which a collective has failed waits for the others to fail too, at most."""


SETTLE_SECONDS = 0.05
"""Idle threads of gloo have forgotten their last collective long before."""


def _settle() -> None:
    time.sleep(SETTLE_SECONDS)


def settle_at_exit() -> None:
    """Let gloo's threads finish before the interpreter ends; idempotent.

    Such a thread may still hold its last collective when the main thread has its result. If it lets go of it, and of
    the Python objects within, while the interpreter is being taken down, the process aborts after a training that
    went well (https://github.com/pytorch/pytorch/issues/190489). Destroying the process group does not wait for it.
    """
    atexit.unregister(_settle)
    atexit.register(_settle)


def is_initialised() -> bool:
    """Whether torch.distributed has a default process group in this process."""
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class PendingWork(Generic[T]):
    """A collective of torch.distributed under way.

    Attributes:
        finish: waits for the transport; raises CommunicationError where it fails.
        result: what :meth:`wait` hands out.
    """

    finish: Callable[[], object]
    result: T

    def wait(self) -> T:
        """Wait, and return the result."""
        self.finish()
        return self.result


@communicators.register("torch")
class TorchCommunicator:
    """Collectives on a process group.

    Args:
        process_group: used as it is and left open by :meth:`close`; None: a new group over all ranks, so that our
            collectives stay apart from DDP's buckets (every rank must build its communicator then).
        timeout: seconds until a collective gives up, for the groups made here; a given group keeps its own.
        traffic: where to count; None: a new account.

    Raises:
        ValueError: torch.distributed is not initialised, or this process is not in the group.
        CommunicationError: the new group could not be made.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, timeout: float = 600.0, traffic: Traffic | None = None
    ) -> None:
        self.world()
        settle_at_exit()
        self.traffic = Traffic() if traffic is None else traffic
        self._timeout = timeout
        self._children: list[Communicator] = []
        self._closed = False
        self._made_here = process_group is None
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError(
                "this process is not a member of process_group; build the communicator on its members only"
            )
        if process_group is None:
            process_group = self._guard(
                "new_group", "setup", lambda: dist.new_group(timeout=timedelta(seconds=timeout))
            )
        self._group = process_group

    @staticmethod
    def world() -> tuple[int, int]:
        """Rank and size of this process in the default group.

        Raises:
            ValueError: torch.distributed is not initialised.
        """
        if not is_initialised():
            raise ValueError(
                "the torch backend needs torch.distributed: call torch.distributed.init_process_group() first "
                "(Lightning's DDP strategy does), or choose backend='single'"
            )
        return dist.get_rank(), dist.get_world_size()

    def _guard(self, operation: str, phase: str, collective: Callable[[], T]) -> T:
        """Run ``collective``; name phase, operation, rank and size where it fails, and who did not come."""
        where = f"{phase}: {operation} on rank {self.rank} of {self.size}"
        if self._closed:
            raise CommunicationError(f"{where}: the communicator is closed")
        try:
            return collective()
        except Exception as error:
            raise CommunicationError(f"{where} failed: {self._missing(phase)}{error}") from error

    def _missing(self, phase: str) -> str:
        """What the job's store says of this group's ranks; empty where torch.distributed has been shut down."""
        try:
            world: Any = dist.group.WORLD
            members = dist.get_process_group_ranks(getattr(self, "_group", world))
            store: Any = world.get_group_store()
        except (AttributeError, KeyError, RuntimeError, ValueError):
            return ""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host = "the launcher of global rank 0" if agent else "global rank 0"
        return roll_call(store, host, dist.get_rank(), members, phase, min(ROLL_CALL_SECONDS, self._timeout / 4))

    def _run(
        self,
        operation: str,
        phase: str,
        tensor: Tensor,
        result: T,
        root: int = 0,
        async_op: bool = False,
        **options: Any,
    ) -> Pending[T]:
        """Run or begin a collective of torch.distributed; ``result`` is right once it has ended."""
        check_arguments(operation, self.size, tensor, root)
        if self.size == 1:
            return Done(result)
        self.traffic.record(phase, tensor)
        collective = partial(getattr(dist, operation), tensor, group=self._group, async_op=async_op, **options)
        work = self._guard(operation, phase, collective)
        # A work that is not asked for is none: NCCL then stays on the stream that it was called from.
        return PendingWork(lambda: self._guard(operation, phase, work.wait), result) if async_op else Done(result)

    def _gather(self, tensor: Tensor, dst: int, phase: str, async_op: bool) -> Pending[list[Tensor] | None]:
        # A clone of the own tensor is right for one rank and is overwritten, by itself, for more.
        received = [tensor.clone() for _ in range(self.size)] if self.rank == dst else None
        return self._run("gather", phase, tensor, received, dst, async_op, gather_list=received, group_dst=dst)

    def all_reduce(self, tensor: Tensor, phase: str) -> None:
        """Sum ``tensor`` over the ranks, in place, on every rank."""
        self._run("all_reduce", phase, tensor, None)

    def reduce(self, tensor: Tensor, dst: int, phase: str) -> None:
        """Sum ``tensor`` over the ranks into rank ``dst``; elsewhere its content is undefined afterwards."""
        self._run("reduce", phase, tensor, None, dst, group_dst=dst)

    def broadcast(self, tensor: Tensor, src: int, phase: str) -> None:
        """Overwrite ``tensor`` by rank ``src``'s, in place."""
        self._run("broadcast", phase, tensor, None, src, group_src=src)

    def gather(self, tensor: Tensor, dst: int, phase: str) -> list[Tensor] | None:
        """Rank ``dst`` receives every rank's ``tensor`` (equal shapes), in rank order; the others get None."""
        return self._gather(tensor, dst, phase, async_op=False).wait()

    def all_reduce_async(self, tensor: Tensor, phase: str) -> Pending[None]:
        """Start :meth:`all_reduce`."""
        return self._run("all_reduce", phase, tensor, None, async_op=True)

    def reduce_async(self, tensor: Tensor, dst: int, phase: str) -> Pending[None]:
        """Start :meth:`reduce`."""
        return self._run("reduce", phase, tensor, None, dst, async_op=True, group_dst=dst)

    def broadcast_async(self, tensor: Tensor, src: int, phase: str) -> Pending[None]:
        """Start :meth:`broadcast`."""
        return self._run("broadcast", phase, tensor, None, src, async_op=True, group_src=src)

    def gather_async(self, tensor: Tensor, dst: int, phase: str) -> Pending[list[Tensor] | None]:
        """Start :meth:`gather`."""
        return self._gather(tensor, dst, phase, async_op=True)

    def barrier(self, phase: str) -> None:
        """Wait for every rank; no payload, so nothing is counted."""
        if self.size > 1:
            self._guard("barrier", phase, lambda: dist.barrier(group=self._group))

    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """The sub-communicator of the group that holds this rank; it is closed with this one.

        Every rank makes every group, in the order of ``groups``, as torch.distributed asks; one rank alone needs no
        process group.

        Raises:
            ValueError: the groups do not partition the ranks.
            CommunicationError: a group could not be made.
        """
        mine = own_group(groups, self.rank, self.size)
        child: Communicator | None = None
        # Ranks outside our group do not come here: then only the members of a new group may be asked to meet, which
        # torch.distributed allows to ranks that have made equally many groups before; so one rank makes one, too.
        apart = self.size < dist.get_world_size()
        for members in (sorted(group) for group in groups):
            made = self._new_subgroup(members, apart) if apart or len(members) > 1 else None
            if members == mine:
                child = communicators["single" if made is None else "torch"](made, self._timeout, self.traffic)
                if isinstance(child, TorchCommunicator):
                    child._made_here = True
                self._children.append(child)
        assert child is not None  # own_group has found this rank in exactly one of them
        return child

    def _new_subgroup(self, members: list[int], apart: bool) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._guard(
            "new_group",
            "setup",
            lambda: dist.new_group(
                [dist.get_global_rank(self._group, member) for member in members],
                timeout=timedelta(seconds=self._timeout),
                backend=dist.get_backend_config(self._group),
                use_local_synchronization=apart,
            ),
        )
        return group

    def close(self) -> None:
        """Destroy the groups that were made here, sub-groups first; idempotent."""
        while self._children:
            self._children.pop().close()
        if self._made_here and not self._closed and is_initialised():
            # torch.distributed may have been shut down, and even begun anew, before us: the group is gone then.
            with contextlib.suppress(ValueError):
                dist.destroy_process_group(self._group)
        self._closed = True
