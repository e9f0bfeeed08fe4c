"""The job scripts that users copy, and those of the tests' own cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kfac_dist.launch.slurm import BODY, STARTERS, Slurm

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "launch" / "jobs").iterdir())
TRAINING = [path for path in JOBS if path.stem in STARTERS]
CLUSTER = sorted((ROOT / "tests" / "slurm").glob("*.sh"))


def shellcheck(*files: Path) -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI"):
            pytest.fail("shellcheck is missing: apt-get install shellcheck")
        pytest.skip("shellcheck is missing: apt-get install shellcheck (make test does it for root)")
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, files)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_starter_has_its_job_script():
    assert [path.name for path in JOBS] == sorted(f"{name}.sbatch" for name in (*STARTERS, "study"))


def test_job_scripts_pass_shellcheck():
    shellcheck(*JOBS)


def test_the_clusters_scripts_pass_shellcheck():
    shellcheck(*CLUSTER)


@pytest.mark.parametrize("starter", STARTERS)
def test_generated_scripts_pass_shellcheck(starter, tmp_path):
    script = tmp_path / "job.sbatch"
    settings = {"nodes": 2, "gpus_per_node": 4, "starter": starter, "setup": "export NCCL_DEBUG=WARN"}
    script.write_text(Slurm(folder=tmp_path / "a run", **settings).show(["fit", "--config", "a 'quoted' name.yaml"]))
    shellcheck(script)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_job_scripts_requeue_and_keep_their_log(path):
    head = path.read_text().split(BODY)[0]
    to = "B:" if path.stem == "mpirun" else ""
    for directive in (
        "--requeue",
        f"--signal={to}SIGUSR1@90",
        "--open-mode=append",
        "--ntasks-per-node=1",
        "--nodes=2",
    ):
        assert f"\n#SBATCH {directive}\n" in head
    assert "--ntasks=" not in head  # Lightning asks for --ntasks-per-node


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({}, ["fit"], "SLURM_JOB_ID: is not set: submit this script with sbatch"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "a"}, [], "what to run is missing"),
    ],
)
def test_job_scripts_say_what_is_missing(path, variables, arguments, message, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/bash\necho node1\n")
    scontrol.chmod(0o755)
    variables = variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(path), *arguments], env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert message in re.sub(r"^\S+: line \d+: ", "", done.stderr)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ({}, "--stage tuning --processes 1 --task 0 --tasks 1 --budget 9"),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "16"},
            "--stage tuning --processes 1 --task 3 --tasks 16 --budget 9",
        ),
    ],
)
def test_the_studys_script_hands_a_task_its_share(array, words, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", **array}
    command = ["bash", str(ROOT / "launch" / "jobs" / "study.sbatch"), "mine.yaml", "tuning", "--budget", "9"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == f"-m kfac_dist.launch study mine.yaml {words}", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "file of the study is missing"), (["a.yaml"], "stage is missing")]
)
def test_the_studys_script_says_what_is_missing(arguments, message):
    variables = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}
    command = ["bash", str(ROOT / "launch" / "jobs" / "study.sbatch"), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert message in done.stderr
