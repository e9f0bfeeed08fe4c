"""Second moments of patches without patches: those of ``F.unfold`` to rounding, for every padding, kernel and size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.layers import find_layers
from kfac_dist.layers.autocorrelation import Patches
from kfac_dist.layers.base import Layer
from kfac_dist.study.convnets import convnet

KERNELS = [(1, 1), (3, 3), (5, 5), (2, 3), (4, 1), (1, 4), (5, 2)]
PADDINGS = [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((2, 2), (2, 2)), ((0, 1), (2, 0)), ((5, 4), (3, 6))]
SIZES = [(7, 6), (4, 4), (5, 9)]


def maps(size: tuple[int, int], channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(size[0])
    return torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-13 * wanted.abs().max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", SIZES)
def test_moment_and_sum_are_those_of_the_patches(
    kernel: tuple[int, int], padding: tuple[tuple[int, int], tuple[int, int]], size: tuple[int, int]
) -> None:
    x = maps(size)
    padded = F.pad(x, (*padding[1], *padding[0]))
    if any(n < k for n, k in zip(padded.shape[2:], kernel, strict=True)):
        with pytest.raises(RuntimeError):
            F.unfold(padded, kernel)  # no patch fits: such a convolution has no output
        return
    columns = F.unfold(padded, kernel).transpose(0, 1).flatten(1)
    patches = Patches(x, kernel, padding)
    assert patches.count == columns.shape[1]
    assert close(patches.sum(), columns.sum(1))
    assert close(patches.moment(), columns @ columns.T)


CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}, (2, 4, 20, 21)),
    "padding 1": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (2, 4, 12, 10)),
    "padding 2": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "bias": False}, (2, 4, 9, 10)),
    "same": (nn.Conv2d, {"kernel_size": (4, 5), "padding": "same"}, (2, 4, 14, 12)),
    "circular": (nn.Conv2d, {"kernel_size": 5, "padding": 2, "padding_mode": "circular"}, (2, 3, 18, 20)),
    "unbatched": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (4, 12, 10)),
    "channels last": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (2, 4, 12, 10)),
    "1-d": (nn.Conv1d, {"kernel_size": 9, "padding": (4,)}, (2, 4, 40)),
    "1-d, same, no bias": (nn.Conv1d, {"kernel_size": 10, "padding": "same", "bias": False}, (2, 4, 60)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_takes_them_where_they_pay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, shape = CONVOLUTIONS[name]
    (layer,), _ = find_layers(kind(shape[-len(kind(1, 1, 1).kernel_size) - 1], 2, **options).double())  # type: ignore[arg-type, operator]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if name == "channels last":
        x = x.to(memory_format=torch.channels_last)
    wanted = Layer.input_moment(layer, x, torch.float64)
    monkeypatch.setattr(type(layer), "input_rows", None)  # no patch is cut out
    assert close(layer.input_moment(x, torch.float64), wanted)


WINDOWS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "stride": ({"stride": 2}, (2, 4, 12, 12)),
    "dilation": ({"dilation": 2}, (2, 4, 12, 12)),
    "groups": ({"groups": 2}, (2, 4, 12, 12)),
    "a small map": ({"padding": 1}, (2, 4, 2, 2)),
    "one pixel": ({"padding": 1}, (2, 4, 1, 1)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_elsewhere_patches_are_cut_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, shape = WINDOWS[name]
    (layer,), _ = find_layers(nn.Conv2d(4, 2, 3, **options))
    monkeypatch.setattr(Patches, "moment", None)
    x = torch.ones(shape)
    assert layer.input_moment(x, torch.float32)[0, -1, -1] == layer.rows(layer.module(x))  # the constant's square


def test_all_convolutions_of_stride_1_of_a_resnet_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    net, cut, calls = convnet("resnet20", 10), [], []
    layers = {layer.module: layer for layer in find_layers(net).layers}
    for module in layers:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, out: calls.append((layers[module], args[0].detach())))
    net(torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        for layer, x in calls:
            with monkeypatch.context() as patch:
                rows = type(layer).input_rows
                patch.setattr(type(layer), "input_rows", lambda self, x, rows=rows: cut.append(self) or rows(self, x))
                moment = layer.input_moment(x, torch.float32)
            wanted = Layer.input_moment(layer, x, torch.float32)
            assert (moment - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert {layer.name for layer in cut} == {layer.name for layer, _ in calls if layer.module.stride == (2, 2)}
    assert len(calls) == 19
