"""Saving and resuming: the curvature goes with the checkpoint, and a resumed fit is the uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from kfac_dist.schedules import ExponentialDamping
from kfac_dist.study.resumable import ResumableLoader
from tests.callbacks import jobs
from tests.callbacks.tiny import (
    BATCH,
    Classifier,
    RankBatches,
    assert_equal,
    data,
    fit,
    hooks,
    kfac,
    loader,
    weights,
)
from tests.test_state import assert_state_equal

# Five steps per epoch: neither a factor step nor an inverse step comes first after the resumption, or both do.
CADENCE = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4}
ALIGNED = {"factor_every_n_steps": 5, "inverse_every_n_steps": 5}


def train():
    return loader(data(5 * BATCH))


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": "categorical", "kl_clip": 1e-3},
        {"likelihood": "empirical", "damping": ExponentialDamping(0.1, 0.9, 0.01)},
        {"likelihood": "categorical", "damping_method": "eigen"},
    ],
)
@pytest.mark.parametrize(
    ("cadence", "precision"), [(CADENCE, "32-true"), (ALIGNED, "32-true"), (CADENCE, "bf16-mixed")]
)
def test_a_resumed_fit_equals_the_uninterrupted_one(tmp_path, options, cadence, precision):
    path = str(tmp_path / "last.ckpt")
    options = cadence | options
    whole = Classifier(momentum=0.9)
    fit(whole, [kfac(**options)], train(), max_epochs=2, precision=precision)
    first = fit(Classifier(momentum=0.9), [kfac(**options)], train(), precision=precision)
    first.save_checkpoint(path)  # after the fit, when the hooks are gone
    resumed, callback = Classifier(momentum=0.9), kfac(**options)
    fit(resumed, [callback], train(), max_epochs=2, ckpt_path=path, precision=precision)
    assert callback.state_dict()["step"] == 10
    assert_equal(weights(resumed), weights(whole))


def interruptible(rank=0, ranks=1):
    dataset = data(4 * BATCH)
    return ResumableLoader(dataset, batch_sampler=RankBatches(len(dataset), BATCH, rank, ranks))


FREQUENT = {"factor_every_n_steps": 2, "inverse_every_n_steps": 3}
RUNS = {  # the module's options, the callback's, the Trainer's, and every how many steps resuming is exact
    "one level": ({"momentum": 0.9}, {}, {}, 1),
    "accumulated": ({"momentum": 0.9}, {"damping_method": "eigen"}, {"accumulate_grad_batches": 2}, 1),
    "input side": ({}, {"factor_sides": "input", "damping": ExponentialDamping(0.1, 0.9, 0.01)}, {}, 1),
    "adaptive": ({"lr": 1.0}, {"coarse": "layer_step_momentum"}, {}, 2),
    "coarse": ({}, {"coarse": {"space": "spectral", "damping": 0.1}}, {}, 2),
}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("name", RUNS)
def test_resumed_from_every_checkpoint_within_and_between_epochs(tmp_path, name):
    module, options, trainer, exact = RUNS[name]
    options = FREQUENT | options

    def run(callbacks=(), **more):
        model, callback = Classifier(**module), kfac(**options)
        fit(model, [callback, *callbacks], interruptible(), max_epochs=2, **trainer, **more)
        return weights(model), callback.state_dict()

    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, state = run([every], enable_checkpointing=True)
    files = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("=")[1]))
    assert len(files) == state["step"] == 8 // trainer.get("accumulate_grad_batches", 1)
    for step, path in enumerate(files[:-1], 1):
        resumed, found = run(ckpt_path=str(path))
        assert found["counts"] == state["counts"]
        if step % exact == 0:
            assert_equal(resumed, whole)
            assert_state_equal(found, state)


def test_two_ranks_resumed_within_an_epoch(ranks, tmp_path):
    for rank in ranks.run(2, jobs.interrupted, str(tmp_path), FREQUENT, init=False):
        assert len(rank) == 3
        for resumed in rank[1:]:
            assert_equal(resumed, rank[0])


def test_other_settings_than_the_checkpoints_are_named(tmp_path):
    path = str(tmp_path / "last.ckpt")
    fit(Classifier(), [kfac(damping=0.1)]).save_checkpoint(path)
    with pytest.warns(UserWarning, match=r"settings .*: damping was 0.1 and is 0.2; factor_decay was 0.95 and is"):
        fit(Classifier(), [kfac(damping=0.2, factor_decay=0.5)], max_epochs=2, ckpt_path=path)


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
def test_an_exception_within_a_step_saves_the_state_before_it(tmp_path, monkeypatch):
    """So do the weights that are saved with it."""

    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                monkeypatch.setattr("kfac_dist.preconditioner.plan_step", None)  # the factors are new by then
            return super().training_step(batch, batch_idx)

    before, saver = kfac(), OnExceptionCheckpoint(tmp_path)
    fit(Classifier(), [before], interruptible(), max_steps=2)
    with pytest.raises(TypeError, match="not callable"):
        fit(Failing(), [kfac(), saver], interruptible(), enable_checkpointing=True)
    (path,) = tmp_path.iterdir()
    assert_state_equal(torch.load(path, weights_only=True)["callbacks"]["KFAC"], before.state_dict())


def test_a_checkpoint_loads_with_weights_only(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit(Classifier(), [kfac(**CADENCE), checkpoint], train(), enable_checkpointing=True)
    steps = []
    for path in sorted(tmp_path.iterdir()):
        state = torch.load(path, weights_only=True)["callbacks"]["KFAC"]
        assert set(state["layers"]) == {"first", "last"}
        steps.append(state["step"])
    assert steps == [2, 4]


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
def test_a_checkpoint_of_an_exception_holds_the_state(tmp_path):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("on purpose")
            return super().training_step(batch, batch_idx)

    callback = kfac()
    with pytest.raises(KeyError, match="on purpose"):
        fit(Failing(), [callback, OnExceptionCheckpoint(tmp_path)], train(), enable_checkpointing=True)
    (path,) = tmp_path.iterdir()
    saved = torch.load(path, weights_only=True)["callbacks"]["KFAC"]
    assert saved["step"] == 3
    assert_equal(saved["layers"], callback.state_dict()["layers"])


def test_a_checkpoint_of_other_layers_is_refused(tmp_path):
    path = str(tmp_path / "last.ckpt")
    fit(Classifier(), [kfac(skip_layers=["first"])]).save_checkpoint(path)
    model = Classifier()
    with pytest.raises(MisconfigurationException, match=r"only in the model .'first'.*with the same skip_layers"):
        fit(model, [kfac()], max_epochs=2, ckpt_path=path)
    assert hooks(model) == 0


def test_a_checkpoint_without_kfac_starts_new_curvature(tmp_path):
    path = str(tmp_path / "last.ckpt")
    fit(Classifier()).save_checkpoint(path)
    callback = kfac()
    fit(Classifier(), [callback], max_epochs=2, ckpt_path=path)
    assert callback.state_dict()["step"] == 3


def test_there_is_no_state_before_a_fit():
    assert kfac().state_dict() == {}
