from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from kfac_dist.study import Autoencoder, EpochRecord
from kfac_dist.study.in_memory import InMemoryDataset, already_collated
from kfac_dist.study.record import read_record
from tests.study.test_problems import SMALL, quiet_trainer


class SlowValidation(Autoencoder):
    def on_validation_epoch_start(self) -> None:
        time.sleep(1.0)


class SlowTraining(Autoencoder):
    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        time.sleep(0.1)


def record(model: pl.LightningModule, path: Path, **options: object) -> list[dict[str, float]]:
    loader = torch.utils.data.DataLoader(InMemoryDataset(torch.rand(8, 12)), batch_size=4, collate_fn=already_collated)
    trainer = quiet_trainer(max_epochs=2, callbacks=[EpochRecord(str(path))], **options)
    trainer.fit(model, loader, loader)
    return read_record(path)[0]


def test_one_line_per_epoch_with_the_logged_metrics(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    epochs = record(Autoencoder(SMALL), path)
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 2), (2, 4)]
    assert all(0.5 < line["pixel_loss"] < 1 for line in epochs)
    assert all(0.5 < line["val_pixel_loss"] < 1 for line in epochs)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"step": 1, "steps": 4}


def test_the_clock_stands_still_during_validation(tmp_path: Path) -> None:
    epochs = record(SlowValidation(SMALL), tmp_path / "run.jsonl")
    assert 0 < epochs[0]["seconds"] < epochs[1]["seconds"] < 1.0


def test_the_clock_runs_while_training(tmp_path: Path) -> None:
    epochs = record(SlowTraining(SMALL), tmp_path / "run.jsonl")
    assert epochs[0]["seconds"] > 0.2
    assert epochs[1]["seconds"] > 0.4


def test_a_second_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(Autoencoder(SMALL), path)
    assert len(record(Autoencoder(SMALL), path)) == 2


def test_reading_while_a_line_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    assert read_record(path) == ([], {})
    path.write_text('{"epoch": 1}\n{"step": 3, "steps": 9}\n{"st')
    assert read_record(path) == ([{"epoch": 1}], {"step": 3, "steps": 9})


def test_heartbeat_must_be_positive() -> None:
    with pytest.raises(ValueError, match="heartbeat=0"):
        EpochRecord("x", heartbeat=0)
