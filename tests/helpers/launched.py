"""Commands that start processes of their own: run to the end, with a time-out and a search for what they left over."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
MARK = "KFAC_DIST_TEST_MARK"
# What another launcher, or a job around the tests, may have set.
FOREIGN = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# Open MPI refuses root and more ranks than cores, and gives each rank a core, unless told otherwise.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes:
        returncode: of the command.
        output: stdout and stderr together.
        ended: when, in seconds since 1970.
        mark: every process that it started carries it in its environment.
    """

    returncode: int
    output: str
    ended: float
    mark: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a process that no launcher has started."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
    return own | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path} | OPEN_MPI | dict(extra or {})


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # it has ended, or is not ours
            continue
    return found


def left_over(mark: str, patience: float = 5.0) -> list[str]:
    """Command lines of marked processes that are still there after ``patience`` seconds; they are killed then."""
    end = time.monotonic() + patience
    while (found := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    lines = []
    for process in found:
        try:
            lines.append(f"{process.pid}: {' '.join(process.cmdline())}")
            process.kill()
        except psutil.Error:
            continue
    return lines


@contextmanager
def started(command: Sequence[str], extra: Mapping[str, str] | None = None) -> Iterator[tuple[Any, Path, str]]:
    """The running process, the file of its output, and its mark; whatever lives at the end is killed."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "output.txt")
        with log.open("wb") as sink:
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env=environment(extra) | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process, log, mark
        finally:
            for survivor in marked(mark):
                survivor.kill()
            process.wait(10)


def run(command: Sequence[str], extra: Mapping[str, str] | None = None, timeout: float = 90.0) -> Finished:
    """Run ``command`` to its end.

    Raises:
        AssertionError: it took longer than ``timeout`` seconds; it is killed, and the message holds its output.
    """
    with started(command, extra) as (process, log, mark):
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"no end within {timeout:g} s: {' '.join(command)}\n{log.read_text(errors='replace')}"
            ) from None
        ended = time.time()
        # Read before the survivors are looked for and killed, so that a test can see them first.
        output = log.read_text(errors="replace")
        survivors = left_over(mark)
    if survivors:
        raise AssertionError(f"{' '.join(command)} ended with {returncode} and left over:\n" + "\n".join(survivors))
    return Finished(returncode, output, ended, mark)


def mpirun(processes: int, *command: str) -> list[str]:
    """A command line of the ``mpirun`` beside this interpreter."""
    return [
        str(Path(sys.executable).with_name("mpirun")),
        "-n",
        str(processes),
        sys.executable,
        "-m",
        "mpi4py",
        *command,
    ]


def run_mpi(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 90.0,
    extra: Mapping[str, str] | None = None,
) -> list[Any]:
    """Results by rank of ``function(rank, world_size, *args)``, a top-level one, on MPI ranks.

    Raises:
        AssertionError: the job failed; the message holds its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.pkl").write_bytes(pickle.dumps((function, args)))
        done = run(mpirun(world_size, "-m", "tests.helpers.mpi_rank", folder), extra, timeout)
        if done.returncode != 0:
            raise AssertionError(f"{function.__qualname__} failed on {world_size} MPI ranks\n{done.output}")
        return [pickle.loads(Path(folder, f"{rank}.pkl").read_bytes()) for rank in range(world_size)]
