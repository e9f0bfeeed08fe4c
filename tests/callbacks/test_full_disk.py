"""A disk that is full while a checkpoint is written: an error on every rank, and whole checkpoints only."""

from __future__ import annotations

import errno
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from pytorch_lightning.callbacks import ModelCheckpoint

from tests.callbacks.jobs import ddp
from tests.callbacks.tiny import Classifier, assert_equal, fit, hooks, kfac, loader, weights
from tests.helpers.training import Run, advance, build


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """There is room for the first checkpoint; the second one is cut off."""
    write = LocalFileOpener.write
    room = mock.Mock(side_effect=[None])

    def limited(self: LocalFileOpener, data: bytes) -> int:
        try:
            room()
        except StopIteration:
            write(self, data[:100])
            full()
        return write(self, data)

    model, callback = Classifier(momentum=0.9), kfac()
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    options = ddp(world_size, timeout=timedelta(seconds=20))
    train = loader(rank=rank, ranks=world_size)
    with mock.patch.object(LocalFileOpener, "write", limited), pytest.raises((OSError, RuntimeError)) as caught:
        fit(model, [callback, saver], train, enable_checkpointing=True, **options)
    state = callback.state_dict()
    factors = [side for layer in state["layers"].values() for side in (layer["factors"]["A"], layer["factors"]["G"])]
    finite = all(bool(side.isfinite().all()) for side in factors)
    return {"error": caught.value.args, "hooks": hooks(model), "step": state["step"], "finite": finite}


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_ends_and_the_last_whole_checkpoint_is_the_last(ranks, tmp_path, world_size):
    folder = tmp_path / "checkpoints"
    first, *others = ranks.run(world_size, interrupted, str(folder), init=False)
    assert first["error"] == (errno.ENOSPC, "No space left on device")
    assert all("Connection closed by peer" in other["error"][0] for other in others)
    for answer in (first, *others):
        assert (answer["hooks"], answer["step"], answer["finite"]) == (0, 2, True)
    assert [path.name for path in folder.iterdir()] == ["step=1.ckpt"]
    resumed, callback = Classifier(momentum=0.9), kfac()
    fit(resumed, [callback], ckpt_path=str(folder / "step=1.ckpt"))
    assert callback.state_dict()["step"] == 3


def test_a_loop_of_ones_own_goes_on_as_if_it_had_not_tried(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    results = []
    for saves in (False, True):
        run = Run("mlp-categorical", options={"coarse": "layer_step", "kl_clip": 1e-3})
        case, model, kfac_, optimizer = build(run)
        for step in range(4):
            advance(run, case, model, kfac_, optimizer, step)
            if saves:
                with pytest.raises((OSError, RuntimeError)):  # torch's writer has its own errors
                    torch.save(kfac_.state_dict(), tmp_path / "full")
        results.append([weights(model), kfac_.state_dict()["layers"], kfac_.state_dict()["counts"]])
        kfac_.close()
    assert_equal(*results)
