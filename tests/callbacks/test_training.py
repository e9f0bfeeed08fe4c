"""What the callback does to a fit on one process: windows, clipping, overflow, frozen layers, logs, life cycle."""

from __future__ import annotations

import copy
import csv
import pickle
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from kfac_dist.schedules import ExponentialDamping
from tests.callbacks.tiny import (
    BATCH,
    Classifier,
    Gradients,
    assert_equal,
    data,
    fit,
    hooks,
    kfac,
    loader,
    weights,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}
DOUBLE = {"precision": "64-true"}


def directions(model, train=None, **options):
    """The gradients behind the callback, step by step, and the callback."""
    record = Gradients()
    callback = options.pop("callback", None) or kfac(sample_ids_key=2)
    fit(model, [callback, record], train, **DOUBLE | options)
    return record.steps, callback


# -- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("factors_every", [1, 2])
def test_accumulated_micro_batches_equal_the_big_batch(likelihood, factors_every):
    options = {"likelihood": likelihood, "sample_ids_key": 2, "factor_every_n_steps": factors_every, "kl_clip": 1e-3}
    big, _ = directions(Classifier(), callback=kfac(**options))
    small, _ = directions(Classifier(), loader(batch=BATCH // 2), callback=kfac(**options), accumulate_grad_batches=2)
    assert len(big) == len(small) == 3
    torch.testing.assert_close(small, big, **EXACT)


def test_a_short_last_window_counts_its_own_samples():
    """Six batches in windows of four: Lightning divides the last two losses by four as well."""
    dataset = data(6 * 4)
    callback = kfac(likelihood="empirical", factor_decay=0.0)
    accumulated, _ = directions(
        Classifier(lr=0.0), loader(dataset, 4), callback=callback, accumulate_grad_batches=4, max_epochs=1
    )
    assert len(accumulated) == 2
    alone = kfac(likelihood="empirical", factor_decay=0.0)
    last = TensorDataset(*(tensor[16:] for tensor in dataset.tensors))
    directions(Classifier(lr=0.0), loader(last, 8), callback=alone)
    ours, theirs = callback.state_dict()["layers"], alone.state_dict()["layers"]
    for name in theirs:
        for side in ("A", "G"):
            torch.testing.assert_close(ours[name]["factors"][side], theirs[name]["factors"][side], **EXACT)


def test_validation_in_mid_window_changes_nothing():
    runs = []
    for validation in ({}, {"validation": loader(), "val_check_interval": 1}):
        model = Classifier(momentum=0.9)
        fit(model, [kfac()], loader(batch=4), accumulate_grad_batches=2, **validation)
        runs.append(weights(model))
    assert_equal(runs[1], runs[0])


def test_a_skipped_training_step_is_no_step_of_kfac():
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    skipping, callback = Skipping(), kfac(sample_ids_key=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `None`.*")
        fit(skipping, [callback])
    assert callback.state_dict()["step"] == 2
    without = Classifier()
    rest = TensorDataset(*(tensor[BATCH:] for tensor in data().tensors))
    fit(without, [kfac(sample_ids_key=2)], loader(rest))
    assert_equal(weights(skipping), weights(without))


# -- clipping ---------------------------------------------------------------------------------------------------------


def norm(gradients):
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


def test_the_trainers_clipping_acts_on_directions():
    class Clipped(Classifier):
        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            self.before = norm({name: p.grad for name, p in self.named_parameters()})
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

        def on_before_zero_grad(self, optimizer):
            self.after = None

        def optimizer_step(self, *args, **kwargs):
            before = weights(self)
            super().optimizer_step(*args, **kwargs)
            self.moved = norm({name: p.detach() - before[name] for name, p in self.named_parameters()})

    model = Clipped(lr=1.0)
    fit(model, [kfac()], max_steps=1, gradient_clip_val=1e-3)
    assert model.before > 0.1
    torch.testing.assert_close(model.moved, torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_raw_gradients_are_clipped_before_they_are_preconditioned():
    free, callback = directions(Classifier(lr=0.0), max_steps=1)
    raw = callback.metrics["grad_norm"]
    bound = raw / 4
    clipped, _ = directions(
        Classifier(lr=0.0), max_steps=1, callback=kfac(sample_ids_key=2, clip_raw_gradients=float(bound))
    )
    expected = [{name: gradient / 4 for name, gradient in free[0].items()}]
    torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=1e-8)


def test_the_kl_clip_knows_the_optimizers_rate():
    scales = []
    for lr in (0.1, 0.2):
        callback = kfac(kl_clip=1e-8)
        fit(Classifier(lr=lr), [callback], max_steps=1)
        scales.append(callback.metrics["kl_clip_scale"])
    assert scales[0] < 1e-2
    assert scales[1] == pytest.approx(scales[0] / 2, rel=1e-5)


# -- overflow ---------------------------------------------------------------------------------------------------------


def test_an_overflow_leaves_averages_and_weights_alone():
    """A loss scale of 2^100 overflows; the scaler then falls back to 2^10."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-90)
    model, callback = Classifier(momentum=0.9), kfac(kl_clip=1e-3)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = callback.state_dict()
            updates = [layer["updates"] for layer in state["layers"].values()]
            seen.append((updates, dict(state["counts"]), weights(pl_module)))

    before = weights(model)
    with warnings.catch_warnings():
        # The scale of its gradients is no news about the loss.
        warnings.filterwarnings("error", message=".*output gradients of the training loss")
        fit(model, [callback, Watch()], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    updates, counts, after = seen[0]
    assert updates == [0, 0]
    assert counts["dropped_statistics"] == 1
    assert_equal(after, before)
    updates, counts, after = seen[-1]
    assert updates == [2, 2]
    assert all(bool(weight.isfinite().all()) for weight in after.values())
    assert not torch.equal(after["first.weight"], before["first.weight"])


# -- layers -----------------------------------------------------------------------------------------------------------


def test_frozen_layers_are_left_out():
    model = Classifier()
    model.first.requires_grad_(False)
    callback = kfac()
    fit(model, [callback])
    assert list(callback.state_dict()["layers"]) == ["last"]


def test_layers_that_the_optimizer_does_not_hold_are_left_out():
    class Half(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.last.parameters(), lr=0.1)

    callback = kfac(kl_clip=1e-3)
    fit(Half(), [callback])
    assert list(callback.state_dict()["layers"]) == ["last"]


def test_masked_samples_count_nowhere():
    class Masked(Classifier):
        def training_step(self, batch, batch_idx):
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return losses[batch[2]].mean()

    x, y, ids = data(BATCH).tensors
    keep = ids < 6
    masked, _ = directions(
        Masked(lr=0.0),
        loader(TensorDataset(x, y, keep, ids), BATCH),
        callback=kfac(mask_key=2, sample_ids_key=3),
    )
    fewer, _ = directions(Classifier(lr=0.0), loader(TensorDataset(x[keep], y[keep], ids[keep]), 6))
    torch.testing.assert_close(masked, fewer, **EXACT)


def test_the_logits_of_a_submodule():
    class Direct(Classifier):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(self.first, self.activation, self.last)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    named = Direct()
    fit(named, [kfac(output_module="net")])
    default = Classifier()
    fit(default, [kfac()])
    assert_equal(named.last.weight, default.last.weight)


class Wavy(torch.nn.Module):
    """Saves values of its own for the backward, whose memory compiled code gives away unless it is told not to."""

    def forward(self, x):
        return x.sin().exp().tanh()


class Compiled(Classifier):
    """The whole network as one compiled module."""

    def __init__(self, compiled):
        super().__init__(lr=0.0)
        net = torch.nn.Sequential(self.first, Wavy(), self.last)
        self.net = torch.compile(net, backend="aot_eager") if compiled else net
        del self.first, self.last

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_a_compiled_module_gives_the_same_directions_in_every_fit(likelihood):
    functorch = pytest.importorskip("torch._functorch.config")
    before = functorch.donated_buffer
    # The short batch is compiled in step 2, without a Fisher pass, and has one in step 5.
    options = {"likelihood": likelihood, "damping": 0.1, "factor_every_n_steps": 5}
    train = DataLoader(data(20), BATCH)
    plain, compiled = Gradients(), Gradients()
    reference = kfac(**options)
    fit(Compiled(False), [reference, plain], train, max_epochs=2)
    model = Compiled(True)
    model(data().tensors[0][:BATCH])  # compiled for the first batch before there are any hooks
    for index in range(2):
        callback = kfac(**options)
        fit(model, [callback, compiled], train, max_epochs=2)
        assert list(callback.state_dict()["layers"]) == list(reference.state_dict()["layers"])
        for left, right in zip(compiled.steps[6 * index :], plain.steps, strict=True):
            torch.testing.assert_close([*left.values()], [*right.values()], rtol=1e-4, atol=1e-6)
        assert functorch.donated_buffer == before


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "steps"), [(None, ["1", "3", "5"]), (4, ["3"]), (3, ["2", "5"]), (0, [])])
def test_metrics_are_logged_on_the_trainers_cadence_or_their_own(tmp_path, own, steps):
    logger = CSVLogger(tmp_path)
    made = fit(Classifier(), [kfac(log_every_n_steps=own)], loader(data(6 * BATCH)), logger=logger, log_every_n_steps=2)
    path = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
    rows = csv.DictReader(path.read_text().splitlines() if path.exists() else [])
    logged = [(row["step"], row["kfac/step"]) for row in rows if row["kfac/damping"]]
    assert logged == [(step, f"{step}.0") for step in steps]
    assert ("kfac/grad_norm" in made.callback_metrics) == (own is None)


# -- life cycle -------------------------------------------------------------------------------------------------------


def test_hooks_are_gone_after_a_fit_and_another_fit_starts_anew():
    callback = kfac()
    model = Classifier(lr=0.0)
    states = []
    for _ in range(2):
        fit(model, [callback])
        assert hooks(model) == 0
        assert callback.preconditioner is None
        assert callback.metrics["step"] == 2
        states.append(callback.state_dict())
    assert_equal(states[1]["layers"], states[0]["layers"])
    fit(Classifier(norm=True), [callback])
    assert callback.state_dict()["step"] == 3


@pytest.mark.parametrize("hook", ["on_after_backward", "on_train_start", "on_train_batch_end"])
def test_hooks_are_gone_after_an_exception(hook):
    class Failing(Classifier):
        pass

    def fail(*_):
        raise KeyError("on purpose")

    setattr(Failing, hook, fail)
    callback, model = kfac(), Failing()
    with pytest.raises(KeyError, match="on purpose"):
        fit(model, [callback])
    assert hooks(model) == 0
    assert callback.preconditioner is None
    healthy = Classifier()
    fit(healthy, [callback])
    assert callback.state_dict()["step"] == 3


def test_validate_and_test_do_not_touch_the_state():
    callback = kfac()
    made = fit(Classifier(), [callback], validation=loader())
    made.validate(made.lightning_module, dataloaders=loader(), verbose=False)
    assert callback.state_dict()["step"] == 3
    assert hooks(made.lightning_module) == 0


def test_the_callback_can_be_pickled_and_copied_before_and_after_a_fit():
    callback = kfac(damping=ExponentialDamping(0.1, 0.5, 0.01))
    for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        fit(Classifier(), [copied])
        assert copied.metrics["damping"] == 0.1 * 0.5**2
        assert pickle.loads(pickle.dumps(copied)).state_dict()["step"] == 3


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
        lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=1),
    ],
)
def test_weight_averaging_beside_it(averaging):
    """Both callbacks copy the model; stochastic weight averaging also runs an epoch without backward for its norms."""
    model, callback = Classifier(norm=True), kfac()
    fit(model, [averaging(), callback], max_epochs=3)
    assert hooks(model) == 0
    assert callback.state_dict()["step"] == 9
    assert all(bool(weight.isfinite().all()) for weight in weights(model).values())


def test_the_loss_falls():
    model = Classifier(lr=0.5)
    x, y, _ = data().tensors
    before = F.cross_entropy(model(x), y)
    fit(model, [kfac(damping=0.1)], max_epochs=5)
    assert F.cross_entropy(model(x), y) < 0.9 * before
