"""Checks before training: are all launched processes connected, and do two transports number the same ranks alike?"""

from __future__ import annotations

import os

import torch

from kfac_dist.comm.base import Communicator
from kfac_dist.environment import check_world, detect_environment

CURES = {
    "single": (
        "in a loop of your own call torch.distributed.init_process_group() before you build K-FAC, or take MPI with "
        'DistributionConfig(backend="mpi"); a Trainer needs {devices} and strategy="ddp"; and where each process is '
        'meant to train by itself, say DistributionConfig(backend="single")'
    ),
    "torch": (
        "let torch.distributed.init_process_group() connect all of them (a Trainer needs {devices}), or pass the "
        "process_group that you mean"
    ),
    "mpi": (
        "start them by the MPI that mpi4py was built for: mpirun, or under SLURM srun --mpi=pmix (Open MPI) or "
        "srun --mpi=pmi2 (MPICH)"
    ),
}
"""Backend -> what to do when it does not connect all processes."""


def check_launched(backend: str, size: int) -> None:
    """Raise ValueError where the launcher started more processes than the ``size`` that ``backend`` connects."""
    check_world(detect_environment(os.environ), size, CURES.get(backend, CURES["single"]))


def check_size(size: int, wanted: int, name: str, other: str) -> None:
    """Raise ValueError unless the transports ``name`` and ``other`` connect equally many processes."""
    if size != wanted:
        raise ValueError(
            f"{name} connects {size} processes, and {other} has {wanted}: both must have the same ranks; start all of "
            "them by one launcher (mpirun -n N for MPI), and let torch.distributed have all N as well"
        )


def check_order(made: Communicator, rank: int, name: str, other: str, device: torch.device | str = "cpu") -> None:
    """Check, on all ranks together, that rank r of ``made`` is rank r of ``other``; one small all-reduce.

    Args:
        made: a new communicator; it is closed where the check fails.
        rank: this process's rank in ``other``.
        name: what ``made`` is called in the message.
        other: the transport to compare with.
        device: where ``made`` wants its tensors.

    Raises:
        ValueError: on every rank alike.
    """
    ranks = torch.zeros(made.size, dtype=torch.int64, device=device)
    ranks[made.rank] = rank
    made.all_reduce(ranks, phase="setup")
    made.traffic.clear()
    order = ranks.tolist()
    if order != list(range(made.size)):
        made.close()
        raise ValueError(
            f"{name}: its ranks 0 .. {made.size - 1} are the ranks {order} of {other}; number them alike, with "
            "torch.distributed.init_process_group(rank=MPI.COMM_WORLD.rank, world_size=MPI.COMM_WORLD.size)"
        )
