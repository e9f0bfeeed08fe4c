"""``preconditioning="samples"`` under a Trainer: what it cannot go with, and what DDP has to be told beforehand."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from kfac_dist.callbacks.checks import misconfigurations
from kfac_dist.compat import let_ddp_ignore
from kfac_dist.config import KFACConfig
from kfac_dist.layers import find_layers
from kfac_dist.rank_b import plain_linears


def refuse_scaler(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException where a gradient scaler looks for overflows in the gradients."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f'KFAC(preconditioning="samples") does not run with precision={trainer.precision!r}: its scaler unscales '
            'gradients and looks for overflows in them, and there are none: use "bf16-mixed", or '
            'preconditioning="gradients"'
        )


def let_ddp_leave_linears(pl_module: pl.LightningModule, method: KFACConfig) -> Callable[[], None]:
    """Keep the parameters whose gradients will not come out of DDP, which would wait for them.

    DDP wants a parameter to itself: where all belong to such layers, the smallest of these stays with it.

    Returns:
        What takes it back, after the fit.
    """
    with misconfigurations():
        layers = plain_linears(pl_module, find_layers(pl_module, method).layers)
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    sizes = sorted(layers, key=lambda layer: layer.output_dim * layer.input_dim)
    own = {names[id(parameter)] for layer in sizes for parameter in layer.parameters}
    if own.issuperset(name for name, parameter in pl_module.named_parameters() if parameter.requires_grad) and sizes:
        own -= {names[id(parameter)] for parameter in sizes[0].parameters}
    return let_ddp_ignore(pl_module, own)
