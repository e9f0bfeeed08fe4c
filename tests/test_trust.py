"""The Levenberg-Marquardt rule for the coarse damping, by itself."""

from __future__ import annotations

import math

import pytest

from kfac_dist.trust import HIGHEST, LOWEST, OMEGA, LevenbergMarquardt


@pytest.mark.parametrize(
    ("ratio", "factor", "accepted"),
    [
        (1.0, OMEGA, True),
        (0.76, OMEGA, True),
        (0.74, 1.0, True),
        (0.26, 1.0, True),
        (0.24, 1 / OMEGA, True),
        (0.0, 1 / OMEGA, True),
        (-0.1, 4.0, False),
        (math.nan, 4.0, False),
        (math.inf, 4.0, False),
        (-math.inf, 4.0, False),
    ],
)
def test_the_rule(ratio: float, factor: float, accepted: bool) -> None:
    assert pytest.approx(0.95**5) == OMEGA
    rule = LevenbergMarquardt(0.5)
    assert rule.judge(ratio) is accepted
    assert rule.damping == pytest.approx(0.5 * factor)
    assert rule.due(101) == (factor > 1)  # after a bad step the next one is checked, too


def test_the_rule_stays_in_bounds() -> None:
    for ratio, bound in ((1.0, LOWEST), (-1.0, HIGHEST)):
        rule = LevenbergMarquardt(bound)
        rule.judge(ratio)
        assert rule.damping == bound


def test_when_a_step_is_checked() -> None:
    rule = LevenbergMarquardt(1.0)
    assert [s for s in range(36) if rule.due(s)] == [*range(20), 20, 25, 30, 35]
