"""The Fisher pass leaves the training's gradients, losses and random stream bitwise as they are (one process)."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from tests.callbacks.tiny import Classifier, Gradients, Manual, assert_equal, fit, kfac, weights


def scaled() -> dict:
    return {"plugins": [MixedPrecision("16-mixed", "cpu")]}


VARIANTS = {
    "plain": (Classifier, {}, dict),
    "recomputed": (Classifier, {"recompute": "non-reentrant"}, dict),
    "batch norm": (Classifier, {"norm": True}, dict),
    "accumulated": (Classifier, {}, lambda: {"accumulate_grad_batches": 2}),
    "bf16-mixed": (Classifier, {}, lambda: {"precision": "bf16-mixed"}),
    "16-mixed": (Classifier, {}, scaled),
    "manual": (Manual, {}, dict),
    "manual 16-mixed": (Manual, {}, scaled),
}


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_raw_gradients_and_losses_are_bitwise_the_same(variant, likelihood):
    module, options, trainer_options = VARIANTS[variant]
    records = []
    for with_kfac in (False, True):
        record = Gradients()
        # A rate of 0 keeps the weights, so that every step can be compared; dropout shows the random stream.
        model = module(lr=0.0, dropout=0.5, **options)
        fit(model, [record, *([kfac(likelihood=likelihood)] if with_kfac else [])], **trainer_options())
        records.append(record)
    plain, watched = records
    assert len(plain.steps) == len(watched.steps) >= 2
    assert_equal(watched.steps, plain.steps)
    assert_equal(watched.losses, plain.losses)
    assert torch.stack(watched.losses).unique().numel() > 1


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_a_gradient_scaler_changes_neither_factors_nor_directions(likelihood):
    directions, states = [], []
    for options in ({}, scaled()):
        callback, record = kfac(likelihood=likelihood, damping=1e-2), Gradients()
        fit(Classifier(lr=0.0), [callback, record], **options)
        directions.append(record.steps)
        states.append({name: layer["factors"]["G"] for name, layer in callback.state_dict()["layers"].items()})
    torch.testing.assert_close(states[1], states[0], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(directions[1], directions[0], rtol=5e-2, atol=5e-3)


def test_buffers_and_the_mode_of_submodules_are_left_alone():
    trained = []
    for callbacks in ([], [kfac()]):
        model = Classifier(lr=0.0, norm=True)
        model.norm.eval()
        fit(model, callbacks)
        assert not model.norm.training
        trained.append(dict(model.named_buffers()))
    assert_equal(trained[1], trained[0])


def test_layers_in_evaluation_mode_are_covered():
    callback = kfac()
    model = Classifier()
    model.first.eval()
    fit(model, [callback])
    assert callback.state_dict()["layers"]["first"]["updates"] == 3


def test_manual_optimization_equals_automatic():
    trained = []
    for module in (Classifier, Manual):
        model = module()
        fit(model, [kfac()])
        trained.append(weights(model))
    assert_equal(trained[1], trained[0])
