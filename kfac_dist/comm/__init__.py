"""Communication backends: one file each; a new one needs its file and one import line here."""

from __future__ import annotations

from typing import Any

import torch

from kfac_dist.comm import mpi, single, torch_dist
from kfac_dist.comm.base import CommunicationError, Communicator, Pending, Traffic, communicators
from kfac_dist.comm.same_ranks import check_launched, check_order, check_size

__all__ = [
    "CommunicationError",
    "Communicator",
    "Pending",
    "Traffic",
    "communicators",
    "make_channel",
    "make_communicator",
]

_BACKENDS = (single, torch_dist, mpi)


def make_communicator(backend: str = "auto", process_group: Any = None, timeout: float = 600.0) -> Communicator:
    """The communicator of ``backend`` over ``process_group``.

    Args:
        backend: a registered name, or "auto": "torch" where a process group is given or torch.distributed is
            initialised, else "single".
        process_group: the ranks to use; None: all of them, on a group of our own.
        timeout: seconds until a collective on a group of our own gives up.

    Raises:
        ValueError: an unknown backend; one that cannot run here; without a process group, one that connects fewer
            processes than were launched (unless it is "single" by name) or other ranks than torch.distributed has.
        CommunicationError: the ranks could not build their group together.
    """
    if process_group is not None or backend == "single":
        return communicators["torch" if backend == "auto" else backend](process_group, timeout)
    initialised = torch_dist.is_initialised()
    if backend == "auto":
        backend = "torch" if initialised else "single"
    kind = communicators[backend]
    size = kind.world()[1]
    check_launched(backend, size)
    if backend != "mpi" or not initialised:
        return kind(None, timeout)
    # Whoever trains on torch's ranks (DDP, a sampler) means those: MPI has to have the same ones.
    rank, wanted = communicators["torch"].world()
    check_size(size, wanted, "backend='mpi'", "torch.distributed")
    made = kind(None, timeout)
    check_order(made, rank, "backend='mpi'", "torch.distributed")
    return made


def make_channel(
    backend: str | None, beside: Communicator, timeout: float = 600.0, device: torch.device | str = "cpu"
) -> Communicator:
    """A channel of its own over the ranks of ``beside``, whose account it shares; the caller closes both.

    Args:
        backend: a registered name; None: ``beside`` itself.
        beside: the communicator that has the ranks.
        timeout: seconds until a collective on the channel gives up.
        device: where ``backend`` wants its tensors.

    Raises:
        ValueError: an unknown backend, one that cannot run here, or one whose ranks are not those of ``beside``.
        CommunicationError: the ranks could not build the channel together.
    """
    if backend is None:
        return beside
    kind, name = communicators[backend], f"coarse_backend={backend!r}"
    if isinstance(beside, kind):
        return beside.split([range(beside.size)])
    # Before it is built: that waits for every rank of its world, and some of them might never come.
    check_size(kind.world()[1], beside.size, name, "the fine level")
    channel = kind(None, timeout, beside.traffic)
    check_order(channel, beside.rank, name, "the fine level", device)
    return channel
