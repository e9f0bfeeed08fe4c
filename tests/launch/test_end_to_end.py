"""Real trainings under torchrun and mpirun: the weights of one process, and the end of all when one of them dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.launch.mpirun import Mpirun, find_mpirun
from kfac_dist.launch.torchrun import Torchrun
from tests.helpers.launched import Finished, run
from tests.launch.problem import KILL
from tests.launch.runs import (
    DYING,
    MISTAKEN,
    PLAIN_LOOP,
    assert_died_of_it,
    assert_same_weights,
    fit,
    launch,
    succeeded,
    with_coarse_mpi,
)

# The launch command itself is run once for each launcher; the other tests save its start and run what it would become.
MPIRUN = Mpirun(processes=2, mpirun=find_mpirun())
DYING_RANK = {KILL: "1:2"}


def test_torchrun_with_two_processes(references, tmp_path):
    succeeded(run([*launch("torchrun", "-n", "2"), *fit(tmp_path / "weights.pt")]))
    assert_same_weights(tmp_path / "weights.pt", references["fit-float64"], 2)


def test_torchrun_with_three_processes(references, tmp_path):
    succeeded(run(Torchrun(processes=3).command(fit(tmp_path / "weights.pt"))))
    assert_same_weights(tmp_path / "weights.pt", references["fit-float64"], 3)


def test_torchrun_in_single_precision(references, tmp_path):
    arguments = fit(tmp_path / "weights.pt", "--model.dtype=float32")
    succeeded(run(Torchrun(processes=2).command(arguments)))
    assert_same_weights(tmp_path / "weights.pt", references["fit-float32"], 2)


def test_torchrun_with_a_loop_of_ones_own(references, tmp_path):
    succeeded(run(Torchrun(processes=2).command([str(PLAIN_LOOP), str(tmp_path), "gloo:float64"])))
    assert_same_weights(tmp_path / "gloo-float64.pt", references["loop-float64"], 2)
    for rank in range(2):  # before they were connected
        said = (tmp_path / f"refused-{rank}.txt").read_text()
        assert said.startswith("torchrun started 2 processes, but this one is connected to 0 others")
        assert "torch.distributed.init_process_group()" in said
        assert "devices=2, num_nodes=1" in said


@pytest.mark.mpi
def test_mpirun_with_lightning(references, tmp_path):
    """gloo for DDP and the fine level, MPI for the coarse one."""
    arguments = fit(tmp_path / "weights.pt", config=with_coarse_mpi(tmp_path))
    succeeded(run([*launch("mpirun", "-n", "2"), *arguments]))
    assert_same_weights(tmp_path / "weights.pt", references["fit-float64"], 2)


@pytest.fixture(scope="module")
def mpi_loops(tmp_path_factory) -> Path:
    """MPI alone, and gloo for the fine level with MPI for the coarse one: four trainings of one job."""
    folder = tmp_path_factory.mktemp("loops")
    runs = [f"{transport}:{dtype}" for transport in ("mpi", "gloo+mpi") for dtype in ("float64", "float32")]
    succeeded(run(MPIRUN.command([str(PLAIN_LOOP), str(folder), *runs])))
    return folder


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("transport", ["mpi", "gloo+mpi"])
def test_mpirun_with_a_loop_of_ones_own(references, mpi_loops, transport, dtype):
    assert_same_weights(mpi_loops / f"{transport}-{dtype}.pt", references[f"loop-{dtype}"], 2)


@pytest.mark.mpi
def test_two_silent_runs_are_refused(tmp_path):
    """mpirun -n 2 with devices=1 would make two runs that know nothing of one another."""
    words = MPIRUN.command(fit(tmp_path / "weights.pt"))
    done = run([word.replace("--trainer.devices=2", "--trainer.devices=1") for word in words])
    assert done.returncode != 0
    assert "openmpi started 2 processes" in done.output
    assert "devices=2, num_nodes=1" in done.output
    assert not (tmp_path / "weights.pt").exists()


def test_torchrun_ends_when_a_rank_dies(tmp_path):
    assert_died_of_it(run(Torchrun(processes=2).command(fit(tmp_path / "weights.pt", DYING)), DYING_RANK))


@pytest.mark.mpi
def test_mpirun_ends_when_a_rank_dies(tmp_path):
    assert_died_of_it(run(MPIRUN.command(fit(tmp_path / "weights.pt", DYING)), DYING_RANK))


@pytest.mark.mpi
def test_mpi_alone_ends_when_a_rank_dies(tmp_path):
    assert_died_of_it(run(MPIRUN.command([str(PLAIN_LOOP), str(tmp_path), "mpi:float64"]), DYING_RANK))


def assert_raised(done: Finished) -> None:
    assert_died_of_it(done)
    assert "KeyError: 'a batch without labels'" in done.output


def test_torchrun_ends_when_a_training_step_raises(tmp_path):
    assert_raised(run(Torchrun(processes=3).command(fit(tmp_path / "weights.pt", MISTAKEN)), DYING_RANK))


@pytest.mark.mpi
def test_mpirun_ends_when_a_training_step_raises(tmp_path):
    assert_raised(run(MPIRUN.command(fit(tmp_path / "weights.pt", MISTAKEN)), DYING_RANK))
