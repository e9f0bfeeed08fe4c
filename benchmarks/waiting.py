"""Waiting for processes, until all have ended or one has failed."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess


def wait_until_ended(processes: Sequence[BaseProcess]) -> None:
    """Come back when all have ended, or when one has ended badly: the others might wait for it for ever.

    Who still runs is asked once per round: a wait for nobody, where the last one ended between two questions, would
    never come back.
    """
    while running := [process for process in processes if process.exitcode is None]:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in processes):
            return
