"""One pool of worker processes for the whole test run: starting a pair of them costs seconds, a job milliseconds."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORKERS = 4
START_TIMEOUT = 120.0


class RankError(AssertionError):
    """A rank raised, died or stayed silent: the message holds every rank's traceback."""


class RankPool:
    """Runs a function on ranks 0 .. n - 1 of a fresh gloo group; the processes are started at the first use."""

    def __init__(self, workers: int = WORKERS) -> None:
        self.workers = workers
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        atexit.register(self.close)

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        init: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Results of ``function(rank, world_size, *args, **kwargs)`` by rank.

        Args:
            world_size: number of ranks, at most the number of workers.
            function: a top-level function of an importable module.
            args: passed on, by value.
            timeout: seconds for the whole job; collectives give up a little earlier, to say where they stand.
            init: True: the default process group is there (gloo); False: only torchrun's variables are set.
            kwargs: passed on, by value.

        Raises:
            RankError: a rank raised, died, or did not answer in time; in the latter two cases all workers are killed,
                and the next call starts new ones.
        """
        if not 1 <= world_size <= self.workers:
            raise ValueError(f"world_size={world_size} must be at least 1 and at most {self.workers}")
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as directory:
            rendezvous = {"file": str(Path(directory, "store")), "port": _free_port(), "init": init, "timeout": timeout}
            job = pickle.dumps((function, args, kwargs))
            try:
                for rank in range(world_size):
                    self._pipes[rank].send_bytes(pickle.dumps((rank, world_size, rendezvous, job)))
                answers = self._collect(world_size, timeout)
            except BaseException:  # whatever it was (also Ctrl-C or pytest's time-out), answers may still be under way
                self.close()
                raise
        failures = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if len(answers) < world_size or any(not process.is_alive() for process in self._processes):
            self.close()
        for rank in sorted(set(range(world_size)) - set(answers)):
            failures[rank] = f"silent for {timeout:g} s; the pool was killed"
        if failures:
            name = getattr(function, "__qualname__", function)
            report = "\n".join(f"--- rank {rank} of {world_size}: {failures[rank]}" for rank in sorted(failures))
            raise RankError(f"{name} failed on {len(failures)} of {world_size} ranks\n{report}")
        return [pickle.loads(answers[rank][1]) for rank in range(world_size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Read when a worker's interpreter starts, before any library decides on its threads.
        with _variables({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}):
            for index in range(self.workers):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there,), name=f"rank-pool-{index}")
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
        ready = self._collect(self.workers, START_TIMEOUT)
        if len(ready) < self.workers or not all(ok for ok, _ in ready.values()):
            self.close()
            raise RankError(f"only {len(ready)} of {self.workers} workers started within {START_TIMEOUT:g} s: {ready}")

    def _collect(self, count: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Answers of the first ``count`` workers, as far as they come within ``timeout`` seconds."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < count:
            open_pipes = {self._pipes[rank]: rank for rank in range(count) if rank not in answers}
            arrived = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
            if not arrived:
                break
            for pipe in arrived:
                rank = open_pipes[pipe]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(5)
                    answers[rank] = (False, f"the process died with exit code {self._processes[rank].exitcode}")
        return answers

    def close(self) -> None:
        """Kill the workers; idempotent."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _variables(values: dict[str, str]):
    """Environment variables for a while; whatever else is changed meanwhile is undone as well."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(pipe: Connection) -> None:
    """The life of a worker: jobs from the pipe, until the other end is closed."""
    import torch  # noqa: PLC0415 - only workers pay for it, once each

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    pipe.send_bytes(pickle.dumps((True, "ready")))
    while True:
        try:
            rank, world_size, rendezvous, job = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            # Pickled here and twice: by value, where multiprocessing would share tensors through file descriptors.
            answer = (True, pickle.dumps(_run_job(rank, world_size, rendezvous, job)))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _run_job(rank: int, world_size: int, rendezvous: dict[str, Any], job: bytes) -> Any:
    import torch  # noqa: PLC0415 - as in _work
    import torch.distributed as dist  # noqa: PLC0415

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    launched = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rendezvous["port"]),
        "TORCHELASTIC_RUN_ID": "rank-pool",
    }
    with _variables({} if rendezvous["init"] else launched):
        try:
            if rendezvous["init"]:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(rendezvous["file"], world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=min(60.0, 0.8 * rendezvous["timeout"])),
                )
                dist.barrier()  # a rank that is done at once must not close connections that others still make
            function, args, kwargs = pickle.loads(job)
            return function(rank, world_size, *args, **kwargs)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
