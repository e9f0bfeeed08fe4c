"""The communicator: what the optimiser asks of a set of ranks, and how its traffic is counted.

World size 1 is a communicator (``single``), not a special case. Every collective takes the name of the phase it
belongs to: the traffic is filed under it, and an error of the transport names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from kfac_dist.registry import Registry


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


@runtime_checkable
class Communicator(Protocol):
    """Collectives over ``size`` ranks. All ranks call the same methods in the same order, on contiguous tensors.

    A communicator made by :meth:`split` files its traffic in the parent's :class:`Traffic`.
    """

    traffic: Traffic

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

    def barrier(self, phase: str) -> None:
        """Wait for every rank."""

    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """The sub-communicator of the group that holds this rank; ``groups`` partition the ranks."""

    def close(self) -> None:
        """Give back what this communicator made itself (never the caller's process group); idempotent."""


communicators: Registry[type[Communicator]] = Registry("communication backend")
