"""The rates of this machine, for ``kfac-dist plan --calibrate``: products, factorisations, memory, collectives."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kfac_dist.costs import Machine

ORDER = 1024
"""Of the matrices that are multiplied and inverted."""

SMALL, LARGE = 2**8, 2**22
"""Words of the all-reduces that give latency and bandwidth."""


def _best(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _cholesky_inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix)[0])


def _all_reduces(rank: int, ranks: int, store: str, threads: int, answer: str) -> None:
    """Times a small and a large all-reduce; rank 0 writes the two down."""
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    seconds = []
    for words in (SMALL, LARGE):
        tensor = torch.ones(words)
        seconds.append(_best(lambda tensor=tensor: dist.all_reduce(tensor), 20))  # type: ignore[misc]
    if rank == 0:
        Path(answer).write_text(" ".join(map(str, seconds)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure_collectives(ranks: int = 2) -> tuple[float, float]:
    """Bytes per second and seconds per hop between ``ranks`` processes of gloo on this host."""
    with tempfile.TemporaryDirectory() as folder:
        answer = str(Path(folder, "answer"))
        arguments = (ranks, str(Path(folder, "store")), torch.get_num_threads(), answer)
        mp.start_processes(_all_reduces, arguments, nprocs=ranks, start_method="spawn")
        small, large = map(float, Path(answer).read_text(encoding="utf-8").split())
    hops = 2 * (ranks - 1).bit_length()
    share = 2 * (ranks - 1) / ranks * 4
    return share * (LARGE - SMALL) / max(large - small, 1e-9), small / hops


def calibrate(ranks: int = 2) -> Machine:
    """Measure this machine with as many threads as torch has here; about ten seconds.

    Args:
        ranks: processes of gloo that are started for the collectives.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(ORDER, ORDER, generator=generator)
    moment = matrix.mT @ matrix / ORDER + torch.eye(ORDER)
    half = moment[: ORDER // 2, : ORDER // 2].contiguous()
    large = torch.empty(2**24)
    little = torch.ones(8, 8)
    bandwidth, latency = measure_collectives(ranks)
    return Machine(
        gemm=2 * ORDER**3 / _best(lambda: matrix @ matrix),
        cholesky=ORDER**3 / _best(lambda: _cholesky_inverse(moment)),
        eigh=(ORDER // 2) ** 3 / _best(lambda: torch.linalg.eigh(half), 2),
        memory=2 * 4 * large.numel() / _best(lambda: large.mul_(1.0)),
        bandwidth=bandwidth,
        latency=latency,
        operation=_best(lambda: [little + little for _ in range(1000)]) / 1000,
    )
