"""The ``kfac-dist`` command; ``python -m kfac_dist.launch`` is the same."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple


class Subcommand(NamedTuple):
    """Where a subcommand's ``main(argv)`` lives, imported when it is called; ``argv[0]`` is the subcommand's name."""

    module: str
    summary: str


TRAIN = "kfac_dist.launch.train"
SUBCOMMANDS = {
    "fit": Subcommand(TRAIN, "train a model: kfac-dist fit --config configs/mnist_autoencoder.yaml"),
    "validate": Subcommand(TRAIN, "evaluate on the validation split: --config FILE --ckpt_path FILE"),
    "test": Subcommand(TRAIN, "evaluate on the test split"),
    "predict": Subcommand(TRAIN, "run the model on the prediction split"),
    "inspect": Subcommand("kfac_dist.launch.inspect", "what K-FAC does with every module of the model: --config FILE"),
    "plan": Subcommand(
        "kfac_dist.launch.plan", "what K-FAC would cost on many ranks: --layers resnet50 --world-size 64"
    ),
    "study": Subcommand("kfac_dist.launch.study", "compare methods, and write a report: configs/study/quick.yaml"),
    "launch": Subcommand(
        "kfac_dist.launch.launch", "start any of these on several processes: launch torchrun -n 2 -- fit --config FILE"
    ),
}


def usage() -> str:
    """The text of ``kfac-dist --help``."""
    rows = [f"  {name:<10}{entry.summary}" for name, entry in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: kfac-dist SUBCOMMAND [options]",
            "",
            "Distributed two-level K-FAC for PyTorch Lightning.",
            "",
            "subcommands (each has its own --help):",
            *rows,
            "",
            "options:",
            "  -h, --help  show this text",
            "  --version   show the version",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch on the first argument.

    Args:
        argv: the command line without the program's name; None takes it from ``sys.argv``.

    Returns:
        The exit status: 0, or 2 for a command line that names no known subcommand.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argv[0] if argv else ""
    if first in ("-h", "--help"):
        print(usage())
        return 0
    if first == "--version":
        print(f"kfac-dist {version('kfac-dist')}")
        return 0
    if first not in SUBCOMMANDS:
        complaint = f"unknown subcommand {first!r}" if argv else "a subcommand is missing"
        print(f"{usage()}\n\nkfac-dist: error: {complaint}; choose one of {', '.join(SUBCOMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(SUBCOMMANDS[first].module).main(argv) or 0


if __name__ == "__main__":
    raise SystemExit(main())
