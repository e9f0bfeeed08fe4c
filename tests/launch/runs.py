"""Command lines of the runs that the launchers are tested by, and a look at what came out."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from kfac_dist.launch import __main__ as command
from tests.helpers.launched import Finished
from tests.launch import plain_loop

HERE = Path(__file__).parent
CONFIG, PLAIN_LOOP = HERE / "problem.yaml", HERE / "plain_loop.py"
DYING = "--trainer.callbacks+=tests.launch.problem.Dying"
MISTAKEN = "--model=tests.launch.problem.Mistaken"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Relative, in the 2-norm of each parameter."""
DYING_SECONDS = 60.0
"""From the death of a rank to the end of everything."""


def fit(weights: Path, *options: str, config: Path = CONFIG) -> list[str]:
    """``kfac-dist fit`` of the problem, whose weights go to a file."""
    return [
        *("fit", "--config", str(config), f"--trainer.default_root_dir={weights.parent}"),
        *("--trainer.callbacks+=tests.launch.problem.Weights", f"--trainer.callbacks.path={weights}"),
        *options,
    ]


def with_coarse_mpi(folder: Path) -> Path:
    """The problem with a channel of its own, over MPI, for the coarse level."""
    content = yaml.safe_load(CONFIG.read_text())
    (kfac,) = content["trainer"]["callbacks"]
    kfac["init_args"]["distribution"] = {"coarse_backend": "mpi"}
    path = folder / "coarse_mpi.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def launch(launcher: str, *options: str) -> list[str]:
    """``kfac-dist launch <launcher> <options> --``; what to run comes after it."""
    return [sys.executable, "-m", "kfac_dist.launch", "launch", launcher, *options, "--"]


def succeeded(done: Finished) -> Finished:
    """``done``, unless it failed."""
    assert done.returncode == 0, done.output
    return done


def assert_same_weights(found: Path, wanted: Path, ranks: int, tolerance: float | None = None) -> None:
    """The weights of ``ranks`` ranks equal those of the reference, within their dtype's tolerance."""
    here, there = torch.load(found), torch.load(wanted)
    assert (here["ranks"], here["step"]) == (ranks, there["step"])
    assert here["weights"].keys() == there["weights"].keys()
    for name, value in there["weights"].items():
        error = torch.linalg.norm(here["weights"][name] - value) / torch.linalg.norm(value)
        assert error <= (TOLERANCE[value.dtype] if tolerance is None else tolerance), f"{name}: {error}"


def assert_ended_in_time(output: str, ended: float) -> None:
    """A rank has killed itself, and all was over within a minute.

    Args:
        output: of the run.
        ended: when it was over, in seconds since 1970.
    """
    died = re.search(r"rank 1 dies in step 2 at ([\d.]+)", output)
    assert died, output
    seconds = ended - float(died[1])
    print(f"the run ended {seconds:.1f} s after its rank")
    assert seconds < DYING_SECONDS, output


def assert_died_of_it(done: Finished) -> None:
    """The launcher says by its exit status that a rank died, in time; run() has found nothing left over."""
    assert_ended_in_time(done.output, done.ended)
    assert done.returncode != 0, done.output


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of one process on the same global batches: "fit-float64", "loop-float32" and so on."""
    folder = tmp_path_factory.mktemp("references")
    files = {}
    for dtype in ("float64", "float32"):
        files[f"fit-{dtype}"] = folder / f"fit-{dtype}.pt"
        options = ["--trainer.devices=1", f"--model.dtype={dtype}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kfac-dist"])  # LightningCLI warns of arguments beside those of pytest
            assert command.main(fit(files[f"fit-{dtype}"], *options)) == 0
        plain_loop.main(str(folder), f"single:{dtype}")
        files[f"loop-{dtype}"] = folder / f"single-{dtype}.pt"
    return files
