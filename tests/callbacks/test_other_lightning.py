"""Lightning comes as ``pytorch_lightning`` and as ``lightning.pytorch``, with classes that are not the same.

The second one need not be installed: the modules of the first are loaded once more, which makes a second tree of
classes with the same names, and the callback of the first tree has to work in the Trainer of the second.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from kfac_dist.callbacks import KFAC
from tests.callbacks.tiny import Classifier, assert_equal, fit, hooks, loader, weights

PACKAGES = ("pytorch_lightning", "lightning_fabric")
OPTIONS = {"likelihood": "categorical", "factor_every_n_steps": 2, "inverse_every_n_steps": 3, "kl_clip": 1e-3}


def loaded() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}


@pytest.fixture(scope="module")
def other() -> Iterator[ModuleType]:
    """The second tree."""
    first = loaded()
    for name in first:
        del sys.modules[name]
    try:
        second = importlib.import_module("pytorch_lightning")
        yield second
    finally:
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(first)


def module(other: ModuleType, **options) -> nn.Module:
    """The tiny classifier as a module of the second tree."""
    plain = Classifier(**options)

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.activation = plain.first, plain.norm, plain.activation
            self.dropout, self.last = plain.dropout, plain.last

        hidden = Classifier.hidden

        def forward(self, x):
            return self.last(self.hidden(x))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=plain.lr, momentum=plain.momentum)

    return Other()


def other_trainer(other: ModuleType, callback: KFAC, **options):
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return other.Trainer(callbacks=[callback], **defaults | quiet | options)


pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|number of training batches|treespec|srun|ckpt_path).*")


def test_the_callback_of_one_works_in_the_trainer_of_the_other(other, tmp_path):
    assert other.Callback is not pytorch_lightning.Callback
    wanted, callback = Classifier(momentum=0.9), KFAC(**OPTIONS)
    fit(wanted, [callback], max_epochs=2)
    found, its = module(other, momentum=0.9), KFAC(**OPTIONS)
    made = other_trainer(other, its)
    made.fit(found, loader())
    made.save_checkpoint(tmp_path / "half.ckpt")
    resumed, its = module(other, momentum=0.9), KFAC(**OPTIONS)
    other_trainer(other, its, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_equal(weights(resumed), weights(wanted))
    assert its.state_dict()["step"] == 6
    assert hooks(found) == hooks(resumed) == 0


def test_adaptive_damping_evaluates_the_loss_there_too(other):
    options = OPTIONS | {"coarse": {"space": "layer_step", "damping": "adaptive"}}
    wanted, found, callback = Classifier(), module(other), KFAC(**options)
    fit(wanted, [KFAC(**options)])
    other_trainer(other, callback).fit(found, loader())
    assert "coarse/reduction_ratio" in callback.metrics
    assert_equal(weights(found), weights(wanted))


def test_what_is_refused_is_refused_there_too(other):
    strategies = importlib.import_module("pytorch_lightning.strategies")
    assert strategies.FSDPStrategy not in pytorch_lightning.strategies.__dict__.values()
    made = other_trainer(other, KFAC(**OPTIONS))
    for name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        made.strategy.__class__ = getattr(strategies, name)
        with pytest.raises(MisconfigurationException, match=name):
            KFAC(**OPTIONS).setup(made, module(other), "fit")
    made.strategy.__class__ = strategies.DDPStrategy
    KFAC(**OPTIONS).setup(made, module(other), "fit")
