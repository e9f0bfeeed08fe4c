from __future__ import annotations

import math
from pathlib import Path

import pytest

from kfac_dist.study.protocol import Protocol
from kfac_dist.study.report.budgets import Budget, budgets, step_milliseconds
from kfac_dist.study.runner import make_run
from tests.helpers.study_lines import made, store, store_method
from tests.helpers.study_report import ONE, PROTOCOL, TWO, collected, results, study, told


def test_everything_is_read_from_the_files(tmp_path: Path) -> None:
    side = make_run("tiny", "nicolaides:deflated", {}, seed=0, label="side", epochs=10)
    store(side, made(3.0), tmp_path)
    found = results(tmp_path, {ONE: 1.0, TWO: [1.0, 1.1, 1.2, 1.3, 1.4]}, {TWO: 2.0}, side={"tiny": (side,)})
    two = found.methods[TWO]
    assert found.missing == 0
    assert two.trials == pytest.approx({0: 1 / 11, 1: 1 / 11})
    assert two.settings == PROTOCOL.chosen(TWO, tmp_path)
    assert [Budget(10).loss(two.finals[seed]) for seed in range(5)] == pytest.approx(
        [1 / 11, 1 / 12, 1 / 13, 1 / 14, 1 / 15]
    )
    assert [Budget(10).loss(lines) for lines in two.twins.values()] == pytest.approx([1 / 21] * 5)
    assert found.methods[ONE].twins == {}
    assert Budget(10).loss(found.side[0][1]) == pytest.approx(1 / 31)


def test_what_has_not_finished_is_counted(tmp_path: Path) -> None:
    told(tmp_path, {ONE: [1.0, 1.0, 1.0]})
    side = make_run("tiny", "nicolaides:deflated", {}, seed=0, label="side", epochs=10)
    found = collected(tmp_path, ONE, TWO, "adam", side={"tiny": (side,)})
    # Two of kfac's seeds; all of the others: 2 trials, 5 seeds, and 5 of one level at the two-level settings; the side.
    assert found.missing == 2 + (2 + 5 + 5) + (2 + 5) + 1
    assert list(found.ran) == [ONE]
    assert sorted(found.ran[ONE].finals) == [0, 1, 2]


def test_runs_with_other_settings_are_not_those_of_the_study(tmp_path: Path) -> None:
    told(tmp_path, {"adam": 1.0})
    for run in PROTOCOL.finals("adam", {"lr": 0.5}):
        store(run, made(9.0), tmp_path)
    assert collected(tmp_path, "adam").ran == {}


def test_settings_are_those_of_the_trial_with_the_lowest_loss(tmp_path: Path) -> None:
    runs, best = [made(1.0)] * 5, [made(1.0), made(2.0)]
    chosen = store_method(PROTOCOL, "adam", runs, tmp_path, best)
    assert chosen == PROTOCOL.tuning("adam")[1].settings
    store_method(PROTOCOL, "adam", runs, tmp_path, [made(1.0), made(2.0, "diverged")])
    found = collected(tmp_path, "adam").methods["adam"]
    assert found.settings == PROTOCOL.tuning("adam")[0].settings
    assert found.trials == {0: pytest.approx(1 / 11), 1: math.inf}


def test_a_loss_above_the_initial_one_is_infinite_and_so_is_the_held_out_loss_then() -> None:
    lines = made(1.0)
    assert Budget(10).loss(lines, "val_loss") == pytest.approx(2 / 11)
    lines[-2] = lines[-2] | {"loss": 1.5}
    assert Budget(10).loss(lines) == Budget(10).loss(lines, "val_loss") == math.inf
    assert Budget(60.0, "seconds").loss(lines) == math.inf
    assert Budget(9).loss(lines) == pytest.approx(0.1)


def test_the_clock_of_the_protocol_is_used() -> None:
    cpu = Protocol(problem="tiny", epochs=10, seconds=30.0, clock="cpu")
    lines = made(1.0, share=0.5)
    assert [budget.words for budget in budgets(cpu)] == ["10 epochs", "30 CPU s"]
    assert budgets(cpu)[1].loss(lines) == pytest.approx(1 / 11)
    assert step_milliseconds(lines, cpu) == pytest.approx(1e3 * 3 / 18)
    assert [budget.words for budget in budgets(Protocol(problem="tiny", epochs=4))] == ["4 epochs"]


def test_a_study_needs_a_protocol_for_every_problem() -> None:
    with pytest.raises(ValueError, match="no protocol for digits_cnn: add it to protocols="):
        study(ONE, side={"digits_cnn": ()})
