"""``kfac-dist fit | validate | test | predict``: training from a configuration file, by LightningCLI."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningCLI

# Imported classes can be named without their module: --model=Autoencoder, --trainer.callbacks+=KFAC.
import kfac_dist.callbacks
import kfac_dist.study  # noqa: F401

PROGRAM = "kfac-dist"


class TrainingCLI(LightningCLI):
    """LightningCLI for any model and any data, seeded with 0 unless told otherwise.

    Args:
        args: the command line without the program's name; None takes it from ``sys.argv``.
        **kwargs: as LightningCLI's; ``run=False`` parses and instantiates without training.
    """

    def __init__(self, args: Sequence[str] | None = None, **kwargs: Any) -> None:
        # A problem's own optimizer is a default that `optimizer:` is there to replace: no news for the user.
        warnings.filterwarnings("ignore", message=r".*configure_optimizers` will be overridden by.*")
        # Lightning's own use of torch.utils._pytree, once per batch kind; nothing a user could change.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
        defaults: dict[str, Any] = {
            "seed_everything_default": 0,
            "save_config_kwargs": {"overwrite": True},
            "parser_kwargs": {"prog": PROGRAM},
        }
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=None if args is None else list(args),
            **defaults | kwargs,
        )


def main(argv: Sequence[str]) -> int:
    """Run one of Lightning's subcommands.

    Args:
        argv: the subcommand and its options.

    Returns:
        0; the parser exits with 2 by itself where it does not understand the options.
    """
    # The real command line goes as None: LightningCLI warns of arguments that stand beside those in sys.argv.
    TrainingCLI(None if list(argv) == sys.argv[1:] else argv)
    return 0
