"""Batch jobs of the tests: submitted, waited for, and looked at."""

from __future__ import annotations

import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from tests.helpers.launched import MARK, ROOT, environment, left_over

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Job:
    """A job in SLURM's hands.

    Attributes:
        number: its id.
        log: the file of its output.
        mark: every process that it starts carries it in its environment.
    """

    number: int
    log: Path
    mark: str

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else "(no output)"

    def field(self, name: str) -> str:
        """A field of ``scontrol show job``."""
        shown = slurm("scontrol", "show", "job", str(self.number))
        return re.findall(rf"\b{name}=(\S+)", shown)[0]

    def wait_for(self, line: str, timeout: float = 120.0) -> None:
        """Wait until its output holds ``line``.

        Raises:
            AssertionError: it did not come in time, or the job ended without it.
        """
        end = time.monotonic() + timeout
        while line not in self.output:
            ended = self.field("JobState") in ENDED
            assert time.monotonic() < end, f"no {line!r} within {timeout:g} s\n{self.output}"
            assert not ended or line in self.output, f"ended without {line!r}\n{self.output}"
            time.sleep(0.2)

    def wait(self, timeout: float = 180.0) -> str:
        """Wait for its end; the state.

        Raises:
            AssertionError: it did not end in time, or left processes over.
        """
        end = time.monotonic() + timeout
        while (state := self.field("JobState")) not in ENDED:
            assert time.monotonic() < end, f"{state} after {timeout:g} s\n{self.output}"
            time.sleep(0.3)
        survivors = left_over(self.mark)
        assert not survivors, "\n".join(survivors)
        return state


def slurm(*command: str) -> str:
    """What a command of SLURM prints.

    Raises:
        AssertionError: it failed.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def submission(extra: Mapping[str, str]) -> Iterator[str]:
    """The environment that a job is submitted from, and inherits, in the place of ours; its mark."""
    mark = uuid.uuid4().hex
    variables = environment({"SLURM_CONF": os.environ["SLURM_CONF"], MARK: mark, **extra})
    # The job scripts are to find these numbers by themselves.
    del variables["PRTE_MCA_rmaps_default_mapping_policy"], variables["OMP_NUM_THREADS"]
    with patch.dict(os.environ, variables, clear=True):
        yield mark


def submitted(printed: str, folder: Path, mark: str) -> Job:
    """The job that was announced by ``printed``, with its output in ``folder``."""
    number = int(re.findall(r"\bjob (\d+)", printed)[0])
    return Job(number, folder / f"slurm-{number}.out", mark)
