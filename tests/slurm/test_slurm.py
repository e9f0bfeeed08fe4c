"""Real batch jobs on two virtual nodes: the weights of one process, requeues, and the end of all when one dies.

The jobs are submitted together, as the cluster has room for all of them, and looked at one by one.
"""

from __future__ import annotations

import re
import sys
import time
from contextlib import redirect_stdout
from datetime import datetime
from io import StringIO
from pathlib import Path

import pytest

from kfac_dist.launch import __main__ as command
from kfac_dist.launch.slurm import STARTERS
from tests.launch.problem import KILL, STEPS
from tests.launch.runs import (
    CONFIG,
    DYING,
    PLAIN_LOOP,
    assert_ended_in_time,
    assert_same_weights,
    fit,
    with_coarse_mpi,
)
from tests.slurm.jobs import ENDED, Job, slurm, submission, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

JOBS = Path(__file__).parents[2] / "launch" / "jobs"
PACE = ["--trainer.callbacks+=tests.launch.problem.Pace", "--trainer.callbacks.seconds=1.0"]
NODES = ["--nodes", "2", "--time", "10"]


STUDY = """
plan:
  title: shared by two tasks
  problems:
    tiny: {epochs: 1}
  methods: [sgd, adam]
  trials: 2
  tuning_epochs: 1
"""


