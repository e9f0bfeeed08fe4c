from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Before torch is imported: child processes (torchrun, mpirun) share the cores among themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from kfac_dist.kept_rows import KeptRows
from tests.helpers.conformance import table
from tests.helpers.ranks import RankPool

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other spin, 100 times slower on a busy machine
settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", action="store_true", help="print the largest error of every check of every layer")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--conformance"):
        terminalreporter.section("conformance")
        for line in table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks.run(world_size, function, *args)``: results by rank, from gloo workers that the whole run shares."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The layers whose directions were made of rows, step by step."""
    found: list[set[str]] = []
    take = KeptRows.take

    def watched(self: KeptRows, *arguments: Any) -> Any:
        rows = take(self, *arguments)
        found.append(set(rows))
        return rows

    monkeypatch.setattr(KeptRows, "take", watched)
    return found
