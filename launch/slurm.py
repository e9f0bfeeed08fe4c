"""``kfac-dist launch slurm``: a batch script from one of the job scripts in jobs/, submitted by plain ``sbatch``.

Why not submitit, which is kept up as well: it submits a pickled Python call that only itself can start, where a script
can be read, changed and submitted anew by hand; and it answers SLURM's signal before the end by a handler and a requeue
of its own, which take the place of Lightning's (facebookincubator/submitit#1709). What sbatch is given here are options
that SLURM documents; there is nothing left for a library to do.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from kfac_dist.launch.base import check_count, interpreter, launchers, mpirun_beside_python, on_processes

STARTERS = ("srun", "torchrun", "mpirun")
BODY = "# ---- Nothing below needs to be changed. ----\n"
SIGNAL = "SIGUSR1"
TIME = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE)", re.ASCII)
WORD = re.compile(r"[\w.,:@/+=-]+", re.ASCII)


@launchers.register("slurm")
@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A batch job.

    Attributes:
        folder: where the script, the log and the run's outputs go.
        nodes: number of nodes.
        tasks_per_node: processes per node; None: one per GPU, or one.
        gpus_per_node: None: none are asked for.
        cpus_per_task: cores, and threads, of each process.
        time: limit, as sbatch takes it: minutes, [days-]hours:minutes:seconds.
        partition: None: the cluster's default.
        account: who pays; None: the user's default.
        name: of the job.
        starter: what starts the processes within the job: "srun", "torchrun" (one agent per node) or "mpirun".
        requeue: let SLURM put the job back into the queue, and ask for the signal at which training saves, requeues and
            later resumes.
        notice: seconds between that signal and the time limit.
        setup: shell code that makes the environment, such as "module load cuda"; the Python is the one that runs this.
        options: further options of sbatch, such as "--mem=64G".

    Raises:
        ValueError: a setting out of its bounds.
    """

    summary: ClassVar[str] = "a batch job on one or more nodes of a cluster, by sbatch"

    folder: Path
    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int = 1
    time: str = "01:00:00"
    partition: str | None = None
    account: str | None = None
    name: str = "kfac-dist"
    starter: str = "srun"
    requeue: bool = True
    notice: int = 90
    setup: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "notice"):
            check_count(name, getattr(self, name))
        if self.starter not in STARTERS:
            raise ValueError(f"starter={self.starter!r} must be one of {', '.join(STARTERS)}")
        if not TIME.fullmatch(self.time):
            raise ValueError(f"time={self.time!r} must be minutes or [days-]hours:minutes:seconds, such as 04:00:00")
        for name in ("name", "partition", "account"):
            value = getattr(self, name)
            if value is not None and not WORD.fullmatch(value):
                raise ValueError(f"{name}={value!r} must be one word of letters, digits and . , : @ / + = _ -")
        if self.name in ("bash", "interactive"):
            raise ValueError(f"name={self.name!r} makes Lightning ignore SLURM: choose another name")
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"option {option!r} must be one option of sbatch, with its value, such as --mem=64G")
        if re.search(r"[%\n\\\"']", str(self.folder)):
            raise ValueError(f"folder={str(self.folder)!r} must be without %, quotes, backslashes and line breaks")

    @property
    def processes_per_node(self) -> int:
        """Processes on each node, whoever starts them."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add = parser.add_argument
        add("--nodes", type=int, default=1, help="number of nodes (default 1)")
        add("--tasks-per-node", type=int, help="processes per node (default: one per GPU, or one)")
        add("--gpus-per-node", type=int, help="GPUs per node (default: none)")
        add("--cpus-per-task", type=int, default=1, help="cores of each process (default 1)")
        add("--time", default="01:00:00", help="time limit, [days-]hours:minutes:seconds (default 01:00:00)")
        add("--partition", help="default: the cluster's")
        add("--account", help="default: yours")
        add("--name", default="kfac-dist", help="name of the job (default kfac-dist)")
        add("--starter", choices=STARTERS, default="srun", help="what starts the processes in the job (default srun)")
        add("--no-requeue", dest="requeue", action="store_false", help="do not save and requeue before the time is up")
        add("--notice", type=int, default=90, help="seconds before the time limit at which to save (default 90)")
        add("--setup", default="", help="shell code that makes the environment: 'module load cuda'")
        add(
            "--sbatch-option", action="append", default=[], metavar="OPTION", help="one more: --sbatch-option=--mem=64G"
        )
        add("--folder", type=Path, help="script, log and outputs (default outputs/<name>-<date and time>)")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Slurm:
        """From the parsed options."""
        folder = options.folder or Path("outputs", f"{options.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return cls(
            folder=folder,
            nodes=options.nodes,
            tasks_per_node=options.tasks_per_node,
            gpus_per_node=options.gpus_per_node,
            cpus_per_task=options.cpus_per_task,
            time=options.time,
            partition=options.partition,
            account=options.account,
            name=options.name,
            starter=options.starter,
            requeue=options.requeue,
            notice=options.notice,
            setup=options.setup,
            options=tuple(options.sbatch_option),
        )

    def directives(self) -> list[str]:
        """The options of sbatch."""
        tasks = 1 if self.starter == "torchrun" else self.processes_per_node
        # torchrun's agent is the only task of its node: it gets the cores of all its processes.
        cores = self.cpus_per_task * (self.processes_per_node if self.starter == "torchrun" else 1)
        lines = [f"--job-name={self.name}", f"--nodes={self.nodes}", f"--ntasks-per-node={tasks}"]
        lines += [f"--cpus-per-task={cores}", f"--time={self.time}"]
        lines += [] if self.gpus_per_node is None else [f"--gpus-per-node={self.gpus_per_node}"]
        lines += [] if self.partition is None else [f"--partition={self.partition}"]
        lines += [] if self.account is None else [f"--account={self.account}"]
        lines += [f'--output="{self.folder}/slurm-%j.out"', "--open-mode=append"]
        # mpirun hands signals on to its processes, and is a child of the batch shell ("B:").
        to = "B:" if self.starter == "mpirun" else ""
        lines += ["--requeue", f"--signal={to}{SIGNAL}@{self.notice}"] if self.requeue else ["--no-requeue"]
        return [*lines, *self.options]

    def show(self, arguments: Sequence[str]) -> str:
        """The batch script.

        Raises:
            ValueError: the arguments ask for other numbers of processes.
        """
        on_processes(arguments, self.processes_per_node, self.nodes)  # the job script adds them by itself
        head = ["#!/bin/bash", *(f"#SBATCH {line}" for line in self.directives()), ""]
        head += [self.setup, ""] if self.setup else []
        head += [f"PYTHON={shlex.quote(interpreter())}", f"OUTPUT={shlex.quote(str(self.folder))}"]
        if self.starter == "torchrun":
            head.append(f"PROCESSES_PER_NODE={self.processes_per_node}")
            head.append(f"THREADS={self.cpus_per_task}")
        if self.starter == "mpirun":
            head.append(f"MPIRUN={shlex.quote(mpirun_beside_python() or 'mpirun')}")
        head += [f"set -- {shlex.join(arguments)}", ""]
        return "\n".join(head) + "\n" + body(self.starter)

    def start(self, arguments: Sequence[str]) -> int:
        """Write the script into the folder, submit it, and say how to follow the job."""
        script = self.folder / "job.sbatch"
        text = self.show(arguments)
        self.folder.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
        try:
            done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=120)
        except FileNotFoundError:
            return _complain(f"sbatch is not on the PATH: submit {script} on a login node of your cluster")
        if done.returncode != 0:
            return _complain(f"sbatch refused {script}: {done.stderr.strip()}")
        job = done.stdout.strip().split(";")[0]
        log = shlex.quote(f"{self.folder}/slurm-{job}.out")
        rows = [f"job {job} was submitted: {script}", f"  its output:       tail -F {log}"]
        rows += [f"  its state:        squeue --jobs={job}"]
        if self.requeue:
            to = "--batch " if self.starter == "mpirun" else ""
            rows += [f"  save and requeue: scancel {to}--signal={SIGNAL.removeprefix('SIG')} {job}"]
        print("\n".join([*rows, f"  end it:           scancel {job}"]))
        return 0


def body(starter: str) -> str:
    """The job script of ``starter`` from its marker on: what runs when the settings are made."""
    script = (files("kfac_dist.launch") / "jobs" / f"{starter}.sbatch").read_text(encoding="utf-8")
    return BODY + script.split(BODY)[1]


def _complain(message: str) -> int:
    print(f"kfac-dist launch slurm: error: {message}", file=sys.stderr)
    return 1
