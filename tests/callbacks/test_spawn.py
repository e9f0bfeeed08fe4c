"""Strategies that start the processes themselves: the callback travels to them, the weights come back."""

from __future__ import annotations

import pytest
import torch

from kfac_dist.schedules import ExponentialDamping
from tests.callbacks import reference
from tests.callbacks.tiny import Classifier, fit, hooks, kfac, weights


@pytest.mark.filterwarnings("ignore:.*(spawn|fork).*")
def test_spawned_processes_train_as_one():
    """Both get every batch, with the same sample ids, so that their mean is what one process computes."""
    model, callback = Classifier(), kfac(sample_ids_key=2, damping=ExponentialDamping(0.1, 0.5, 0.01))
    fit(model, [callback], strategy="ddp_spawn", devices=2)
    states = reference.train(Classifier(), damping=ExponentialDamping(0.1, 0.5, 0.01))
    torch.testing.assert_close(weights(model), states[-1], rtol=1e-5, atol=1e-6)
    assert hooks(model) == 0
    assert callback.state_dict() == {}  # the curvature stays in the workers
