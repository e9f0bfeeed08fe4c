"""``kfac-dist fit | validate | test | predict``: training from a configuration file, by LightningCLI."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.plugins.environments import MPIEnvironment
from pytorch_lightning.cli import LightningCLI, Namespace
from pytorch_lightning.utilities.exceptions import MisconfigurationException

# Imported classes can be named without their module: --model=Autoencoder, --trainer.callbacks+=KFAC.
import kfac_dist.callbacks
import kfac_dist.study  # noqa: F401
from kfac_dist.comm.torch_dist import settle_at_exit
from kfac_dist.config import CoarseConfig, DistributionConfig
from kfac_dist.environment import detect_environment
from kfac_dist.launch.requeue import RequeueOnSignal
from kfac_dist.launch.whole import WholeCheckpointIO

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

    def instantiate_classes(self) -> None:
        """As LightningCLI's; a value that this package refuses ends as one that the parser refuses: in its own words.

        Raises:
            SystemExit: 2, after the message.
        """
        try:
            check_keywords(self._get(self.config, "trainer", default={}))
            super().instantiate_classes()
        except Exception as error:
            words = refusal(error)
            if words is None:
                raise
            self.parser.error(words)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer, with checkpoint files that are whole, and what a SLURM job adds to it."""
        trainer = self._get(self.config_init, "trainer", default={})
        return super().instantiate_trainer(**additions(os.environ, trainer), **kwargs)


def check_keywords(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for a value within ``coarse:`` or ``distribution:`` of a callback.

    Where an option may be one of several types, the parser keeps what the first of them said of a value, not the one
    that was meant.
    """
    for callback in _listed(trainer.get("callbacks")):
        options = getattr(callback, "init_args", None) or {}
        for name, kind in (("coarse", CoarseConfig), ("distribution", DistributionConfig)):
            given = options.get(name)
            if isinstance(given, Namespace) and set(given.keys()) == {field.name for field in fields(kind)}:
                kind(**given.as_dict())


def refusal(error: BaseException) -> str | None:
    """What this package said of a value, below the errors that the parser made of it; None: the error is another's.

    A user's own class keeps its traceback, which names the line.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, (ValueError, MisconfigurationException)):
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(error) if str(frame.f_globals.get("__name__")).startswith("kfac_dist.") else None


def additions(variables: Mapping[str, str], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the Trainer beyond its configuration.

    Args:
        variables: such as ``os.environ``.
        trainer: the configuration.
    """
    callbacks, plugins = ([*_listed(trainer.get(name))] for name in ("callbacks", "plugins"))
    added: dict[str, Any] = {}
    if "SLURM_JOB_ID" in variables:
        if not any(isinstance(callback, RequeueOnSignal) for callback in callbacks):
            callbacks.append(RequeueOnSignal())
        added["callbacks"] = callbacks
        if not plugins and detect_environment(variables).launcher in ("openmpi", "mpich"):
            # Lightning would read SLURM's variables, which are those of mpirun and not of its processes.
            plugins.append(MPIEnvironment())
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(WholeCheckpointIO())
    return added | {"plugins": plugins}


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def main(argv: Sequence[str]) -> int:
    """Run one of Lightning's subcommands.

    Args:
        argv: the subcommand and its options.

    Returns:
        0; the parser exits with 2 by itself where it does not understand the options.
    """
    settle_at_exit()
    # The real command line goes as None: LightningCLI warns of arguments that stand beside those in sys.argv.
    TrainingCLI(None if list(argv) == sys.argv[1:] else argv)
    return 0
