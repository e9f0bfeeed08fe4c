"""Command lines and batch scripts, as text."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_dist.launch import __main__ as command
from kfac_dist.launch.base import launchers, on_processes
from kfac_dist.launch.mpirun import Mpirun, flavor_of
from kfac_dist.launch.slurm import Slurm
from kfac_dist.launch.torchrun import Torchrun

FIT = ["fit", "--config", "my runs/a'b.yaml"]
NASTY = ["fit", "--model.name=$(touch /tmp/owned); `id` \"x\" 'y' \\ *"]
PYTHON = sys.executable
MODULE = ["-m", "kfac_dist.launch"]


def numbers(devices: int, nodes: int) -> list[str]:
    return [f"--trainer.devices={devices}", f"--trainer.num_nodes={nodes}"]


def test_torchrun_on_one_host():
    assert Torchrun(processes=4).command(FIT) == [
        *(PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone"),
        *(*MODULE, *FIT, *numbers(4, 1)),
    ]


def test_torchrun_on_several_hosts():
    torchrun = Torchrun(processes=2, nodes=3, node_rank=1, rendezvous="node1:29400", run_id="a")
    assert torchrun.command(FIT) == [
        *(PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=3", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=node1:29400", "--rdzv-id=a", "--node-rank=1", *MODULE, *FIT, *numbers(2, 3)),
    ]


def test_mpirun_of_open_mpi():
    assert Mpirun(processes=2, mpirun="/mpi/mpirun").command(FIT) == [
        *("/mpi/mpirun", "-n", "2", "--bind-to", "none", "-x", "OMP_NUM_THREADS=1"),
        *(PYTHON, "-m", "mpi4py", *MODULE, *FIT, *numbers(2, 1)),
    ]
    mpirun = Mpirun(
        processes=4, processes_per_node=2, hosts=("a", "b"), threads=3, export=("HOME", "X=1"), options=("--quiet",)
    )
    assert mpirun.command(["train.py", "--lr", "1"]) == [
        *("mpirun", "-n", "4", "--host", "a:2,b:2", "--map-by", "ppr:2:node", "--bind-to", "none"),
        *("-x", "OMP_NUM_THREADS=3", "-x", "HOME", "-x", "X=1", "--quiet"),
        *(PYTHON, "-m", "mpi4py", "train.py", "--lr", "1"),
    ]


def test_mpirun_of_mpich():
    mpirun = Mpirun(processes=4, processes_per_node=2, hosts=("a", "b"), export=("HOME",), flavor="mpich")
    assert mpirun.command(FIT) == [
        *("mpirun", "-n", "4", "-hosts", "a,b", "-ppn", "2", "-genv", "OMP_NUM_THREADS", "1", "-genvlist", "HOME"),
        *(PYTHON, "-m", "mpi4py", *MODULE, *FIT, *numbers(2, 2)),
    ]


@pytest.mark.parametrize(
    ("version", "flavor"),
    [
        ("mpirun (Open MPI) 4.1.4", "openmpi"),
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("HYDRA build details:", "mpich"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "mpich"),
    ],
)
def test_the_flavor_is_read_from_the_version(tmp_path, version, flavor):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\necho {shlex.quote(version)}\n")
    mpirun.chmod(0o755)
    assert flavor_of(str(mpirun)) == flavor
    with pytest.raises(ValueError, match="does not tell its version"):
        flavor_of(str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["torchrun", "mpirun"])
def test_shown_command_lines_are_quoted_for_a_shell(name):
    launcher = Torchrun(processes=1) if name == "torchrun" else Mpirun(processes=1)
    assert shlex.split(launcher.show(NASTY)) == launcher.command(NASTY)


DIRECTIVES = [
    "--job-name=kfac-dist",
    "--nodes=2",
    "--ntasks-per-node=4",
    "--cpus-per-task=8",
    "--time=1-12:00:00",
    "--gpus-per-node=4",
    "--partition=gpu",
    "--account=proj1",
    '--output="out dir/slurm-%j.out"',
    "--open-mode=append",
    "--requeue",
    "--signal=SIGUSR1@120",
    "--mem=64G",
]


def test_every_setting_of_slurm_has_its_directive():
    slurm = Slurm(
        folder=Path("out dir"),
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=8,
        time="1-12:00:00",
        partition="gpu",
        account="proj1",
        notice=120,
        setup="module load cuda\nsource env.sh",
        options=("--mem=64G",),
    )
    script = slurm.show(FIT)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line.removeprefix("#SBATCH ") for line in lines[1 : len(DIRECTIVES) + 1]] == DIRECTIVES
    # sbatch stops reading options at the first command.
    assert not any(line.startswith("#SBATCH") for line in lines[len(DIRECTIVES) + 1 :])
    setup = script.index("module load cuda\nsource env.sh\n")
    assert setup < script.index("set -- fit") < script.index("set -euo pipefail") < script.index("exec srun")
    assert f"\nPYTHON={PYTHON}\nOUTPUT='out dir'\n" in script


@pytest.mark.parametrize(
    ("options", "wanted", "unwanted"),
    [
        (
            {},
            ["--nodes=1", "--ntasks-per-node=1", "--requeue", "--signal=SIGUSR1@90"],
            ["--gpus-per-node", "--no-requeue"],
        ),
        ({"tasks_per_node": 3}, ["--ntasks-per-node=3"], ["--gpus-per-node"]),
        ({"tasks_per_node": 8, "gpus_per_node": 4}, ["--ntasks-per-node=8", "--gpus-per-node=4"], []),
        ({"requeue": False}, ["--no-requeue"], ["--requeue", "--signal"]),
        ({"starter": "mpirun"}, ["--signal=B:SIGUSR1@90"], []),
        (
            {"starter": "torchrun", "gpus_per_node": 4, "cpus_per_task": 2},
            ["--ntasks-per-node=1", "--cpus-per-task=8", "--signal=SIGUSR1@90"],
            [],
        ),
    ],
)
def test_directives_follow_the_starter(options, wanted, unwanted):
    directives = Slurm(folder=Path("x"), **options).directives()
    assert set(wanted) <= set(directives)
    assert not [line for line in directives for name in unwanted if line.split("=")[0] == name]


def test_torchruns_agents_know_their_numbers():
    script = Slurm(folder=Path("x"), starter="torchrun", tasks_per_node=3, cpus_per_task=2).show(FIT)
    assert "\nPROCESSES_PER_NODE=3\nTHREADS=2\n" in script
    assert "MPIRUN" not in script


@pytest.mark.parametrize("starter", ["srun", "torchrun", "mpirun"])
@pytest.mark.parametrize("arguments", [NASTY, ["train.py", "a b", "--x"], ["fit", "--trainer.default_root_dir=mine"]])
def test_the_script_hands_every_word_on(tmp_path, starter, arguments):
    """It is run by bash, with programs in the place of srun and mpirun that print what they are given."""
    for name, text in {
        "srun": 'printf "%s\\n" "$@"',
        "mpirun": 'printf "%s\\n" "$@"',
        "scontrol": "echo node1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = Slurm(folder=Path("out dir"), nodes=2, tasks_per_node=3, starter=starter).show(arguments)
    script = script.replace(str(Path(PYTHON).with_name("mpirun")), "mpirun")
    tasks = "1" if starter == "torchrun" else "3"
    variables = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": tasks, "SLURM_NTASKS": "6"}
    variables |= {"SLURM_JOB_NODELIST": "node[1-2]", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=variables, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    first = words.index(arguments[0])
    assert words[first : first + len(arguments)] == arguments
    added = words[first + len(arguments) :]
    if arguments[0] == "train.py":
        assert added == []
    else:
        root = [] if "default_root_dir" in arguments[1] else ["--trainer.default_root_dir=out dir/7"]
        assert added == [*root, *numbers(3, 2)]


@pytest.mark.parametrize(("kind", "runner"), [(None, []), ("none", []), ("pmix", ["-m", "mpi4py"])])
def test_under_srun_with_mpi_the_processes_have_mpi4pys_runner(tmp_path, kind, runner):
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script = Slurm(folder=Path("x")).show(["train.py"])
    variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables |= {} if kind is None else {"SLURM_MPI_TYPE": kind}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[1:] == [PYTHON, *runner, "train.py"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Torchrun(processes=0), "processes=0 must be at least 1"),
        (lambda: Torchrun(processes=1, nodes=2), "nodes=2 need a place to meet: give --rendezvous"),
        (lambda: Torchrun(processes=1, nodes=2, rendezvous="node1"), "rendezvous='node1' must be host:port"),
        (
            lambda: Torchrun(processes=1, nodes=2, node_rank=2, rendezvous="a:1"),
            "node_rank=2 must be at least 0 and below",
        ),
        (lambda: Mpirun(processes=3, processes_per_node=2), "processes=3 must be a multiple of processes_per_node=2"),
        (lambda: Mpirun(processes=4, hosts=("a", "b")), "hosts=a,b are 2, and 4 processes fill 1 nodes"),
        (lambda: Mpirun(processes=1, threads=0), "threads=0 must be at least 1"),
        (lambda: Mpirun(processes=1, flavor="lam"), "flavor='lam' must be one of openmpi, mpich"),
        (lambda: Slurm(folder=Path("x"), nodes=0), "nodes=0 must be at least 1"),
        (lambda: Slurm(folder=Path("x"), gpus_per_node=0), "gpus_per_node=0 must be at least 1"),
        (lambda: Slurm(folder=Path("x"), time="2h"), "time='2h' must be minutes or"),
        (lambda: Slurm(folder=Path("x"), partition="a b"), "partition='a b' must be one word"),
        (lambda: Slurm(folder=Path("x"), account="a\n#SBATCH --uid=0"), "must be one word"),
        (lambda: Slurm(folder=Path("x"), name="bash"), "name='bash' makes Lightning ignore SLURM"),
        (lambda: Slurm(folder=Path("x"), options=("mem=1",)), "option 'mem=1' must be one option of sbatch"),
        (lambda: Slurm(folder=Path("x"), options=("--mem=1\nrm -r x",)), "must be one option of sbatch"),
        (lambda: Slurm(folder=Path("100%")), "folder='100%' must be without %"),
        (lambda: Slurm(folder=Path("x"), starter="ssh"), "starter='ssh' must be one of srun, torchrun, mpirun"),
        (
            lambda: Slurm(folder=Path("x"), nodes=2).show(["fit", "--trainer.num_nodes=1"]),
            "num_nodes=1 does not fit the 1",
        ),
        (lambda: Torchrun(processes=2).command(["fit", "--trainer.devices", "1"]), "leave it out, or give 2"),
    ],
)
def test_settings_out_of_their_bounds(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_numbers_that_fit_are_left_and_other_commands_get_none():
    assert on_processes(["fit", "--trainer.devices=2"], 2, 1) == ["fit", "--trainer.devices=2", *numbers(2, 1)]
    assert on_processes(["fit", "--trainer.devices", "auto"], 2, 1)[3:] == numbers(2, 1)
    assert on_processes(["train.py", "--trainer.devices=7"], 2, 1) == ["train.py", "--trainer.devices=7"]
    assert on_processes(["study", "run"], 2, 1) == ["study", "run"]


@pytest.mark.parametrize("name", list(launchers))
def test_dry_runs_show_and_start_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [] if name == "slurm" else ["-n", "2"]
    assert command.main(["launch", name, *options, "--dry-run", "--", *FIT]) == 0
    shown = capsys.readouterr().out
    assert shlex.join(FIT) in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["torchrun", "-n", "2"], "what to run is missing: end the options with --"),
        (["torchrun", "-n", "2", "--"], "what to run is missing"),
        (["torchrun", "-n", "0", "--", "fit"], "processes=0 must be at least 1"),
        (
            ["torchrun", "-n", "2", "--", "fit", "--trainer.devices=1"],
            "--trainer.devices=1 does not fit the 2 processes",
        ),
        (["torchrun", "-n", "2", "--", "launch", "slurm"], "'launch' cannot launch itself"),
        (["ssh", "--", "fit"], "invalid choice: 'ssh'"),
        (["mpirun", "-n", "1", "--mpirun=/no/mpirun", "--", "fit"], "mpirun='/no/mpirun' does not tell its version"),
    ],
)
def test_wrong_command_lines_end_with_2_and_say_why(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["launch", *argv])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, *options: str) -> int:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    if sbatch:
        program.write_text(f"#!/bin/bash\n{sbatch}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin" if sbatch else str(program.parent))
    return command.main(["launch", "slurm", "--folder", str(tmp_path / "a run"), *options, "--", *FIT])


def test_a_submission_leaves_the_script_and_says_how_to_follow(tmp_path, monkeypatch, capsys):
    assert submit(tmp_path, monkeypatch, f'echo "$@" >{tmp_path}/seen; echo "17;cluster"') == 0
    folder = tmp_path / "a run"
    script = (folder / "job.sbatch").read_text()
    assert script == Slurm(folder=folder).show(FIT)
    assert (tmp_path / "seen").read_text().strip() == f"--parsable {folder}/job.sbatch"
    out = capsys.readouterr().out
    assert out.startswith(f"job 17 was submitted: {folder}/job.sbatch\n")
    for line in (f"tail -F '{folder}/slurm-17.out'", "squeue --jobs=17", "scancel --signal=USR1 17", "scancel 17"):
        assert line in out


def test_the_signal_for_mpirun_goes_to_the_batch_shell(tmp_path, monkeypatch, capsys):
    assert submit(tmp_path, monkeypatch, "echo 17", "--starter", "mpirun") == 0
    assert "scancel --batch --signal=USR1 17" in capsys.readouterr().out


def test_a_job_without_requeue_is_not_offered_it(tmp_path, monkeypatch, capsys):
    assert submit(tmp_path, monkeypatch, "echo 17", "--no-requeue") == 0
    assert "USR1" not in capsys.readouterr().out


def test_what_sbatch_refuses_is_told(tmp_path, monkeypatch, capsys):
    assert submit(tmp_path, monkeypatch, "echo 'invalid partition specified' >&2; exit 1") == 1
    assert "sbatch refused" in (err := capsys.readouterr().err)
    assert "invalid partition specified" in err


def test_without_sbatch_the_script_can_still_be_carried_to_the_cluster(tmp_path, monkeypatch, capsys):
    assert submit(tmp_path, monkeypatch, "") == 1
    assert f"sbatch is not on the PATH: submit {tmp_path}/a run/job.sbatch" in capsys.readouterr().err
