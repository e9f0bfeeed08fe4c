from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.study.protocol import Protocol
from kfac_dist.study.report.conditions import problem_words
from tests.helpers.study_lines import made, store_method
from tests.helpers.study_report import collected


@pytest.mark.parametrize(
    ("clock", "share", "device", "words"),
    [
        ("wall", 1.0, "cpu", "least 1.00, median 1.00. The machine was quiet."),
        ("wall", 0.5, "cpu", "least 0.50, median 0.50. **The machine was not quiet: take the seconds as rough.**"),
        ("cpu", 0.5, "cpu", "median 0.50. **The machine was not quiet.** CPU seconds leave out what others took, but"),
        ("cpu", 1.0, "cpu", "The machine was quiet."),
        ("wall", 0.5, "cuda", ""),  # the CPU waits for the GPU
    ],
)
def test_it_is_said_how_quiet_the_machine_was(tmp_path: Path, clock, share: float, device: str, words: str) -> None:
    protocol = Protocol(problem="tiny", trials=2, epochs=10, seconds=30.0, clock=clock, device=device)
    store_method(protocol, "adam", [made(1.0, share=share)] * 5, tmp_path)
    text = problem_words(collected(tmp_path, "adam", protocol=protocol))
    assert words in text
    assert ("quiet" in text) == bool(words)
