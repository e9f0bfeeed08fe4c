"""Connect the processes of any launcher by torch.distributed, for training loops of one's own."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from kfac_dist.comm.mpi import rendezvous
from kfac_dist.comm.torch_dist import settle_at_exit
from kfac_dist.environment import LaunchEnvironment, detect_environment


def connect(backend: str | None = None, timeout: float = 600.0) -> LaunchEnvironment:
    """Initialise torch.distributed among the processes that torchrun, mpirun or srun has started; ranks are theirs.

    One process alone stays as it is. Under mpirun, rank 0 tells the others where to meet through MPI. With "nccl" the
    GPU with the number of the local rank becomes the current one.

    Args:
        backend: of torch.distributed; None: "nccl" where there is a GPU for each process of this node, else "gloo".
        timeout: seconds until a collective gives up.

    Returns:
        This process's place: ``.rank``, ``.size``, ``.local_rank``.

    Raises:
        ValueError: the launcher's variables contradict one another, it names no address, or MPI connects other
            processes than it started.
    """
    launched = detect_environment(os.environ)
    if launched.size == 1:
        return launched
    if launched.launcher == "torchrun":  # whose agent holds the store already
        init_method = "env://"
    else:
        address, port = launched.address, launched.port
        if launched.launcher in ("openmpi", "mpich"):
            address, port = rendezvous(launched.rank, launched.size)
        if address is None or port is None:
            raise ValueError(f"{launched.launcher} names no place to meet: set MASTER_ADDR and MASTER_PORT")
        init_method = f"tcp://{address}:{port}"
    if backend is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        backend = "nccl" if gpus >= (launched.local_size or launched.local_rank + 1) else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(launched.local_rank)
    settle_at_exit()
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=launched.rank,
        world_size=launched.size,
        timeout=timedelta(seconds=timeout),
    )
    return launched
