from __future__ import annotations

import pickle

import pytest

from kfac_dist.schedules import ExponentialDamping, PiecewiseDamping


def test_exponential_damping_falls_to_its_minimum():
    damping = ExponentialDamping(0.1, 0.5, 0.02)
    assert [damping(step) for step in (0, 1, 2, 3, 10**6)] == [0.1, 0.05, 0.025, 0.02, 0.02]


def test_piecewise_damping_changes_at_its_boundaries():
    damping = PiecewiseDamping([1.0, 0.1, 0.01], [3, 5])
    assert [damping(step) for step in range(7)] == [1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert PiecewiseDamping([0.3], [])(10) == 0.3


@pytest.mark.parametrize("damping", [ExponentialDamping(0.1, 0.9, 0.01), PiecewiseDamping([1.0, 0.1], [2])])
def test_schedules_survive_pickling(damping):
    copy = pickle.loads(pickle.dumps(damping))
    assert copy == damping
    assert copy(2) == damping(2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExponentialDamping(0.0, 0.9, 0.1), "start=0.0"),
        (lambda: ExponentialDamping(0.1, 1.5, 0.1), "decay=1.5"),
        (lambda: ExponentialDamping(0.1, 0.9, 0.0), "minimum=0.0"),
        (lambda: ExponentialDamping(0.1, 0.9, 0.2), "minimum=0.2"),
        (lambda: PiecewiseDamping([1.0], [1]), "one value more"),
        (lambda: PiecewiseDamping([1.0, -1.0], [1]), "values=-1.0"),
        (lambda: PiecewiseDamping([1.0, 0.1], [0]), "ascending"),
        (lambda: PiecewiseDamping([1.0, 0.1, 0.01], [5, 5]), "ascending"),
    ],
)
def test_bad_numbers_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
