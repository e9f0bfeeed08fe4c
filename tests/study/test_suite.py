from __future__ import annotations

import math

import pytest
import torch

from kfac_dist import KFACPreconditioner
from kfac_dist.layers import find_layers
from kfac_dist.study.dense_fisher import MAX_PARAMETERS
from kfac_dist.study.run import Logged
from kfac_dist.study.suite import PROBLEMS, UNITS

QUICK = ("faces_autoencoder", "digits_autoencoder", "deep_linear", "digits_cnn", "tiny")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Neither scikit-learn's files nor a folder with CIFAR-10."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def one_batch(name: str, samples: int):
    data = PROBLEMS[name].data()
    data.setup("fit")
    return data.train_set.__getitems__(list(range(samples)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_a_problem_says_of_itself(name: str) -> None:
    entry = PROBLEMS[name]
    assert entry.note
    assert entry.unit == UNITS[entry.loss]
    layers = find_layers(entry.model()).layers
    covered = sum(math.prod(layer.shape) for layer in layers)
    assert covered <= MAX_PARAMETERS if entry.dense else covered > MAX_PARAMETERS


# Of a likelihood that is not the loss's K-FAC warns at the first step.
@pytest.mark.filterwarnings("error:the output gradients of the training", "error:the gradient of the training")
@pytest.mark.parametrize("name", [*QUICK, "char_gpt", "cifar_resnet20"])
def test_kfac_knows_the_loss_of_every_problem(name: str, elsewhere) -> None:
    torch.manual_seed(0)
    entry, batch = PROBLEMS[name], one_batch(name, 8)
    model = entry.model()
    logged = Logged(model)
    kfac = KFACPreconditioner(model, coarse="layer_step", damping=0.1, seed=0, **entry.kfac)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model.loss(batch, "")
    assert math.isfinite(float(logged.values[entry.loss]))
    kfac.accumulate()
    loss.backward()
    kfac.step(lr=optimizer)
    optimizer.step()
    kfac.close()
    with torch.no_grad():
        assert model.loss(batch, "") < loss
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True) if p.requires_grad)


def test_the_gaussian_problems_have_the_fisher_of_their_loss() -> None:
    """The mean gradient's second moment at targets of the model is the Fisher matrix, if loss and likelihood agree."""
    for name in ("faces_autoencoder", "deep_linear"):
        entry, x = PROBLEMS[name], one_batch(name, 6)[0]
        model = entry.model()
        Logged(model)
        outputs = model(x).detach().requires_grad_()
        model.forward = lambda images, outputs=outputs: outputs  # the loss as a function of the outputs
        target = x if name == "faces_autoencoder" else torch.zeros_like(outputs)
        batch = (x,) if name == "faces_autoencoder" else (x, target)
        (gradient,) = torch.autograd.grad(model.loss(batch, ""), outputs)
        torch.testing.assert_close(gradient * len(x), outputs.detach() - target)  # f - y of a sample, unit variance
        assert entry.kfac["likelihood"] == "gaussian"
