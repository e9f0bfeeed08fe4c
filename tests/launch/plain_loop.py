"""A training loop of one's own on the problem of ``problem.py``, for any launcher.

    python plain_loop.py FOLDER TRANSPORT:DTYPE ..

Transports: "single"; "gloo"; "gloo+mpi", gloo for the fine level and MPI for the coarse one; "mpi", without a torch
process group, so before the others. Rank 0 saves the weights as FOLDER/TRANSPORT-DTYPE.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from kfac_dist import CoarseConfig, DistributionConfig, KFACPreconditioner
from kfac_dist.environment import detect_environment
from kfac_dist.launch import connect
from tests.launch.problem import KILL, STEPS, die, network, part, samples

DISTRIBUTIONS = {
    "single": DistributionConfig(backend="single"),
    "gloo": DistributionConfig(average_gradients=True),
    "gloo+mpi": DistributionConfig(average_gradients=True, coarse_backend="mpi", timeout=60),
    "mpi": DistributionConfig(average_gradients=True, backend="mpi", timeout=60),
}


def train(transport: str, dtype: torch.dtype, rank: int, size: int) -> dict[str, object]:
    """Two epochs with a coarse level."""
    x, y, _ = samples(dtype)
    model = network().to(dtype)
    kfac = KFACPreconditioner(
        model,
        likelihood="categorical",
        damping=0.03,
        factor_every_n_steps=1,
        inverse_every_n_steps=1,
        coarse=CoarseConfig(space="layer_step", max_samples=None),
        distribution=DISTRIBUTIONS[transport],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2 * STEPS):
        mine = torch.tensor(part(step, rank, size))
        optimizer.zero_grad()
        logits = model(x[mine])
        kfac.accumulate(sample_ids=mine)
        F.cross_entropy(logits, y[mine]).backward()
        if os.environ.get(KILL) == f"{rank}:{step}":
            die(rank, step)
        kfac.step(lr=optimizer)
        optimizer.step()
    kfac.close()
    return {"weights": model.state_dict(), "ranks": size, "step": 2 * STEPS}


def main(folder: str, *runs: str) -> None:
    """All ``runs`` one after the other."""
    for run in runs:
        transport, dtype = run.split(":")
        rank, size = 0, 1
        if transport != "single":
            launched = detect_environment(os.environ)
            rank, size = launched.rank, launched.size
        if transport.startswith("gloo") and not torch.distributed.is_initialized():
            refused(folder, rank)
            connect("gloo", timeout=60)
        result = train(transport, getattr(torch, dtype), rank, size)
        if rank == 0:
            torch.save(result, Path(folder, f"{transport}-{dtype}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def refused(folder: str, rank: int) -> None:
    """What is said where nothing connects the processes."""
    try:
        KFACPreconditioner(network(), likelihood="categorical")
    except ValueError as error:
        Path(folder, f"refused-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
