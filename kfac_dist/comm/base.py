"""The communicator: what the optimiser asks of a set of ranks, and how its traffic is counted.

World size 1 is a communicator (``single``), not a special case. Every collective takes the name of the phase it
belongs to: the traffic is filed under it, and an error of the transport names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from kfac_dist.registry import Registry

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class CommunicationError(RuntimeError):
    """A collective failed or timed out: the message names the phase, the operation and the rank."""


@dataclass
class Traffic:
    """Collectives and payload bytes per phase, as seen by one rank (the size of the buffer it hands over)."""

    collectives: dict[str, int] = field(default_factory=dict)
    payload_bytes: dict[str, int] = field(default_factory=dict)

    def record(self, phase: str, tensor: Tensor) -> None:
        """Count one collective on ``tensor`` under ``phase``."""
        self.collectives[phase] = self.collectives.get(phase, 0) + 1
        self.payload_bytes[phase] = self.payload_bytes.get(phase, 0) + tensor.numel() * tensor.element_size()

    def clear(self) -> None:
        """Start counting anew."""
        self.collectives.clear()
        self.payload_bytes.clear()


class Pending(Protocol[T_co]):
    """A collective that was started: leave its tensor alone until :meth:`wait` has returned."""

    def wait(self) -> T_co:
        """Block until the result is there, and return what the blocking form returns; a second call does the same.

        Raises:
            CommunicationError: the collective failed or timed out.
        """


@dataclass(frozen=True)
class Done(Generic[T]):
    """A collective with nothing left to wait for."""

    result: T

    def wait(self) -> T:
        """The result."""
        return self.result


@runtime_checkable
class Communicator(Protocol):
    """Collectives over ``size`` ranks. All ranks call the same methods in the same order, on contiguous tensors.

    One rank alone moves no bytes: at ``size`` 1 nothing is sent and nothing is counted. The forms that end in
    ``_async`` return at once; every rank starts them in the same order among themselves and the blocking ones, and
    whether anything moves before ``wait()`` is the transport's affair.

    A communicator made by :meth:`split` files its traffic in the parent's :class:`Traffic`.

    Args:
        process_group: the transport's own handle of the ranks; None: all of them, on a channel of our own.
        timeout: seconds until a collective on a channel of our own gives up.
        traffic: where to count; None: a new account.
    """

    traffic: Traffic

    def __init__(self, process_group: Any = None, timeout: float = 600.0, traffic: Traffic | None = None) -> None: ...

    @staticmethod
    def world() -> tuple[int, int]:
        """Rank and size of this process among all that the transport connects, before anything is made.

        Raises:
            ValueError: the transport cannot run here.
        """

    @property
    def rank(self) -> int:
        """This process's index, 0 .. size - 1."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce(self, tensor: Tensor, phase: str) -> None:
        """Sum ``tensor`` over the ranks, in place, on every rank."""

    def reduce(self, tensor: Tensor, dst: int, phase: str) -> None:
        """Sum ``tensor`` over the ranks into rank ``dst``; elsewhere its content is undefined afterwards."""

    def broadcast(self, tensor: Tensor, src: int, phase: str) -> None:
        """Overwrite ``tensor`` by rank ``src``'s, in place."""

    def gather(self, tensor: Tensor, dst: int, phase: str) -> list[Tensor] | None:
        """Rank ``dst`` receives every rank's ``tensor`` (equal shapes), in rank order; the others get None."""

    def all_reduce_async(self, tensor: Tensor, phase: str) -> Pending[None]:
        """Start :meth:`all_reduce`."""

    def reduce_async(self, tensor: Tensor, dst: int, phase: str) -> Pending[None]:
        """Start :meth:`reduce`."""

    def broadcast_async(self, tensor: Tensor, src: int, phase: str) -> Pending[None]:
        """Start :meth:`broadcast`."""

    def gather_async(self, tensor: Tensor, dst: int, phase: str) -> Pending[list[Tensor] | None]:
        """Start :meth:`gather`."""

    def barrier(self, phase: str) -> None:
        """Wait for every rank."""

    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """The sub-communicator of the group that holds this rank; ``groups`` partition the ranks."""

    def close(self) -> None:
        """Give back what this communicator made itself (never the caller's process group); idempotent."""


communicators: Registry[type[Communicator]] = Registry("communication backend")


def own_group(groups: Sequence[Sequence[int]], rank: int, size: int) -> list[int]:
    """The group of ``groups`` that holds ``rank``, ascending.

    Raises:
        ValueError: the groups do not partition the ranks 0 .. size - 1.
    """
    if sorted(member for group in groups for member in group) != list(range(size)):
        raise ValueError(f"groups={[list(g) for g in groups]} must hold every rank 0 .. {size - 1} exactly once")
    return sorted(next(group for group in groups if rank in group))


def check_arguments(operation: str, size: int, tensor: Tensor, root: int = 0) -> None:
    """Raise ValueError unless ``tensor`` is contiguous and ``root`` is one of the ``size`` ranks."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous; "
            "pass tensor.contiguous() and use that copy afterwards"
        )
    if not 0 <= root < size:
        raise ValueError(f"{operation}: rank {root} must be at least 0 and below the number of ranks, {size}")
