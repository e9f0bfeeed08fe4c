"""A checkpoint that could not be written leaves the last one whole; a torn one is named."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io import TorchCheckpointIO

from kfac_dist.callbacks import KFAC
from kfac_dist.launch.train import additions
from kfac_dist.launch.whole import WholeCheckpointIO
from tests.launch.problem import Batches, Classifier

LIMIT = 5000


def save_with_a_limit(made: pl.Trainer, path: Path, how: str) -> None:
    """In a process of its own: the kernel lets files grow to the limit, in the middle of a write, and sends a signal.

    By default the signal kills; where it is ignored, the write fails like one on a disk that is full.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if how == "killed" else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    try:
        made.save_checkpoint(path)
    except OSError as error:
        path.with_name("message").write_text(str(error))


def trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[WholeCheckpointIO()],
        callbacks=[KFAC(likelihood="categorical", factor_every_n_steps=3, inverse_every_n_steps=3, sample_ids_key=2)],
    )


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """The weights after two epochs without an interruption."""
    model = Classifier()
    trainer(2).fit(model, datamodule=Batches())
    return model.state_dict()


def saved(path: Path) -> bytes:
    """A checkpoint after one epoch."""
    made = trainer(1)
    made.fit(Classifier(), datamodule=Batches())
    made.save_checkpoint(path)
    return path.read_bytes()


@pytest.mark.parametrize("how", ["killed", "disk full"])
def test_the_last_checkpoint_survives_a_save_that_does_not_end(tmp_path, whole, how):
    path = tmp_path / "last.ckpt"
    before = saved(path)
    assert len(before) > LIMIT
    made = trainer(2)
    made.fit(Classifier(), datamodule=Batches())
    process = multiprocessing.get_context("fork").Process(target=save_with_a_limit, args=(made, path, how))
    process.start()
    process.join(60)
    (left,) = [file for file in tmp_path.iterdir() if file != path]
    if how == "killed":
        assert process.exitcode == -signal.SIGXFSZ
        assert left.name.startswith(".unfinished-")
        assert left.stat().st_size == LIMIT  # in the middle of it
    else:
        assert process.exitcode == 0
        wanted = (
            f"the checkpoint {path} could not be saved: File too large; the last checkpoint of that name is untouched"
        )
        assert wanted in left.read_text()
    assert path.read_bytes() == before
    model = Classifier()
    trainer(2).fit(model, datamodule=Batches(), ckpt_path=path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in whole.items())


def test_where_there_was_none_there_is_none(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"new.ckpt could not be saved: No space left on device; there is none of that"):
        WholeCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "folder" / "new.ckpt")
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_torn_checkpoint_is_named(tmp_path, size):
    path = tmp_path / "torn.ckpt"
    path.write_bytes(saved(path)[:size])
    model = Classifier()
    with pytest.raises(ValueError, match=r"torn.ckpt is no whole checkpoint: it was cut off"):
        trainer(2).fit(model, datamodule=Batches(), ckpt_path=path)
    assert all(not module._forward_hooks for module in model.modules())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")
    path = tmp_path / "code.ckpt"
    torch.save({"callable": saved}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        WholeCheckpointIO().load_checkpoint(path, weights_only=True)


def test_the_same_file_as_lightning_writes_and_the_permissions_of_any_file(tmp_path):
    state = {"step": 3, "weight": torch.arange(4.0)}
    WholeCheckpointIO().save_checkpoint(state, tmp_path / "here.ckpt")
    WholeCheckpointIO().save_checkpoint(state, f"file://{tmp_path}/url.ckpt")
    (tmp_path / "any").touch()
    for name in ("here.ckpt", "url.ckpt"):
        read = TorchCheckpointIO().load_checkpoint(tmp_path / name)
        assert read["step"] == 3
        assert torch.equal(read["weight"], state["weight"])
        assert (tmp_path / name).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_folder_that_is_not_of_this_machine_is_left_to_lightning():
    WholeCheckpointIO().save_checkpoint({"step": 3}, "memory://folder/some.ckpt")
    assert WholeCheckpointIO().load_checkpoint("memory://folder/some.ckpt")["step"] == 3


def test_the_command_adds_it_unless_there_is_another():
    (added,) = additions({}, {})["plugins"]
    assert isinstance(added, WholeCheckpointIO)
    own = TorchCheckpointIO()
    assert additions({}, {"plugins": [own]})["plugins"] == [own]