class Cluster:
    """What was submitted: name -> (job, folder)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[str, Job] = {}

    def folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        return folder

    def weights(self, name: str) -> Path:
        return self.root / name / "weights.pt"

    def launch(self, name: str, *options: str, run: list[str] | None = None, **extra: str) -> None:
        """By ``kfac-dist launch slurm``, in this process, which has imported everything already."""
        folder = self.folder(name)
        words = ["launch", "slurm", *NODES, "--folder", str(folder), *options, "--", *(run or self.fit(name))]
        with submission(extra) as mark, redirect_stdout(StringIO()) as printed:
            assert command.main(words) == 0
        self.jobs[name] = submitted(printed.getvalue(), folder, mark)

    def fit(self, name: str, *options: str, **keywords: Path) -> list[str]:
        """The training, without the folder that the job script adds by itself."""
        words = fit(self.weights(name), *options, **keywords)
        return [word for word in words if not word.startswith("--trainer.default_root_dir")]

    def pace(self, starter: str) -> Path:
        return self.root / f"requeue {starter}" / "pace.txt"

    def finished(self, name: str) -> Job:
        job = self.jobs[name]
        assert (job.wait(), job.field("ExitCode")) == ("COMPLETED", "0:0"), job.output
        return job


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """All jobs, submitted."""
    cluster = Cluster(tmp_path_factory.mktemp("jobs of slurm"))
    # First those that pause in every step, to be interrupted.
    for starter in STARTERS:
        name = f"requeue {starter}"
        pace = [*PACE, f"--trainer.callbacks.path={cluster.pace(starter)}"]
        folder = cluster.folder(name)
        config = with_coarse_mpi(folder) if starter == "mpirun" else CONFIG
        cluster.launch(name, "--starter", starter, run=cluster.fit(name, *pace, config=config))
    # A copy of a job script, as a user would submit it.
    folder = cluster.folder("script")
    options = ["--nodes=2", f"--output={folder}/slurm-%j.out"]
    with submission({"PYTHON": sys.executable, "OUTPUT": str(folder)}) as mark:
        printed = slurm("sbatch", *options, str(JOBS / "srun.sbatch"), *cluster.fit("script"))
        cluster.jobs["script"] = submitted(printed, folder, mark)
    cluster.launch("agents", "--starter", "torchrun", "--tasks-per-node", "2")
    loop = [str(PLAIN_LOOP), str(cluster.folder("pmix")), "mpi:float64", "gloo:float64"]
    cluster.launch("pmix", run=loop, SLURM_MPI_TYPE="pmix")
    loop = [str(PLAIN_LOOP), str(cluster.folder("no mpi")), "mpi:float64"]
    cluster.launch("no mpi", run=loop, SLURM_MPI_TYPE="none")
    for starter in STARTERS:
        name = f"dying {starter}"
        cluster.launch(name, "--starter", starter, run=cluster.fit(name, DYING), **{KILL: "1:2"})
    folder = cluster.folder("study")
    (folder / "tiny.yaml").write_text(STUDY)
    with submission({"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}) as mark:
        output = f"--output={folder}/slurm-%j.out"
        words = [str(folder / "tiny.yaml"), "tuning", "--folder", str(folder / "runs")]
        printed = slurm("sbatch", output, "--time=10", "--array=0-1", str(JOBS / "study.sbatch"), *words)
        cluster.jobs["study"] = submitted(printed, folder, mark)
    interrupt(cluster)
    return cluster


def interrupt(cluster: Cluster) -> None:
    """Send SIGUSR1 to each job that waits for it, after its second step."""
    waiting, end = set(STARTERS), time.monotonic() + 240
    while waiting:
        for starter in sorted(waiting):
            job, pace = cluster.jobs[f"requeue {starter}"], cluster.pace(starter)
            assert job.field("JobState") not in ENDED, job.output
            assert time.monotonic() < end, job.output
            if pace.exists() and "0 2\n" in pace.read_text():
                to = ["--batch"] if starter == "mpirun" else []
                slurm("scancel", *to, "--signal=USR1", str(job.number))
                waiting.remove(starter)
        time.sleep(0.1)


@pytest.mark.parametrize("starter", STARTERS)
def test_a_requeued_job_ends_with_the_weights_of_an_uninterrupted_one(cluster, references, starter):
    name = f"requeue {starter}"
    job, pace = cluster.jobs[name], cluster.pace(starter)
    assert "SIGUSR1 will save, requeue and resume this training." in job.output
    job.wait_for("Restored all states from the checkpoint")
    cluster.finished(name)
    assert job.field("Restarts") == "1"
    assert (cluster.root / name / str(job.number) / "hpc_ckpt_1.ckpt").exists()
    steps = [tuple(map(int, line.split())) for line in pace.read_text().splitlines()]
    assert [step for _, step in steps] == list(range(1, 2 * STEPS + 1)), steps  # each of them once
    saved = int(job.output.split("Saved step ")[1].split()[0])
    assert [restarts for restarts, _ in steps] == [0] * saved + [1] * (2 * STEPS - saved)
    assert_same_weights(cluster.weights(name), references["fit-float64"], 2)


def test_a_copied_job_script_ends_with_the_weights_of_one_process(cluster, references):
    job = cluster.finished("script")
    print(job.output)  # the output of one job, for the record: pytest -rP shows it
    assert_same_weights(cluster.weights("script"), references["fit-float64"], 2)
    assert (cluster.root / "script" / str(job.number) / "config.yaml").exists()


def test_torchruns_agents_on_two_nodes_end_with_the_weights_of_one_process(cluster, references):
    cluster.finished("agents")
    assert_same_weights(cluster.weights("agents"), references["fit-float64"], 4)


@pytest.mark.parametrize("transport", ["mpi", "gloo"])
def test_srun_connects_a_loop_of_ones_own(cluster, references, transport):
    cluster.finished("pmix")
    assert_same_weights(cluster.root / "pmix" / f"{transport}-float64.pt", references["loop-float64"], 2)


def test_srun_without_mpi_is_refused(cluster):
    """Each process would be an MPI world of its own."""
    job = cluster.jobs["no mpi"]
    assert job.wait() == "FAILED"
    assert "slurm started 2 processes, but this one is connected to 0 others" in job.output
    assert "srun --mpi=pmix" in job.output


@pytest.mark.parametrize("starter", STARTERS)
def test_a_job_ends_when_a_rank_dies(cluster, starter):
    job = cluster.jobs[f"dying {starter}"]
    assert job.wait() == "FAILED", job.output
    assert_ended_in_time(job.output, datetime.fromisoformat(job.field("EndTime")).timestamp())
    assert job.field("ExitCode") != "0:0"
    assert not cluster.weights(f"dying {starter}").exists()


def test_the_tasks_of_an_array_share_a_studys_stage(cluster):
    number, end = str(cluster.jobs["study"].number), time.monotonic() + 180
    while not set(states := re.findall(r"\bJobState=(\S+)", slurm("scontrol", "show", "job", number))) <= ENDED:
        assert time.monotonic() < end, states
        time.sleep(0.3)
    assert states == ["COMPLETED", "COMPLETED"]
    files = sorted((cluster.root / "study" / "runs" / "tiny").rglob("*.jsonl"))
    expected = [f"{name}/trial-{i}-seed-100" for name in ("adam", "sgd") for i in (0, 1)]
    assert [f"{file.parent.name}/{file.stem}" for file in files] == expected
    assert all('"end": "done"' in file.read_text() for file in files)
    outputs = [file.read_text() for file in (cluster.root / "study").glob("slurm-*.out")]
    assert sorted(text.count(": done") for text in outputs) == [2, 2]
