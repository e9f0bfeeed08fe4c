from __future__ import annotations

import threading

import pytest

from benchmarks import waiting
from benchmarks.waiting import wait_until_ended


class Ending:
    """A process that has ended when it is asked for the second time; its sentinel is never ready."""

    sentinel = object()

    def __init__(self, code: int = 0, questions: int = 1) -> None:
        self.code, self.questions = code, questions

    @property
    def exitcode(self) -> int | None:
        self.questions -= 1
        return None if self.questions >= 0 else self.code


def come_back(processes, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes were waited for, each time; a wait for none would never come back."""
    waited: list[int] = []

    def wait(sentinels):
        waited.append(len(sentinels))

    monkeypatch.setattr(waiting, "wait", wait)
    thread = threading.Thread(target=lambda: wait_until_ended(processes), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    return waited


def test_a_process_that_ends_between_two_questions_is_not_waited_for(monkeypatch) -> None:
    assert come_back([Ending(), Ending()], monkeypatch) == [2]
    assert come_back([Ending(questions=0)], monkeypatch) == []


def test_the_first_bad_end_is_enough(monkeypatch) -> None:
    assert come_back([Ending(code=3, questions=1), Ending(questions=1000)], monkeypatch) == [2]
