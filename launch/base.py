"""What every launcher is: checked settings, a text to show, and a way to start it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from kfac_dist.registry import Registry

MODULE = "kfac_dist.launch"
WITH_TRAINER = ("fit", "validate", "test", "predict")
"""The subcommands that take a Trainer's options."""


class Launcher(Protocol):
    """Starts the processes of one training, on this host or on a cluster; a frozen dataclass of its settings.

    Raises:
        ValueError: when it is built, for a setting out of its bounds.
    """

    summary: ClassVar[str]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options of ``kfac-dist launch <name>``."""

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Launcher:
        """The launcher that the options describe."""

    def show(self, arguments: Sequence[str]) -> str:
        """What would be run or submitted for ``arguments``, as text; nothing is started or written."""

    def start(self, arguments: Sequence[str]) -> int:
        """Run or submit it; the exit status."""


launchers: Registry[type[Launcher]] = Registry("launcher")


def is_script(arguments: Sequence[str]) -> bool:
    """Whether the user runs a script of their own, by its name, rather than a subcommand of kfac-dist."""
    return bool(arguments) and arguments[0].endswith(".py")


def program(arguments: Sequence[str]) -> list[str]:
    """What follows ``python``: the script, or kfac-dist's module."""
    return list(arguments) if is_script(arguments) else ["-m", MODULE, *arguments]


def on_processes(arguments: Sequence[str], devices: int, num_nodes: int) -> list[str]:
    """``arguments`` with the Trainer's ``devices`` and ``num_nodes`` that these processes need.

    Lightning connects as many processes as these two say; with less, every process would train by itself and nobody
    would notice.

    Args:
        arguments: a subcommand of kfac-dist and its options; without a Trainer, or a script, they are left alone.
        devices: processes per node.
        num_nodes: nodes.

    Raises:
        ValueError: the arguments ask for other numbers.
    """
    result = list(arguments)
    if result[:1] not in [[name] for name in WITH_TRAINER]:
        return result
    for name, value in (("devices", devices), ("num_nodes", num_nodes)):
        asked = _value_of(f"--trainer.{name}", arguments)
        if asked not in (None, str(value), "auto"):
            raise ValueError(
                f"--trainer.{name}={asked} does not fit the {devices} processes on each of {num_nodes} nodes that are "
                f"launched: leave it out, or give {value}"
            )
        result.append(f"--trainer.{name}={value}")
    return result


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value of ``option``, written with "=" or as two words."""
    found = None
    for here, following in zip(arguments, [*arguments[1:], None], strict=True):
        if here.startswith(f"{option}="):
            found = here.split("=", 1)[1]
        elif here == option:
            found = following
    return found


def interpreter() -> str:
    """The Python that runs this; its environment holds the package."""
    return sys.executable


def mpirun_beside_python() -> str | None:
    """The mpirun of an MPI that was installed into this Python's environment, which is the one that mpi4py finds."""
    beside = Path(interpreter()).with_name("mpirun")
    return str(beside) if beside.exists() else None


def check_count(name: str, value: int | None) -> None:
    """Raise ValueError unless ``value`` is None or at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
