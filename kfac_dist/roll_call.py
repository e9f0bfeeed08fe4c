"""Who is missing: where a collective has failed, a rank leaves its mark in the job's store and reads the others' marks.

While all goes well nothing is written and nobody is asked. No call waits for long: the store is spoken to by a thread,
which is left behind where the store's own host is dead or frozen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Protocol

KEY = "kfac_dist/failed"
PAUSE = 0.05
"""Seconds between two looks."""


class Store(Protocol):
    """What is needed of a store that all ranks of the job share."""

    def append(self, key: str, value: str, /) -> object:
        """Add ``value`` to the end of what is there."""

    def get(self, key: str, /) -> bytes:
        """What is there."""


def roll_call(store: Store, host: str, rank: int, members: Collection[int], phase: str, patience: float) -> str:
    """What the marks say of the ranks of a collective that has failed here, as the beginning of an error's message.

    Args:
        store: shared by the job.
        host: who holds it, for the message.
        rank: this process's rank in the job.
        members: the collective's ranks in the job, with this one.
        phase: where it failed.
        patience: seconds for the others to fail too; as many again for the store to answer.

    Returns:
        Empty where every rank has failed in the same phase.
    """
    marks: dict[int, str] = {}
    # A thread: the store's own time-outs do not hold where its host has accepted the question and then stopped.
    thread = threading.Thread(target=_collect, args=(store, rank, members, phase, patience, marks), daemon=True)
    thread.start()
    thread.join(2 * patience)
    found = dict(marks)
    if not found:
        return f"the store, held by {host}, does not answer: {host} has ended or is frozen; "
    missing = [member for member in members if member not in found]
    text = ""
    if missing:
        text = f"no word from {_named(missing)} within {patience:g} s: ended, frozen or far behind; "
    for place in sorted({found[member] for member in members if member in found} - {phase}):
        there = [member for member in members if found.get(member) == place]
        text += f"{_named(there)} failed in phase {place}; "
    return text


def _collect(
    store: Store, rank: int, members: Collection[int], phase: str, patience: float, marks: dict[int, str]
) -> None:
    """Leave a mark, and fill ``marks`` (rank -> phase) until all members are there, or patience or the store ends."""
    end = time.monotonic() + patience
    try:
        store.append(KEY, f"{rank} {phase}\n")
        while True:
            for line in store.get(KEY).decode().splitlines():
                number, _, place = line.partition(" ")
                marks[int(number)] = place
            if all(member in marks for member in members) or time.monotonic() >= end:
                return
            time.sleep(PAUSE)
    except Exception:  # whatever the store raises: what it has said until now counts
        return


def _named(ranks: Collection[int]) -> str:
    return f"global rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
