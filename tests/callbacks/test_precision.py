"""Precisions of a Trainer: mixed ones end where float32 does, an overflow costs its step, others are refused."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset

from kfac_dist.callbacks.checks import SUPPORTED_PRECISIONS
from tests.callbacks import reference
from tests.callbacks.test_refusals import blank, with_strategy
from tests.callbacks.tiny import BATCH, CLASSES, FEATURES, Classifier, assert_equal, fit, kfac, loader, weights

STEPS, OVERFLOW, SIZE = 30, 9, 16


def options(precision, scaler=None):
    """The Trainer's options; on a CPU the name "16-mixed" alone means bfloat16."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision(precision, "cpu", scaler or torch.amp.GradScaler("cpu"))]}


class Wide(pl.LightningModule):
    """20-20-10; the loss of one batch is far beyond float16, or the batch is left out."""

    def __init__(self, overflow=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10))
        self.overflow = overflow

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if batch_idx != OVERFLOW or self.overflow is None:
            return loss
        return loss * 1e30 if self.overflow else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def problem():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS * SIZE, 20, generator=generator)
    return TensorDataset(x, (x @ torch.randn(20, 10, generator=generator)).argmax(1))


class Watch(pl.Callback):
    """Weights and moving averages after every step."""

    def __init__(self, callback):
        self.callback = callback
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = self.callback.state_dict()
        factors = {name: layer["factors"] for name, layer in state["layers"].items()}
        self.seen.append((weights(pl_module), factors, dict(self.callback.metrics)))


def train(precision, overflow=None, scaler=None):
    """The module and what was seen; with the exact Fisher, so that a skipped step moves no random numbers."""
    callback = kfac(fisher_samples="exact", damping=0.1)
    model, watch = Wide(overflow), Watch(callback)
    fit(model, [callback, watch], loader(problem(), SIZE), **options(precision, scaler))
    return model, watch.seen


def distance(left, right):
    """The largest relative distance between tensors of the same name."""
    return max(float((left[name] - right[name]).norm() / right[name].norm()) for name in right)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_float16_with_an_overflow_equals_float32_without_that_batch():
    scaler = torch.amp.GradScaler("cpu")
    _, half = train("16-mixed", overflow=True, scaler=scaler)
    _, single = train("32-true", overflow=False)
    assert len(half) == STEPS
    # The step of the overflow: counted, and neither weights nor moving averages move.
    (before, averages, _), (after, averages_after, metrics) = half[OVERFLOW - 1 : OVERFLOW + 1]
    assert_equal(after, before)
    assert_equal(averages_after, averages)
    assert metrics["dropped_statistics"] == 1
    assert metrics["factor_updates"] == OVERFLOW
    # Everything after it is as if the batch had never been there.
    assert scaler.get_scale() == 2.0**15
    (found, found_averages, metrics), (wanted, wanted_averages, wanted_metrics) = half[-1], single[-1]
    assert metrics["dropped_statistics"] == 1
    assert metrics["factor_updates"] == wanted_metrics["factor_updates"] == STEPS - 1
    assert metrics["inverse_fallbacks"] == 0
    moved = distance(wanted, single[0][0])
    assert moved > 0.3
    assert distance(found, wanted) < 0.02 * moved
    for layer, factors in wanted_averages.items():
        assert distance(*({side: each[side] for side in "AG"} for each in (found_averages[layer], factors))) < 0.01


def test_a_plain_loop_with_a_gradient_scaler_is_that_fit():
    """The order of the calls that the README asks of one's own loop: unscale, K-FAC, clip, step."""
    scaler = torch.amp.GradScaler("cpu")
    callback, model = kfac(likelihood="empirical", kl_clip=1e-3), Wide(overflow=True)
    fit(model, [callback], loader(problem(), SIZE), gradient_clip_val=0.5, **options("16-mixed", scaler))
    own, its_scaler = Wide(overflow=True), torch.amp.GradScaler("cpu")
    core, optimizer = reference.preconditioner(own, likelihood="empirical", kl_clip=1e-3), own.configure_optimizers()
    for index, batch in enumerate(loader(problem(), SIZE)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = own.training_step(batch, index)
        core.accumulate()
        its_scaler.scale(loss).backward()
        its_scaler.unscale_(optimizer)
        core.step(lr=optimizer, grad_scale=its_scaler.get_scale())
        torch.nn.utils.clip_grad_norm_(own.parameters(), 0.5)
        its_scaler.step(optimizer)
        its_scaler.update()
    assert core.metrics["dropped_statistics"] == 1
    assert_equal(weights(own), weights(model))
    assert_equal(core.state_dict()["layers"], callback.state_dict()["layers"])


def test_bfloat16_ends_at_the_loss_of_float32():
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        model, _ = train(precision)
        x, y = problem().tensors
        losses.append(float(F.cross_entropy(model(x), y).detach()))
    assert losses[0] < 1.1  # from 2.4
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("precision", SUPPORTED_PRECISIONS)
def test_factors_are_made_in_float32_at_least(precision, likelihood):
    """1 + 2^-7 is a bfloat16 and its square is none."""
    x = torch.full((BATCH, FEATURES), 1 + 2**-7)
    dataset = TensorDataset(x, torch.arange(BATCH) % CLASSES)
    model = Classifier(lr=0.0)
    model.activation = nn.Identity()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(FEATURES)[:-1])
        model.first.bias.zero_()
    callback = kfac(likelihood=likelihood)
    fit(model, [callback], loader(dataset), **options(precision))
    dtype = torch.float64 if precision == "64-true" else torch.float32
    for layer in callback.state_dict()["layers"].values():
        factors = layer["factors"]
        assert factors["A"].dtype == factors["G"].dtype == dtype
        inner = factors["A"][0, :-1, :-1]
        assert_equal(inner, torch.full_like(inner, (1 + 2**-7) ** 2))
        assert not torch.equal(factors["G"].to(torch.bfloat16).to(dtype), factors["G"])


def test_double_precision_is_the_plain_loop_in_double_precision():
    model = Classifier()
    fit(model, [kfac(sample_ids_key=2)], precision="64-true")
    batches = [[(x.double(), y, ids)] for x, y, ids in loader()]
    assert next(model.parameters()).dtype == torch.float64
    assert_equal(weights(model), reference.train(Classifier().double(), batches)[-1])


def test_parameters_in_bfloat16_get_the_rounded_directions_of_float32():
    model, exact = Classifier(), Classifier()
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.to(torch.bfloat16))
    start = weights(exact)
    options = {"fisher_samples": "exact", "damping": 0.1}
    fit(model, [kfac(**options)], precision="bf16-true", max_steps=1)
    fit(exact, [kfac(**options)], max_steps=1)
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        # The update is a tenth of a direction of about the size of the weights, whose last place is 2^-8.
        moved, wanted = p.detach().float() - start[name], weights(exact)[name] - start[name]
        torch.testing.assert_close(moved, wanted, rtol=0.05, atol=2**-8 * float(start[name].abs().max()))
        assert wanted.abs().max() > 4 * 2**-8 * start[name].abs().max()


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("16-true", "overflow and underflow"),
        ("transformer-engine", "replaces the layers"),
        ("transformer-engine-float16", "replaces the layers"),
        ("8-wonderful", "not known"),
    ],
)
def test_other_precisions_are_refused_by_name(precision, reason):
    other = with_strategy(blank(type("SingleDeviceStrategy", (), {})), precision=precision)
    with pytest.raises(MisconfigurationException, match=f"precision='{precision}': .*{reason}.*'bf16-mixed'"):
        kfac().setup(other, Classifier(), "fit")
