"""What the marks say, with stores that answer, break or hang; with real ranks see test_dying_ranks.py."""

from __future__ import annotations

import threading
import time

import pytest

from kfac_dist.roll_call import KEY, roll_call

PATIENCE = 0.2


class Shelf:
    """A store in memory with marks of other ranks.

    Args:
        marks: (rank, phase) of others.
        answers: how many times it tells them before it breaks.
    """

    def __init__(self, *marks: tuple[int, str], answers: float = float("inf")) -> None:
        self.text = "".join(f"{rank} {phase}\n" for rank, phase in marks)
        self.answers = answers

    def append(self, key: str, value: str) -> None:
        assert key == KEY
        self.text += value

    def get(self, key: str) -> bytes:
        assert key == KEY
        if self.answers <= 0:
            raise RuntimeError("Connection reset by peer")
        self.answers -= 1
        return self.text.encode()


class Silent(Shelf):
    """Its host is frozen: a question is never answered."""

    def append(self, key: str, value: str) -> None:
        threading.Event().wait()


NOBODY = f"within {PATIENCE:g} s: ended, frozen or far behind; "
NO_ANSWER = "the store, held by the launcher, does not answer: the launcher has ended or is frozen; "


@pytest.mark.parametrize(
    ("store", "members", "wanted", "waits"),
    [
        (Shelf((0, "factors"), (2, "factors")), range(3), "", 0),
        (Shelf((0, "factors")), range(3), f"no word from global rank 2 {NOBODY}", 1),
        (Shelf(), range(4), f"no word from global ranks 0, 2, 3 {NOBODY}", 1),
        (Shelf((2, "inverses"), (3, "coarse")), (1, 2), "global rank 2 failed in phase inverses; ", 0),
        (
            Shelf((0, "two words"), (2, "two words")),
            range(4),
            f"no word from global rank 3 {NOBODY}global ranks 0, 2 failed in phase two words; ",
            1,
        ),
        (Shelf((0, "gradients"), (0, "factors")), range(2), "", 0),  # it was tried again
        (Shelf((0, "factors"), answers=1), range(3), f"no word from global rank 2 {NOBODY}", 0),
        (Shelf(answers=0), range(3), NO_ANSWER, 0),
        (Silent(), range(3), NO_ANSWER, 2),
    ],
)
def test_who_is_missing(store: Shelf, members: range, wanted: str, waits: int) -> None:
    begin = time.monotonic()
    assert roll_call(store, "the launcher", 1, members, "factors", PATIENCE) == wanted
    waited = time.monotonic() - begin
    assert waits * PATIENCE <= waited + 1e-3
    if not waits:
        assert waited < PATIENCE


def test_a_mark_that_comes_later_is_waited_for() -> None:
    store = Shelf()
    threading.Timer(0.1, store.append, (KEY, "0 factors\n")).start()
    assert roll_call(store, "rank 0", 1, range(2), "factors", 30.0) == ""
    assert store.text == "1 factors\n0 factors\n"
