"""Beside other features of Lightning a fit ends with the weights of a plain PyTorch loop that does the same by hand."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from kfac_dist import CoarseConfig
from tests.callbacks import reference
from tests.callbacks.tiny import (
    BATCH,
    CLASSES,
    Classifier,
    assert_equal,
    data,
    fit,
    hooks,
    kfac,
    loader,
    trainer,
    weights,
)

BATCHES = [tuple(batch) for batch in loader()]


def sampled(**options):
    return kfac(sample_ids_key=2, **options)


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("options", [{}, {"kl_clip": 1e-3}, {"coarse": CoarseConfig(space="layer_step", damping=0.1)}])
def test_a_fit_is_the_plain_loop(likelihood, options):
    model = Classifier()
    fit(model, [sampled(likelihood=likelihood, **options)])
    assert_equal(weights(model), reference.train(Classifier(), likelihood=likelihood, **options)[-1])


@pytest.mark.parametrize(
    ("algorithm", "bound", "clip"), [("norm", 0.05, clip_grad_norm_), ("value", 0.02, clip_grad_value_)]
)
def test_gradients_are_clipped_after_they_were_preconditioned(algorithm, bound, clip):
    model = Classifier()
    fit(model, [sampled()], gradient_clip_val=bound, gradient_clip_algorithm=algorithm)
    states = reference.train(Classifier(), clip=lambda parameters: clip(parameters, bound))
    assert_equal(weights(model), states[-1])
    free = reference.train(Classifier())
    assert all(not torch.equal(states[1][name], free[1][name]) for name in free[1])  # the bound is felt everywhere


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_windows_that_grow_with_the_epochs(likelihood):
    """Three batches: windows of one in the first epoch, of two and one in the second, which divides by two twice."""
    model, callback = Classifier(), sampled(likelihood=likelihood)
    fit(model, [callback, GradientAccumulationScheduler({0: 1, 1: 2})], max_epochs=2)
    windows = [*([batch] for batch in BATCHES), BATCHES[:2], BATCHES[2:]]
    states = reference.train(Classifier(), windows, divisor=lambda step: 1 if step < 3 else 2, likelihood=likelihood)
    assert callback.state_dict()["step"] == 5
    assert_equal(weights(model), states[-1])


def test_recomputed_activations():
    model = Classifier(recompute="non-reentrant")
    fit(model, [sampled()])
    assert_equal(weights(model), reference.train(Classifier())[-1])


@pytest.mark.filterwarnings("ignore:.*SyncBatchNorm normalises with the samples of other processes")
def test_a_synchronised_batch_norm_is_a_batch_norm_that_is_not_covered():
    """In evaluation mode, as torch synchronises statistics on GPUs only."""
    trained = []
    for convert in (lambda model: model, torch.nn.SyncBatchNorm.convert_sync_batchnorm):
        model = convert(Classifier(norm=True))
        model.norm.eval()
        fit(model, [sampled(skip_layers=[r"\ABatchNorm"])])
        trained.append(weights(model))
    assert isinstance(model.norm, torch.nn.SyncBatchNorm)
    assert_equal(trained[1], trained[0])


def test_a_compiled_lightning_module():
    plain, compiled = Classifier(), Classifier()
    compiled.activation = plain.activation = torch.nn.Tanh()
    fit(torch.compile(compiled, backend="aot_eager"), [sampled()])
    assert hooks(compiled) == 0
    torch.testing.assert_close(weights(compiled), reference.train(plain)[-1], rtol=1e-5, atol=1e-6)


# -- averages of weights ----------------------------------------------------------------------------------------------


class EpochStarts(pl.Callback):
    """Weights and learning rates at the start of every epoch."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights.append(weights(pl_module))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def mean(states):
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def test_stochastic_weight_averaging():
    """The average is over the starts of the epochs from its own start on; its schedule changes the rates."""
    model, starts = Classifier(), EpochStarts()
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SWA.*")
        fit(model, [averaging, sampled(kl_clip=1e-3), starts], max_epochs=4)
    assert len(set(starts.rates)) > 1
    states = reference.train(
        Classifier(),
        [[batch] for _ in range(4) for batch in BATCHES],
        lr=lambda step: starts.rates[step // 3],
        kl_clip=1e-3,
    )
    assert_equal(starts.weights, states[0:12:3])
    torch.testing.assert_close(weights(model), mean(states[3:12:3]))


def test_exponential_averages():
    model = Classifier()
    fit(model, [EMAWeightAveraging(decay=0.75, update_every_n_steps=1), sampled()], max_epochs=2, validation=loader())
    states = reference.train(Classifier(), [[batch] for _ in range(2) for batch in BATCHES])
    average = states[1]
    for state in states[2:]:
        average = {name: 0.75 * average[name] + 0.25 * state[name] for name in state}
    torch.testing.assert_close(weights(model), average)
    assert hooks(model) == 0


def test_averages_of_the_plain_kind():
    model = Classifier()
    fit(model, [sampled(), WeightAveraging()])  # behind K-FAC in the list: it copies the module all the same
    torch.testing.assert_close(weights(model), mean(reference.train(Classifier())[1:]))


# -- the Tuner --------------------------------------------------------------------------------------------------------


class Tunable(Classifier):
    """Loads its own data, in batches whose size it knows."""

    batch_size = 1

    def train_dataloader(self):
        return loader(data(4 * BATCH), self.batch_size)

    val_dataloader = train_dataloader  # the Tuner asks for it


@pytest.mark.filterwarnings("ignore:.*(many workers|number of training batches|treespec|no `val_dataloader`|srun).*")
@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_after_the_tuner_a_fit_is_the_one_without_it(tmp_path, search):
    """It searches without callbacks, and what it found is all that it leaves."""
    model, callback = Tunable(), sampled()
    made = trainer([callback], default_root_dir=tmp_path)
    if search == "lr_find":
        Tuner(made).lr_find(model, num_training=30, early_stop_threshold=None)
        assert model.lr != 0.1
    else:
        Tuner(made).scale_batch_size(model, steps_per_trial=1, max_trials=2)
        assert model.batch_size > 1
    assert callback.state_dict() == {}
    assert hooks(model) == 0
    assert_equal(weights(model), weights(Tunable()))
    made.fit(model)
    windows = [[batch] for batch in loader(data(4 * BATCH), model.batch_size)]
    assert_equal(weights(model), reference.train(Classifier(), windows, lr=lambda step: model.lr)[-1])


@pytest.mark.filterwarnings("ignore:.*(many workers|treespec|srun).*")
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=30, early_stop_threshold=None),
        lambda: BatchSizeFinder(steps_per_trial=1, max_trials=2),
    ],
)
def test_a_search_at_the_start_of_the_fit_leaves_nothing_else(tmp_path, finder, behind):
    """Behind K-FAC in the list it trains with the hooks in place."""
    model, callback = Tunable(), sampled()
    callbacks = [callback, finder()] if behind else [finder(), callback]
    trainer(callbacks, default_root_dir=tmp_path).fit(model)
    assert (model.lr, model.batch_size) != (0.1, 1)
    windows = [[batch] for batch in loader(data(4 * BATCH), model.batch_size)]
    assert callback.state_dict()["step"] == len(windows)
    assert hooks(model) == 0
    assert_equal(weights(model), reference.train(Classifier(), windows, lr=lambda step: model.lr)[-1])


# -- other uses of a Trainer ------------------------------------------------------------------------------------------


class WithTest(Classifier):
    def test_step(self, batch, batch_idx):
        self.log("classes", float(self(batch[0]).shape[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.filterwarnings("ignore:.*(many workers|treespec|srun|custom batch sampler).*")
def test_without_a_fit_nothing_happens():
    model, callback = WithTest(), kfac()
    made = trainer([callback])
    (tested,) = made.test(model, loader(), verbose=False)
    predicted = torch.cat(made.predict(model, loader()))
    assert tested == {"classes": float(CLASSES)}
    assert torch.equal(predicted, torch.cat([model(batch[0]) for batch in BATCHES]))
    assert callback.state_dict() == {}
    assert dict(callback.metrics) == {}
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:.*(many workers|number of training batches|treespec|no `val_dataloader`|srun).*")
def test_another_fit_of_the_same_trainer_goes_on_with_new_curvature():
    model, callback = Classifier(), sampled()
    made = trainer([callback])
    expected = Classifier()
    for epochs in (1, 2):
        made.fit_loop.max_epochs = epochs
        made.fit(model, loader())
        assert_equal(weights(model), reference.train(expected)[-1])
        assert callback.state_dict()["step"] == 3
