from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kfac_dist.assignment import LayerCost
from kfac_dist.layers import find_layers
from kfac_dist.networks import Network, networks
from kfac_dist.one_level import layer_cost
from kfac_dist.study.char_gpt import GPT
from kfac_dist.study.convnets import convnet


def anonymous(costs: list[LayerCost]) -> list[LayerCost]:
    """Without names, and with every factor spelled out."""
    return [replace(cost, name="", factors=dict(cost.blocks())) for cost in costs]


def found(model: nn.Module) -> list[LayerCost]:
    return [layer_cost(layer) for layer in find_layers(model).layers]


@pytest.mark.parametrize(
    ("name", "parameters", "gigaflops"),
    [
        ("resnet50", 25_557_032, 8.18),  # 4.09 G multiply-adds
        ("vit_b_16", 86_567_656, 35.2),
        ("gpt2_small", 124_439_808, 292),
        ("bert_large", 335_141_888, 335),
    ],
)
def test_parameters_and_flops_are_those_that_are_known(name: str, parameters: int, gigaflops: float) -> None:
    network = networks[name]()
    assert network.parameters == parameters
    assert network.flops / 1e9 == pytest.approx(gigaflops, rel=0.01)
    assert len({cost.name for cost in network.costs}) == len(network.layers)


def test_resnet50_is_the_one_that_find_layers_sees() -> None:
    with torch.device("meta"):
        model = convnet("resnet50", 10)
    listed = networks["resnet50"](image=32, classes=10, stem=3)
    assert listed.parameters == sum(p.numel() for p in model.parameters())
    key = str  # a block's shortcut comes last in the module and where it is needed in the list
    assert sorted(map(key, anonymous(listed.costs))) == sorted(map(key, anonymous(found(model))))


def test_gpt2_is_the_one_that_find_layers_sees() -> None:
    with torch.device("meta"):
        model = GPT(50257, 1024, 768, 12, 12, tie_weights=True)
    assert anonymous(networks["gpt2_small"]().costs) == anonymous(found(model))


@pytest.mark.parametrize("stem", [3, 7])
def test_rows_of_resnet50_are_the_pixels_that_torch_makes(stem: int) -> None:
    listed: Network = networks["resnet50"](image=64, classes=10, stem=stem)
    with torch.device("meta"):
        model = convnet("resnet50", 10)
        if stem == 7:
            model[0] = nn.Sequential(nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.MaxPool2d(3, 2, padding=1))
        pixels: list[int] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, __, out: pixels.append(out.shape[-1] * out.shape[-2]))
        model(torch.empty(1, 3, 64, 64))
    assert sorted(layer.rows for layer in listed.layers[:-1] if not layer.joint) == sorted(pixels)
