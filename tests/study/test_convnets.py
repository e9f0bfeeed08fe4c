from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from kfac_dist import KFACPreconditioner
from kfac_dist.callbacks import KFAC
from kfac_dist.study import ImageClassifier
from kfac_dist.study.convnets import PaddedShortcut, Residual, convnet, convnets
from kfac_dist.study.in_memory import InMemoryDataset, already_collated
from tests.study.test_problems import quiet_trainer

# Trainable numbers with ten classes. ResNet-20: "0.27 M" (He et al. 2016, table 6). The others: convolutions, norms and
# Linear layers of the papers' tables, with the stem and the head for 32 x 32 images.
SIZES = {
    "cuda_convnet": 89_578,
    "resnet18": 11_173_962,
    "resnet20": 269_722,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "vgg11": 9_225_610,
    "vgg11_bn": 9_228_362,
}


def test_the_networks_are_those_that_are_named() -> None:
    assert list(convnets) == sorted(SIZES)
    with pytest.raises(ValueError, match=r"unknown network 'lenet'; known: cuda_convnet, resnet18, .*, vgg11_bn"):
        ImageClassifier(net="lenet")


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_the_size_of_the_literature(name: str) -> None:
    with torch.device("meta"):
        net = convnets[name](10)
        assert sum(p.numel() for p in net.parameters()) == SIZES[name]
        assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert convnets[name](100)(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", 18), ("resnet20", 20), ("resnet34", 34), ("resnet50", 50), ("vgg11", 9)]
)
def test_layers_with_weights_are_counted_without_the_shortcuts(name: str, layers: int) -> None:
    with torch.device("meta"):  # VGG-11 for small images has one Linear layer instead of three
        net = convnets[name](10)
    weighted = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in n]
    assert len(weighted) == layers


def test_only_the_small_residual_net_has_shortcuts_without_parameters() -> None:
    with torch.device("meta"):
        shortcuts = {name: [m.shortcut for m in convnets[name](10) if isinstance(m, Residual)] for name in convnets}
    assert [type(s) for s in shortcuts["resnet20"]].count(PaddedShortcut) == 2  # before stages two and three
    assert not any(list(s.parameters()) for s in shortcuts["resnet20"])
    assert [len(list(s.parameters())) > 0 for s in shortcuts["resnet18"]] == [False, False] + [True, False] * 3
    assert sum(len(list(s.parameters())) > 0 for s in shortcuts["resnet50"]) == 4  # the first stage widens as well


def test_a_padded_shortcut_takes_every_second_pixel_between_channels_of_zeros() -> None:
    x = torch.rand(2, 3, 4, 4)
    y = PaddedShortcut(3)(x)
    assert y.shape == (2, 6, 2, 2)
    assert torch.equal(y[:, 1:4], x[:, :, ::2, ::2])
    assert not y[:, [0, 4, 5]].any()


def test_a_block_adds_its_shortcut_before_the_last_activation() -> None:
    block = Residual(nn.Conv2d(2, 2, 1), nn.Identity())
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(block(x), (block.body(x) + x).clamp_min(0))


def test_deep_networks_pass_the_signal_on_from_the_start() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    for name in ("cuda_convnet", "vgg11", "resnet20"):
        logits = convnet(name, 10)(x)
        assert 0.03 < logits.std() < 3, name


def test_the_classifier_refuses() -> None:
    with pytest.raises(ValueError, match="classes=1 must be at least 2"):
        ImageClassifier(classes=1)
    with pytest.raises(ValueError, match="uncovered_lr=0 must be above 0"):
        ImageClassifier(uncovered_lr=0)


def test_the_classifiers_loss_is_the_cross_entropy_of_its_logits() -> None:
    torch.manual_seed(0)
    model, images, labels = ImageClassifier("cuda_convnet", classes=7), torch.randn(6, 3, 32, 32), torch.arange(6)
    logits = model(images)
    assert logits.shape == (6, 7)
    loss = model.training_step((images, labels), 0)
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[torch.arange(6), labels].mean().item(), rel=1e-6)


@pytest.mark.parametrize("options", [{"lr": 0.05}, {"lr": 1.0, "uncovered_lr": 0.01}])
@pytest.mark.parametrize("net", ["resnet20", "cuda_convnet"])
def test_one_step_with_kfac_moves_every_parameter(net: str, options: dict[str, float]) -> None:
    pl.seed_everything(0, verbose=False)
    coarse = "layer_step_momentum" if "uncovered_lr" in options else None
    model = ImageClassifier(net, **options)  # type: ignore[arg-type]
    before = [p.detach().clone() for p in model.parameters()]
    data = InMemoryDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    kfac = KFAC(likelihood="categorical", kl_clip=0.1, coarse=coarse)
    trainer = quiet_trainer(max_steps=1, callbacks=[kfac], num_sanity_val_steps=0)
    trainer.fit(model, DataLoader(data, batch_size=8, collate_fn=already_collated))
    assert all((p != b).any() and p.isfinite().all() for p, b in zip(model.parameters(), before, strict=True))


def test_a_rate_of_its_own_for_what_kfac_does_not_cover() -> None:
    model = ImageClassifier("resnet20", lr=1.0, momentum=0.8, uncovered_lr=0.01)
    kfac = KFACPreconditioner(model, likelihood="categorical")
    covered = {id(p) for layer in kfac.layers for p in layer.parameters}
    kfac.close()
    groups = model.configure_optimizers().param_groups
    rates = {id(p): (g["lr"], g["momentum"]) for g in groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert all(rate == ((1.0, 0.0) if key in covered else (0.01, 0.8)) for key, rate in rates.items())
