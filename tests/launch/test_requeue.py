"""SIGUSR1 saves, requeues and ends a training, and the next one goes on as if nothing had happened."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning_fabric.plugins.environments import MPIEnvironment
from pytorch_lightning.callbacks import ModelCheckpoint

from kfac_dist.callbacks import KFAC
from kfac_dist.launch.requeue import RequeueOnSignal, next_checkpoint
from kfac_dist.launch.train import additions
from tests.launch.problem import STEPS, Batches, Classifier

SLURM_JOB = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"},
}


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A SLURM job of one task, whose scontrol writes down what it is asked for."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/asked\ncat {tmp_path}/refusal >&2 2>/dev/null && exit 1\nexit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    before = signal.getsignal(signal.SIGUSR1)
    for name, value in SLURM_JOB.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    signal.signal(signal.SIGUSR1, before)


class SignalAt(pl.Callback):
    """Sends SIGUSR1 to this process in the middle of a step."""

    def __init__(self, *steps: int) -> None:
        self.steps = list(steps)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: object) -> None:
        if self.steps and trainer.global_step == self.steps[0]:
            self.steps.pop(0)
            os.kill(os.getpid(), signal.SIGUSR1)


def train(folder: Path, *callbacks: pl.Callback, **options: object) -> Classifier:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[
            KFAC(likelihood="categorical", factor_every_n_steps=1, inverse_every_n_steps=1, sample_ids_key=2),
            *callbacks,
        ],
        **{"devices": 1, "enable_checkpointing": False, **options},
    )
    model = Classifier()
    trainer.fit(model, datamodule=Batches())
    return model


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, 2 * STEPS - 2])
def test_the_resumed_run_is_the_one_that_would_have_gone_on(job, step):
    """Within an epoch, in its last step, in the first of the next one, and in the last but one."""
    whole = train(job / "whole").state_dict()
    with pytest.raises(SystemExit) as end:
        train(job / "run", SignalAt(step), RequeueOnSignal())
    assert end.value.code == 0
    assert (job / "asked").read_text() == "requeue 7\n"
    (saved,) = (job / "run").iterdir()
    assert saved.name == "hpc_ckpt_1.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == step + 1  # after the step, not in it
    resumed = train(job / "run", RequeueOnSignal()).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_it_can_happen_again(job):
    whole = train(job / "whole").state_dict()
    for step in (1, 5):
        with pytest.raises(SystemExit):
            train(job / "run", SignalAt(step), RequeueOnSignal())
    assert sorted(path.name for path in (job / "run").iterdir()) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"]
    resumed = train(job / "run", RequeueOnSignal()).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_an_accumulation_window_is_finished_first(job):
    with pytest.raises(SystemExit):
        train(job / "run", _SignalInWindow(), RequeueOnSignal(), accumulate_grad_batches=2)
    saved = torch.load(job / "run" / "hpc_ckpt_1.ckpt", weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert (saved["global_step"], progress["ready"]) == (1, 2)


class _SignalInWindow(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, index: int) -> None:
        if trainer.global_step == 0 and index == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


class _SignalWithinSave(pl.Callback):
    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_within_a_save_waits_for_its_end(job):
    whole = train(job / "whole").state_dict()
    every = ModelCheckpoint(job / "every", "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(SystemExit):
        train(job / "run", _SignalWithinSave(), every, RequeueOnSignal(), enable_checkpointing=True)
    saved = {path.name for path in (job / "every").iterdir()}
    assert {"step=1.ckpt", "step=2.ckpt"} <= saved <= {"step=1.ckpt", "step=2.ckpt", "step=3.ckpt"}
    for path in (*(job / "every").iterdir(), job / "run" / "hpc_ckpt_1.ckpt"):
        state = torch.load(path, weights_only=True)
        assert state["callbacks"]["KFAC"]["step"] == state["global_step"]
    resumed = train(job / "run", RequeueOnSignal()).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_job_that_slurm_does_not_requeue_goes_on(job):
    (job / "refusal").write_text("Job can not be altered now\n")
    whole = train(job / "whole").state_dict()
    with pytest.warns(UserWarning, match="scontrol requeue 7 failed: Job can not be altered") as warned:
        went_on = train(job / "run", SignalAt(1), RequeueOnSignal()).state_dict()
    assert any("could not be requeued, and goes on" in str(each.message) for each in warned)
    assert all(torch.equal(went_on[name], value) for name, value in whole.items())


def test_where_the_disk_is_full_nothing_is_requeued_and_the_last_checkpoint_stays(job, monkeypatch):
    with pytest.raises(SystemExit):
        train(job / "run", SignalAt(1), RequeueOnSignal())
    before = (job / "run" / "hpc_ckpt_1.ckpt").read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFileOpener, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(job / "run", SignalAt(5), RequeueOnSignal())
    assert (job / "asked").read_text() == "requeue 7\n"  # the first time
    assert [path.name for path in (job / "run").iterdir()] == ["hpc_ckpt_1.ckpt"]
    assert (job / "run" / "hpc_ckpt_1.ckpt").read_bytes() == before


def test_a_task_of_a_job_array_requeues_itself(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(SystemExit):
        train(job / "run", SignalAt(1), RequeueOnSignal())
    assert (job / "asked").read_text() == "requeue 5_3\n"


def test_the_signal_is_given_back(job):
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append("before"))
    train(job / "run", RequeueOnSignal())
    os.kill(os.getpid(), signal.SIGUSR1)
    assert seen == ["before"]
    assert not (job / "asked").exists()


def test_checkpoints_are_numbered_on(tmp_path):
    assert next_checkpoint(tmp_path).name == "hpc_ckpt_1.ckpt"
    for name in ("hpc_ckpt_9.ckpt", "hpc_ckpt_10.ckpt", "hpc_ckpt_x.ckpt", "hpc_ckpt_11.part", "other.ckpt"):
        (tmp_path / name).touch()
    assert next_checkpoint(tmp_path).name == "hpc_ckpt_11.ckpt"


def test_a_signal_that_does_not_exist():
    with pytest.raises(ValueError, match="signal_name='USR1' is no signal here"):
        RequeueOnSignal("USR1")


def test_what_a_slurm_job_adds_to_the_trainer():
    assert "callbacks" not in additions({}, {})
    mine = RequeueOnSignal()
    job = {"SLURM_JOB_ID": "1"}
    (added,) = additions(job, {})["callbacks"]
    assert isinstance(added, RequeueOnSignal)
    assert additions(job, {"callbacks": [mine]})["callbacks"] == [mine]
    assert additions(job, {"callbacks": mine})["callbacks"] == [mine]
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    plugin, _ = additions(job | mpi, {"callbacks": mine})["plugins"]
    assert isinstance(plugin, MPIEnvironment)
    assert additions(job | mpi, {"callbacks": mine, "plugins": "own"})["plugins"][:-1] == ["own"]
    assert len(additions(job | {"SLURM_NTASKS": "1"}, {})["plugins"]) == 1


def test_a_job_that_was_killed_while_it_saved_starts_again(job, monkeypatch):
    """Lightning takes every name with hpc_ckpt_ in it for a checkpoint."""

    def killed(*_: object) -> None:
        raise KeyError("killed")

    whole = train(job / "whole").state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyError, match="killed"):
            train(job / "run", SignalAt(1), RequeueOnSignal())
    (left,) = (job / "run").iterdir()
    left.write_bytes(left.read_bytes()[:100])
    again = train(job / "run", RequeueOnSignal()).state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def two_ranks(rank: int, world_size: int, folder: Path, step: int) -> dict[str, torch.Tensor] | int:
    """Rank 1 gets the signal in ``step``; the weights, or the exit status. The pool cleans the variables up."""
    os.environ.update(SLURM_JOB | {"PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}"})
    callbacks = [SignalAt(step) if rank == 1 else SignalAt(), RequeueOnSignal()]
    before = signal.getsignal(signal.SIGUSR1)
    try:
        return train(folder, *callbacks, strategy="ddp", devices=world_size).state_dict()
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_both_ranks_save_the_same_step(ranks, job, monkeypatch):
    """The signal reaches one rank only, in the middle of a step."""
    for name in SLURM_JOB:  # the pool may be started here, and outlives this test
        monkeypatch.delenv(name)
    whole = ranks.run(2, two_ranks, job / "whole", -1, init=False)
    assert ranks.run(2, two_ranks, job / "run", 1, init=False) == [0, 0]
    assert torch.load(job / "run" / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2
    for there in ranks.run(2, two_ranks, job / "run", -1, init=False):
        assert all(torch.equal(there[name], value) for name, value in whole[0].items())
    assert sorted(path.name for path in (job / "run").iterdir()) == ["hpc_ckpt_1.ckpt"]
