from __future__ import annotations

import importlib.machinery
import itertools
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kfac_dist.study import CIFARImages
from kfac_dist.study.cifar import CIFAR10_FOLDER, PADDING, augmented, enlarged_digits, torchvision_images
from kfac_dist.study.digits import small_digits
from kfac_dist.study.in_memory import InMemoryDataset
from tests.study.test_data import as_set

RAW = {"train": 6, "test": 2}


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for torchvision, which the suite does not install: same calls, same attributes, same error."""
    fetched: set[str] = set()

    def pixels(part: str, shape: tuple[int, ...]) -> np.ndarray:
        count = RAW[part]
        return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)

    def files(name: str, root: str, part: str, download: bool) -> None:
        if download:
            fetched.add(name)
        if Path(root) != tmp_path or (name == "SVHN" and name not in fetched):
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")

    class CIFAR10:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            part = "train" if train else "test"
            files(type(self).__name__, root, part, download)
            self.data = pixels(part, (32, 32, 3))
            self.targets = list(range(RAW[part]))

    class CIFAR100(CIFAR10):
        pass

    class SVHN:
        def __init__(self, root: str, split: str, download: bool) -> None:
            files("SVHN", root, split, download)
            self.data = pixels(split, (3, 32, 32))
            self.labels = np.arange(RAW[split])

    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    package.datasets = datasets  # type: ignore[attr-defined]
    for cls in (CIFAR10, CIFAR100, SVHN):
        setattr(datasets, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    return tmp_path


def test_digits_are_enlarged_repeated_and_normalised_by_the_training_split() -> None:
    (train, labels), (val, val_labels) = CIFARImages(dataset="digits").load()
    assert train.shape == (1500, 3, 32, 32)
    assert val.shape == (297, 3, 32, 32)
    assert train.mean((0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(train.std((0, 2, 3)), torch.ones(3), atol=1e-5)
    assert not as_set(train) & as_set(val)
    (small, small_labels), (_, small_val_labels) = small_digits()
    assert torch.equal(labels, small_labels)
    raw, raw_val = (split[0] for split in enlarged_digits())
    assert torch.equal(raw, F.interpolate(small, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1))
    mean, deviation = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
    assert torch.allclose(val, (raw_val - mean) / deviation, atol=1e-5)
    assert torch.equal(val_labels, small_val_labels)


def test_the_split_of_the_digits_depends_on_the_seed_alone() -> None:
    first, again, other = (CIFARImages(dataset="digits", seed=seed).load()[1][0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("svhn", 10)])
def test_torchvisions_sets_keep_their_split_and_come_channels_first(torchvision: Path, name: str, classes: int) -> None:
    data = CIFARImages(dataset=name, root=str(torchvision), download=True)  # type: ignore[arg-type]
    data.prepare_data()
    (train, labels), (val, val_labels) = data.load()
    assert data.classes == classes
    assert (labels.tolist(), val_labels.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1])
    assert train.shape == (6, 3, 32, 32)
    shape = (6, 3, 32, 32) if name == "svhn" else (6, 32, 32, 3)
    pixels = torch.from_numpy(np.random.default_rng(6).integers(0, 256, shape, dtype=np.uint8)).float()
    raw = pixels if name == "svhn" else pixels.permute(0, 3, 1, 2)
    mean, deviation = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
    assert torch.allclose(train, (raw - mean) / deviation, atol=1e-5)
    assert val.shape == (2, 3, 32, 32)


def test_only_prepare_data_fetches_and_only_if_asked(torchvision: Path) -> None:
    for download in (False, True):
        data = CIFARImages(dataset="svhn", root=str(torchvision), download=download)
        with pytest.raises(ValueError, match=r"no svhn files under root=.*not found.*download=True.*dataset='digits'"):
            data.setup("fit")
    data.prepare_data()
    data.setup("fit")
    assert len(next(iter(data.val_dataloader()))[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "mnist"}, "dataset='mnist' is unknown; choose one of auto, cifar10, cifar100, svhn, digits"),
        ({"dataset": "digits", "download": True}, "download=True with dataset='digits'"),
        ({"download": True}, "say dataset='cifar10', 'cifar100' or 'svhn'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFARImages(**arguments)  # type: ignore[arg-type]


def test_without_a_root_or_torchvision_the_message_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs root, .*dataset='digits'"):
        CIFARImages(dataset="cifar10").setup("fit")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"pip install 'kfac-dist\[vision\]'; or set dataset='digits'"):
        torchvision_images("cifar10", "/data")


def test_auto_takes_what_is_there_and_says_so(torchvision: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert CIFARImages().dataset == "digits"
        assert "digits, enlarged to 32 x 32: no root is given" in caplog.messages[-1]
        assert CIFARImages(root=str(torchvision)).dataset == "digits"
        assert f"holds no {CIFAR10_FOLDER}" in caplog.messages[-1]
        (torchvision / CIFAR10_FOLDER).mkdir()
        data = CIFARImages(root=str(torchvision))
        assert "takes CIFAR-10 from" in caplog.messages[-1]
    assert data.dataset == "cifar10"
    assert len(data.load()[0][0]) == 6


def place(crop: torch.Tensor, image: torch.Tensor) -> tuple[int, int, bool]:
    """Where ``crop`` was cut from the padded ``image``, and whether it was mirrored then; exactly one answer fits."""
    padded, (height, width) = F.pad(image, (PADDING,) * 4), image.shape[1:]
    (found,) = [
        (down, right, mirrored)
        for down, right in itertools.product(range(2 * PADDING + 1), repeat=2)
        for mirrored in (False, True)
        if torch.equal(crop.flip(-1) if mirrored else crop, padded[:, down : down + height, right : right + width])
    ]
    return found


def test_an_augmented_image_is_a_crop_of_the_padded_one_or_its_mirror() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 2, 6, 7)
    crops = augmented(images, flip=True)
    assert crops.shape == images.shape
    seen = {place(crop, image) for crop, image in zip(crops, images, strict=True)}
    assert len(seen) > 40
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


@pytest.mark.parametrize(
    ("name", "mirrored"), [("digits", False), ("svhn", False), ("cifar10", True), ("cifar100", True)]
)
def test_no_number_is_mirrored(name: str, mirrored: bool) -> None:
    data = CIFARImages(dataset=name, root="/data", augment=True, batch_size=40)  # type: ignore[arg-type]
    torch.manual_seed(0)
    image = torch.randn(3, 32, 32)
    data.train_set = InMemoryDataset(image.expand(40, -1, -1, -1), torch.arange(40))
    crops, _ = next(iter(data.train_dataloader()))
    assert {place(crop, image)[2] for crop in crops} == {False, mirrored}


def test_augmentation_is_seeded_and_leaves_the_held_out_images_alone() -> None:
    data = CIFARImages(dataset="digits", augment=True, batch_size=500)
    data.setup("fit")
    assert data.train_set is not None

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([images for images, _ in data.train_dataloader()])

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))
    originals = as_set(data.train_set.tensors[0])
    assert 0 < len(as_set(epoch(3)) & originals) < 100  # a crop in the middle, with probability 1/81, changes nothing
    (held_out,) = [images for images, _ in data.val_dataloader()]
    assert torch.equal(held_out, data.load()[1][0])


def test_a_resumed_epoch_gets_the_same_augmented_images() -> None:
    data = CIFARImages(dataset="digits", augment=True, batch_size=500)
    data.setup("fit")
    torch.manual_seed(3)
    whole = [images for images, _ in data.train_dataloader()]
    torch.manual_seed(3)
    interrupted = data.train_dataloader()
    next(iter(interrupted))
    state = interrupted.state_dict()  # type: ignore[attr-defined]
    torch.manual_seed(99)
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)  # type: ignore[attr-defined]
    assert all(torch.equal(a, b[0]) for a, b in zip(whole[1:], resumed, strict=True))
