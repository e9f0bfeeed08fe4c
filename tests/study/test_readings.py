from __future__ import annotations

import math

import pytest

from kfac_dist.study.readings import after_epochs, after_seconds, median, seconds_to, training_loss
from tests.helpers.study_lines import made


def test_losses_between_evaluations_lie_on_the_line_between_them() -> None:
    lines = made(1.0)
    assert after_epochs(lines, 1) == 0.5
    assert after_epochs(lines, 1, "val_loss") == 1.0
    assert after_seconds(lines, 3.0) == pytest.approx(0.75)
    assert after_seconds(lines, 6.0) == pytest.approx(0.5)
    assert seconds_to(lines, 0.75) == pytest.approx(3.0)
    assert training_loss(lines) == pytest.approx(1 / 11)
    assert after_epochs(lines, 11) == after_seconds(lines, 61.0) == seconds_to(lines, 0.01) == math.inf


def test_the_clock_says_whose_seconds() -> None:
    lines = made(1.0, share=0.5)
    assert after_seconds(lines, 3.0, clock="cpu_seconds") == pytest.approx(0.5)
    assert seconds_to(lines, 0.75, clock="cpu_seconds") == pytest.approx(1.5)
    assert median([lines, made(2.0), made(3.0)], after_epochs, 1) == pytest.approx(1 / 3)
