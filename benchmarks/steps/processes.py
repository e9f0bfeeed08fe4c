"""A function on one rank or more, in fresh processes with gloo between them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.waiting import wait_until_ended

OUTSIDE = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""What a rank's environment has from the start: one thread, and memory that goes back to the system once it is free."""


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on ranks 0 .. size - 1; what each returned, which has to fit into JSON.

    Raises:
        RuntimeError: a rank failed; its traceback is on the standard error.
    """
    context = multiprocessing.get_context("spawn")
    before = {name: os.environ.get(name) for name in OUTSIDE}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, size, folder, function, arguments)) for rank in range(size)
        ]
        try:
            os.environ.update(OUTSIDE)
            for process in processes:
                process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        try:
            wait_until_ended(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        files = [_answer(folder, rank) for rank in range(size)]
        if not all(file.exists() for file in files):
            raise RuntimeError(f"{function.__qualname__} failed on one of {size} ranks; see the traceback above")
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _answer(folder: str, rank: int) -> Path:
    return Path(folder, f"rank_{rank}.json")


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(Path(folder, "store")), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        answer = json.dumps(function(rank, *arguments))
    finally:
        if size > 1:
            dist.destroy_process_group()
    unfinished = _answer(folder, rank).with_suffix(".part")
    unfinished.write_text(answer, encoding="utf-8")
    unfinished.replace(_answer(folder, rank))
