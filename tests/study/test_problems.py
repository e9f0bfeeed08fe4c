from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kfac_dist.study import Autoencoder, Digits, DigitsCNN
from kfac_dist.study.in_memory import InMemoryDataset, already_collated

SMALL = (12, 8, 3)


def quiet_trainer(**options: object) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )


def test_the_papers_autoencoder() -> None:
    linear = [layer for layer in Autoencoder().net if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] + [784] == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    kinds = "".join("L" if isinstance(layer, nn.Linear) else "r" for layer in Autoencoder().net)
    assert kinds == "LrLrLrLLrLrLrL"  # the code layer and the output are linear


def test_autoencoder_forward_returns_logits() -> None:
    model = Autoencoder()
    logits = model(torch.rand(5, 784))
    assert logits.shape == (5, 784)
    assert logits.min() < 0
    assert torch.equal(model.predict_step([torch.ones(5, 784)], 0), model(torch.ones(5, 784)).sigmoid())


def test_autoencoder_loss_is_a_sum_over_pixels_and_a_mean_over_images() -> None:
    torch.manual_seed(0)
    model, images = Autoencoder(SMALL).double(), torch.rand(7, 12, dtype=torch.float64)
    loss = model.training_step([images], 0)
    p = model(images).sigmoid()
    per_image = -(images * p.log() + (1 - images) * (1 - p).log()).sum(1)
    assert loss.item() == pytest.approx(per_image.mean().item(), rel=1e-12)
    assert loss.requires_grad


def test_the_squared_error_is_halved_summed_over_pixels_and_of_pixels_not_logits() -> None:
    torch.manual_seed(0)
    model, images = Autoencoder(SMALL, error="squared").double(), torch.rand(7, 12, dtype=torch.float64)
    loss = model.training_step([images], 0)
    assert loss.item() == pytest.approx(0.5 * ((model(images) - images) ** 2).sum(1).mean().item(), rel=1e-12)
    assert torch.equal(model.predict_step([images], 0), model(images))


def test_logged_pixel_loss_is_the_mean_over_pixels_and_images() -> None:
    torch.manual_seed(0)
    model, images = Autoencoder(SMALL, lr=0.0), torch.rand(7, 12)
    # 7 images in batches of 4 and 3: a mean of batch means would weigh them wrongly.
    loader = DataLoader(InMemoryDataset(images), batch_size=4, collate_fn=already_collated)
    expected = F.binary_cross_entropy_with_logits(model(images), images).item()
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["pixel_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert trainer.callback_metrics["val_pixel_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert trainer.test(model, loader, verbose=False)[0]["test_pixel_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("init", "variance"), [("default", 1 / 3000), ("xavier", 2 / 1500), ("kaiming", 2 / 1000)])
def test_initialisations_have_the_variance_they_are_named_for(init: str, variance: float) -> None:
    torch.manual_seed(0)
    layer = Autoencoder(init=init).net[2]  # type: ignore[arg-type]
    assert layer.weight.shape == (500, 1000)
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.02)
    assert init == "default" or not layer.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [784]}, r"widths=\[784\] must be two or more"),
        ({"activation": "gelu"}, "activation='gelu' is unknown; choose one of relu, tanh, sigmoid"),
        ({"init": "sparse"}, "init='sparse' is unknown"),
        ({"error": "cubed"}, "error='cubed' is unknown; choose one of cross_entropy, squared"),
    ],
)
def test_autoencoder_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder(**arguments)  # type: ignore[arg-type]


def test_digits_cnn_forward_returns_logits_and_the_loss_their_cross_entropy() -> None:
    torch.manual_seed(0)
    model, images, labels = DigitsCNN(), torch.rand(6, 1, 8, 8), torch.arange(6)
    logits = model(images)
    assert logits.shape == (6, 10)
    loss = model.training_step((images, labels), 0)
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[torch.arange(6), labels].mean().item(), rel=1e-6)
    assert loss.requires_grad
    assert torch.allclose(model.predict_step((images, labels), 0).sum(1), torch.ones(6))
    with pytest.raises(ValueError, match="channels=0"):
        DigitsCNN(channels=0)


def test_digits_cnn_learns_real_digits() -> None:
    pl.seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(DigitsCNN(), datamodule=Digits(batch_size=64))
    assert trainer.callback_metrics["val_accuracy"] > 0.9
    assert trainer.callback_metrics["loss"] < 0.5


def test_the_optimizer_takes_the_constructors_arguments() -> None:
    for model in (Autoencoder(SMALL, lr=0.02, momentum=0.8), DigitsCNN(lr=0.02, momentum=0.8)):
        group = model.configure_optimizers().param_groups[0]
        assert (group["lr"], group["momentum"]) == (0.02, 0.8)
