"""Communication backends: one file each; a new one needs its file and one import line here."""

from __future__ import annotations

from typing import Any

from kfac_dist.comm import single, torch_dist
from kfac_dist.comm.base import CommunicationError, Communicator, Traffic, communicators

__all__ = ["CommunicationError", "Communicator", "Traffic", "communicators", "make_communicator"]

_BACKENDS = (single, torch_dist)


def make_communicator(backend: str = "auto", process_group: Any = None, timeout: float = 600.0) -> Communicator:
    """The communicator of ``backend`` over ``process_group``.

    Args:
        backend: a registered name, or "auto": "torch" where a process group is given or torch.distributed is
            initialised, else "single".
        process_group: the ranks to use; None: all of them, on a group of our own.
        timeout: seconds until a collective on a group of our own gives up.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
        CommunicationError: the ranks could not build their group together.
    """
    if backend == "auto":
        backend = "torch" if process_group is not None or torch_dist.is_initialised() else "single"
    return communicators[backend](process_group, timeout)
