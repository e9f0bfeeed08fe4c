from __future__ import annotations

import pytest

from kfac_dist.study.search import Range, radical_inverse, trials


def test_the_digits_are_mirrored_at_the_point() -> None:
    assert [radical_inverse(i, 2) for i in (1, 2, 3, 4)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8]
    assert [radical_inverse(i, 3) for i in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1 / 9])


def test_ends_and_middle_of_every_scale() -> None:
    assert [Range(2, 1, 3, "linear").at(u) for u in (0, 0.5, 1)] == [1, 2, 3]
    assert [Range(0.1, 1e-3, 1e-1).at(u) for u in (0, 0.5, 1)] == [1e-3, 1e-2, 1e-1]
    assert [Range(0.9, 0.9, 0.999, "log_to_one").at(u) for u in (0, 0.5, 1)] == [0.9, 0.99, 0.999]


def test_the_first_trial_is_the_default_and_all_differ() -> None:
    space = {"lr": Range(0.1, 1e-3, 1.0), "momentum": Range(0.9, 0.5, 0.99, "log_to_one")}
    points = trials(space, 6)
    assert points[0] == {"lr": 0.1, "momentum": 0.9}
    assert points[1]["lr"] == pytest.approx(10**-1.5, rel=1e-2)
    assert len({tuple(p.values()) for p in points}) == 6
    assert all(1e-3 <= p["lr"] <= 1 and 0.5 <= p["momentum"] <= 0.99 for p in points)
    assert trials(space, 3) == points[:3]  # more trials are the same ones, and some


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2.0, 0.1, 1.0), r"default=2.0 must lie in \[low=0.1, high=1.0\]"),
        ((0.5, 0.0, 1.0), "low=0.0 must be above 0 on the scale 'log'"),
        ((0.5, 0.1, 1.0, "log_to_one"), "high=1.0 must be below 1"),
        ((0.5, 0.1, 1.0, "square"), "scale='square' is unknown"),
    ],
)
def test_ranges_that_cannot_be(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Range(*arguments)


def test_more_hyper_parameters_than_bases_are_refused() -> None:
    with pytest.raises(ValueError, match="7 hyper-parameters to search: at most 6"):
        trials({str(i): Range(0.1, 0.01, 1.0) for i in range(7)}, 2)
