"""``kfac-dist launch torchrun``: processes on this host, or this host's share of several, by torch's elastic agent."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kfac_dist.launch.base import check_count, interpreter, launchers, on_processes, program


@launchers.register("torchrun")
@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """One agent per node, which starts and watches the processes there.

    Attributes:
        processes: per node.
        nodes: number of nodes; on each of them the same command is run.
        node_rank: index of this node, 0 .. nodes - 1; None: the agents agree on it.
        rendezvous: host:port of node 0, where the agents meet; needed for several nodes.
        run_id: name of the job, the same on all nodes.

    Raises:
        ValueError: a count below 1, a rank that is no node, or several nodes without a rendezvous.
    """

    summary: ClassVar[str] = "processes on this host (or on each of several hosts), by torchrun"

    processes: int
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None
    run_id: str = "kfac-dist"

    def __post_init__(self) -> None:
        check_count("processes", self.processes)
        check_count("nodes", self.nodes)
        if self.node_rank is not None and not 0 <= self.node_rank < self.nodes:
            raise ValueError(f"node_rank={self.node_rank} must be at least 0 and below nodes={self.nodes}")
        host, _, port = (self.rendezvous or "").rpartition(":")
        if self.rendezvous is not None and not (host and port.isdecimal()):
            raise ValueError(f"rendezvous={self.rendezvous!r} must be host:port of node 0, such as node1:29400")
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError(
                f"nodes={self.nodes} need a place to meet: give --rendezvous HOST:PORT, a free port of node 0"
            )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-n", "--processes", type=int, required=True, help="processes per node")
        parser.add_argument("--nodes", type=int, default=1, help="nodes; run the same command on each (default 1)")
        parser.add_argument("--node-rank", type=int, help="index of this node (default: the agents agree on it)")
        parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where the nodes meet: a free port of node 0")
        parser.add_argument("--run-id", default="kfac-dist", help="name of the job, the same on all nodes")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Torchrun:
        """From the parsed options."""
        return cls(
            processes=options.processes,
            nodes=options.nodes,
            node_rank=options.node_rank,
            rendezvous=options.rendezvous,
            run_id=options.run_id,
        )

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line of this node's agent.

        Raises:
            ValueError: the arguments ask for other numbers of processes.
        """
        line = [interpreter(), "-m", "torch.distributed.run", f"--nproc-per-node={self.processes}"]
        if self.nodes == 1:
            line.append("--standalone")
        else:
            line += [f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.rendezvous}"]
            line += [f"--rdzv-id={self.run_id}"]
            line += [] if self.node_rank is None else [f"--node-rank={self.node_rank}"]
        return [*line, *program(on_processes(arguments, self.processes, self.nodes))]

    def show(self, arguments: Sequence[str]) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(self.command(arguments))

    def start(self, arguments: Sequence[str]) -> int:
        """Become torchrun: its exit status and its handling of signals are ours."""
        command = self.command(arguments)
        os.execv(command[0], command)
