"""``kfac-dist inspect``: what K-FAC would do with every module of a configured model, before anything is trained."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from kfac_dist.callbacks import KFAC
from kfac_dist.launch.train import PROGRAM, TrainingCLI

WIDTH = 150
"""Characters of a line that goes to a file or a pipe."""


def main(argv: Sequence[str]) -> int:
    """Print the table.

    Args:
        argv: "inspect" and its options; what is not its own goes to LightningCLI, as for ``fit``.

    Returns:
        0, or 2 where the model has no layer that can be preconditioned.
    """
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} inspect",
        description="A table of the modules: treatment, factor sizes, memory, owners, and why one is left alone.",
        epilog="All other options are those of `kfac-dist fit`: --config FILE, --model.width=10, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks to spread the work over (1)")
    options, rest = parser.parse_known_args(list(argv)[1:])
    if options.world_size < 1:
        parser.error(f"--world-size {options.world_size} must be at least 1")
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    with warnings.catch_warnings():  # the program's own arguments stand in sys.argv, and that is right
        warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter.*")
        cli = TrainingCLI(rest, run=False, save_config_callback=None)
    found = [callback for callback in cli.trainer.callbacks if isinstance(callback, KFAC)]  # type: ignore[attr-defined]
    if not found:
        console.print("The configuration has no KFAC callback: this is what one with its default options would do.")
    cli.model.configure_model()
    try:
        console.print((found or [KFAC("empirical")])[0].inspect(cli.model, options.world_size))
    except MisconfigurationException as error:
        parser.error(str(error))
    return 0
