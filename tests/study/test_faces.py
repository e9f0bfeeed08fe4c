from __future__ import annotations

import sys

import numpy as np
import pytest
import sklearn.datasets
import torch
from skimage.data import lfw_subset

from kfac_dist.study import Faces
from kfac_dist.study import faces as module
from kfac_dist.study.faces import faces, lfw_faces, olivetti_faces
from tests.study.test_data import as_set


@pytest.fixture
def olivetti(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Stands in for scikit-learn's file: the mean of a picture tells the person and the picture."""
    images = np.random.default_rng(0).random((400, 64, 64), dtype=np.float32)
    images *= np.linspace(0.1, 1, 400, dtype=np.float32)[:, None, None]

    def fetch(download_if_missing: bool):
        assert not download_if_missing
        return sklearn.utils.Bunch(images=images)

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", fetch)
    return images


@pytest.fixture
def no_olivetti(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))


def test_lfw_faces_are_the_first_half_and_not_the_backgrounds() -> None:
    images = lfw_faces()
    assert images.shape == (100, 25, 25)
    assert images.dtype == torch.float32
    assert (images.min() >= 0, images.max() <= 1) == (True, True)
    assert len(as_set(images)) == 100
    assert np.array_equal(images.numpy(), lfw_subset()[:100].astype(np.float32))
    # Faces in their frames are alike, what else there is in photographs is not.
    assert images.std(0).mean() < 0.75 * torch.from_numpy(lfw_subset()[100:]).float().std(0).mean()


def test_without_olivettis_file_the_faces_are_lfws(no_olivetti) -> None:
    assert olivetti_faces() is None
    train, val = faces()
    assert (train.shape, val.shape) == ((160, 625), (20, 625))
    # Each face once on the training side with its mirror image, or held out.
    held, trained = as_set(val), as_set(train[::2])
    assert as_set(lfw_faces().flatten(1)) == held | trained
    assert not held & as_set(train)
    assert torch.equal(train[1::2].view(-1, 25, 25), train[::2].view(-1, 25, 25).flip(-1))
    assert not torch.equal(faces(seed=1)[1], val)
    assert torch.equal(faces(seed=0)[1], val)
    with pytest.raises(FileNotFoundError, match="fetch_olivetti_faces"):
        faces("olivetti")


def test_olivettis_people_are_not_in_both_splits(olivetti: np.ndarray) -> None:
    images = olivetti_faces()
    assert images is not None
    assert images.shape == (400, 25, 25)
    torch.testing.assert_close(images.mean((1, 2)), torch.from_numpy(olivetti).mean((1, 2)), rtol=0.02, atol=0)
    person = {image.numpy().tobytes(): i // 10 for i, image in enumerate(images.flatten(1))}
    train, val = faces()
    assert (train.shape, val.shape) == ((600, 625), (100, 625))
    held = {person[image.numpy().tobytes()] for image in val}
    trained = {person[image.numpy().tobytes()] for image in train[::2]}
    assert (len(held), len(trained), held & trained) == (10, 30, set())
    assert len(faces("lfw")[0]) == 160


def test_the_data_module_serves_images_alone(no_olivetti) -> None:
    data = Faces()
    data.setup("fit")
    assert [len(batch[0]) for batch in data.train_dataloader()] == [40] * 4
    assert [tuple(batch[0].shape) for batch in data.val_dataloader()] == [(20, 625)]
    assert Faces(source="lfw").source == "lfw"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="source='web' is unknown"):
        faces("web")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"need scikit-image: pip install 'kfac-dist\[study\]'"):
        lfw_faces()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert olivetti_faces() is None
    assert module.LFW_FACES == 100
