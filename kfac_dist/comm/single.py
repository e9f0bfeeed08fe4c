"""One rank alone: every collective leaves the tensor as it is, and nothing is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kfac_dist.comm.base import Communicator, Done, Traffic, check_arguments, communicators, own_group


@communicators.register("single")
class SingleCommunicator:
    """A world of one rank, also inside a larger job (each process then works by itself).

    Args:
        process_group: not used.
        timeout: not used.
        traffic: where a parent counts; None: a new, empty account.
    """

    rank = 0
    size = 1

    def __init__(self, process_group: Any = None, timeout: float = 600.0, traffic: Traffic | None = None) -> None:
        self.traffic = Traffic() if traffic is None else traffic

    @staticmethod
    def world() -> tuple[int, int]:
        """Rank 0 of 1."""
        return 0, 1

    def all_reduce(self, tensor: Tensor, phase: str) -> None:
        """The sum over one rank is the tensor."""
        check_arguments("all_reduce", self.size, tensor)

    def reduce(self, tensor: Tensor, dst: int, phase: str) -> None:
        """The sum over one rank is the tensor."""
        check_arguments("reduce", self.size, tensor, dst)

    def broadcast(self, tensor: Tensor, src: int, phase: str) -> None:
        """The tensor is its own source."""
        check_arguments("broadcast", self.size, tensor, src)

    def gather(self, tensor: Tensor, dst: int, phase: str) -> list[Tensor]:
        """A list of one copy, as the other backends hand out new tensors."""
        check_arguments("gather", self.size, tensor, dst)
        return [tensor.clone()]

    def all_reduce_async(self, tensor: Tensor, phase: str) -> Done[None]:
        """Done at once."""
        self.all_reduce(tensor, phase)
        return Done(None)

    def reduce_async(self, tensor: Tensor, dst: int, phase: str) -> Done[None]:
        """Done at once."""
        self.reduce(tensor, dst, phase)
        return Done(None)

    def broadcast_async(self, tensor: Tensor, src: int, phase: str) -> Done[None]:
        """Done at once."""
        self.broadcast(tensor, src, phase)
        return Done(None)

    def gather_async(self, tensor: Tensor, dst: int, phase: str) -> Done[list[Tensor] | None]:
        """Done at once."""
        return Done(self.gather(tensor, dst, phase))

    def barrier(self, phase: str) -> None:
        """Nobody to wait for."""

    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """Another world of one rank, with the same account."""
        own_group(groups, self.rank, self.size)
        return SingleCommunicator(traffic=self.traffic)

    def close(self) -> None:
        """Nothing to give back."""
