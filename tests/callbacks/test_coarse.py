"""The coarse level in the callback, and the trial that its adaptive damping makes without leaving a trace."""

from __future__ import annotations

import random
import threading

import numpy
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torchmetrics.classification import MulticlassAccuracy

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.callbacks import KFAC
from tests.callbacks.tiny import BATCH, CLASSES, Classifier, Manual, assert_equal, data, fit, kfac, loader, weights

ADAPTIVE = {"space": "layer_step_momentum", "damping": "adaptive"}


class Traces(Classifier):
    """Everything that a second evaluation could disturb: dropout, BatchNorm, metrics, logs, lists, other streams."""

    def __init__(self, **options) -> None:
        super().__init__(dropout=0.5, norm=True, **options)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(float(loss.detach()) + random.random() + float(numpy.random.rand()))
        self.accuracy(self.last.weight.detach().T[: len(batch[1])].new_zeros(len(batch[1]), CLASSES), batch[1])
        self.log("loss", loss.detach(), on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        return loss

    def configure_optimizers(self):
        covered = [*self.first.parameters(), *self.last.parameters()]
        groups = [{"params": covered, "lr": self.lr}, {"params": list(self.norm.parameters()), "lr": 0.0}]
        return torch.optim.SGD(groups, lr=self.lr)


def disturbances(model: Traces, folder, coarse) -> dict:
    """What a fit at lr = 0 leaves behind: only the evaluations themselves can make a difference."""
    random.seed(3)
    numpy.random.seed(3)
    callback = kfac(coarse=coarse, log_every_n_steps=0)
    with pytest.warns(UserWarning, match="chooses step sizes and momentum itself"):
        made = fit(
            model, [callback], loader(data(6 * BATCH)), max_epochs=2, logger=CSVLogger(folder), log_every_n_steps=1
        )
    return {
        "callback": {name: value for name, value in made.callback_metrics.items()},
        "csv": next(folder.rglob("metrics.csv")).read_text(),
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "accuracy": model.accuracy.compute(),
        "seen": model.seen,
        "streams": (torch.get_rng_state(), random.random(), float(numpy.random.rand())),
        "weights": weights(model),
        "evaluated": callback.metrics.get("coarse/reduction_ratio"),
    }


def test_the_trial_leaves_no_trace(tmp_path):
    fixed = disturbances(Traces(lr=0.0), tmp_path / "fixed", ADAPTIVE | {"damping": 1.0})
    adaptive = disturbances(Traces(lr=0.0), tmp_path / "adaptive", ADAPTIVE)
    assert fixed.pop("evaluated") is None
    assert adaptive.pop("evaluated") is not None
    assert adaptive.pop("csv") == fixed.pop("csv")
    assert_equal(adaptive, fixed)


def test_the_fine_damping_follows_the_loss_as_in_a_loop_of_ones_own():
    callback, dampings = kfac(damping="adaptive", initial_damping=3.0), []

    class Dampings(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            dampings.append(trainer.callbacks[0].metrics["damping"])

    model = Classifier()
    fit(model, [callback, Dampings()], loader(data(8 * BATCH)))
    other = Classifier()
    options = {"factor_every_n_steps": 1, "inverse_every_n_steps": 1, "damping": "adaptive", "initial_damping": 3.0}
    own = KFACPreconditioner(other, "categorical", **options)
    optimizer = other.configure_optimizers()
    for number, batch in enumerate(loader(data(8 * BATCH))):
        optimizer.zero_grad()
        loss = other.training_step(batch, number)
        own.accumulate()
        loss.backward()
        own.step(lr=optimizer, closure=lambda batch=batch, number=number: other.training_step(batch, number))
        assert own.metrics["damping"] == dampings[number]
        optimizer.step()
    assert len(set(dampings)) > 2
    assert_equal(weights(model), weights(other))


def test_the_trial_is_the_loss_of_the_window_at_both_ends_of_the_step():
    losses, ratios = [], []

    class Counting(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append((batch_idx, torch.is_grad_enabled(), float(loss.detach())))
            return loss

    class Ratio(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ratios.append(trainer.callbacks[0].metrics.get("coarse/reduction_ratio"))

    callback = kfac(coarse=ADAPTIVE | {"initial_damping": 30.0})
    fit(Counting(lr=1.0), [callback, Ratio()], loader(data(4 * BATCH)), accumulate_grad_batches=2)
    trained = [(index, loss) for index, grad, loss in losses if grad]
    tried = [(index, loss) for index, grad, loss in losses if not grad]
    assert [index for index, _ in trained] == [0, 1, 2, 3]
    # Each window: both micro-batches before the step (their training losses once more), then both after it.
    assert [index for index, _ in tried] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert tried[:2] == trained[:2]
    assert tried[4:6] == trained[2:]
    assert sum(loss for _, loss in tried[2:4]) < sum(loss for _, loss in tried[:2])
    assert all(0 < ratio < 3 for ratio in ratios if ratio is not None)


def test_the_bare_name_adapts_and_a_number_does_not():
    for coarse, adapts in (("layer_step_momentum", True), ({"space": "layer_step_momentum", "damping": 0.5}, False)):
        callback = kfac(coarse=coarse, kl_clip=0.5)
        fit(Classifier(lr=1.0), [callback])
        assert ("coarse/reduction_ratio" in callback.metrics) is adapts
        assert callback.metrics["coarse/dimension"] == 4
        assert callback.metrics["coarse/failures"] == 0
        assert {"coarse/beta/first/0", "coarse/beta/last/1", "coarse/decrease", "ms/coarse"} <= set(callback.metrics)


@pytest.mark.parametrize(
    "coarse", ["layer_step", CoarseConfig(space="nicolaides"), {"space": "pcg", "vectors_per_layer": 2}]
)
def test_spaces_by_name_configuration_and_keywords(coarse):
    callback = kfac(coarse=coarse)
    model = Classifier()
    before = weights(model)
    fit(model, [callback])
    assert callback.metrics["coarse/rank"] >= 1
    assert all(bool((before[name] != value).any()) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("coarse", "message"),
    [
        ("layer_stop", r"unknown coarse space 'layer_stop'; known: .*layer_step"),
        ({"space": "layer_step", "vectors": 2}, r"coarse has no 'vectors'; it has space, vectors_per_layer"),
        ({"space": "layer_step", "vectors_per_layer": 2}, r"fixed number of vectors per layer"),
        ({"damping": -1.0}, r"coarse damping=-1.0 must be a finite number above 0"),
        ({"correction": "best"}, r"correction='best' is unknown; choose one of 'error_minimizing'"),
    ],
)
def test_bad_coarse_options_are_refused_at_once(coarse, message):
    with pytest.raises(MisconfigurationException, match=message):
        KFAC(likelihood="categorical", coarse=coarse)


def test_an_uncovered_parameter_at_rate_one_is_refused_before_the_first_step():
    with pytest.raises(MisconfigurationException, match=r"2 parameters that K-FAC does not cover.*parameter_groups"):
        fit(Classifier(lr=1.0, norm=True), [kfac(coarse="layer_step_momentum", skip_layers="Norm")])


def test_manual_optimization_cannot_be_tried():
    with pytest.raises(MisconfigurationException, match=r"manual optimization: choose a number"):
        fit(Manual(lr=1.0), [kfac(coarse=ADAPTIVE)])


def test_a_module_that_cannot_be_copied_says_the_cure():
    model = Classifier(lr=1.0)
    model.lock = threading.Lock()
    with pytest.raises(MisconfigurationException, match=r"Classifier cannot be copied.*choose a number"):
        fit(model, [kfac(coarse=ADAPTIVE)])


def test_by_its_bare_name_the_space_goes_on_without_copies():
    model, callback = Classifier(lr=1.0), kfac(coarse="layer_step_momentum", kl_clip=0.5)
    model.lock = threading.Lock()
    with pytest.warns(UserWarning, match=r"the coarse damping stays where it is: Classifier cannot be copied"):
        fit(model, [callback])
    assert callback.metrics["coarse/damping"] == 1.0


@pytest.mark.parametrize("coarse", [ADAPTIVE | {"max_samples": None}, "layer_step"])
def test_a_fit_resumed_at_a_curvature_step_equals_the_uninterrupted_one(tmp_path, coarse):
    path = str(tmp_path / "last.ckpt")
    options = {"coarse": coarse, "factor_every_n_steps": 5, "inverse_every_n_steps": 5, "kl_clip": 0.1}
    rate = 0.1 if coarse == "layer_step" else 1.0
    whole = Classifier(lr=rate)
    fit(whole, [kfac(**options)], loader(data(5 * BATCH)), max_epochs=2)
    fit(Classifier(lr=rate), [kfac(**options)], loader(data(5 * BATCH))).save_checkpoint(path)
    resumed = Classifier(lr=rate)
    fit(resumed, [kfac(**options)], loader(data(5 * BATCH)), max_epochs=2, ckpt_path=path)
    assert_equal(weights(resumed), weights(whole))
