from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.study.report.budgets import Budget
from kfac_dist.study.report.collect import collect
from kfac_dist.study.report.measures import interactions, measures_table, series
from kfac_dist.study.report.ranking import pairs, ranking, target, winners
from kfac_dist.study.report.side import side_table
from kfac_dist.study.runner import make_run
from tests.helpers.study_lines import made, store, store_method
from tests.helpers.study_report import ONE, PROTOCOL, TWO, cells, collected, results, study

KFAC, TWO_TITLE = "K-FAC, factored damping", "two-level K-FAC, layer_step_momentum"


def test_the_table_holds_the_numbers_of_the_data(tmp_path: Path) -> None:
    found = results(tmp_path, {"sgd": 0.1, "adam": [1.0, 1.1, 0.9, 1.2, 0.8], ONE: 2.0})
    assert target(found) == (pytest.approx(1 / 11), "adam")
    lines = ranking(found)
    assert [line.split("|")[1].strip() for line in lines[3:-1]] == [KFAC, "Adam", "SGD with momentum"]
    held_out = "0.1818"
    assert cells(lines, "Adam") == [
        "Adam",
        *["0.0909 [0.0769, 0.1111]"] * 2,
        *[held_out] * 2,
        "60.0 [50.1, -]",  # 2 of the 5 do not come so far: the upper end is not reached
        "333",
        "0 of 5",
        "0 of 2",
    ]
    # 1 / (1 + 2 t) falls to 1 / 11 at t = 5 epochs, 30 s.
    assert cells(lines, KFAC)[1:6] == ["0.0476 [0.0476, 0.0476]"] * 2 + ["0.0952"] * 2 + ["30.0 [30.0, 30.0]"]
    assert cells(lines, "SGD with momentum")[5] == "-"


def test_the_method_that_sets_the_target_reaches_it_with_an_even_number_of_seeds_too(tmp_path: Path) -> None:
    store_method(PROTOCOL, "adam", [made(1.0), made(2.0)], tmp_path)
    found = collected(tmp_path, "adam")
    assert target(found) == (pytest.approx(1 / 11), "adam")
    assert cells(ranking(found), "Adam (2 seeds so far)")[5] == "45.0 [30.0, 60.0]"


def test_diverged_runs_and_trials_are_counted(tmp_path: Path) -> None:
    bad = made(1.0)
    bad[-2], bad[-1] = bad[-2] | {"loss": 7.0}, bad[-1] | {"end": "diverged"}
    runs = [made(1.0), bad, made(1.0, "failed", epochs=3), made(2.0), bad]
    store_method(PROTOCOL, "adam", runs, tmp_path, [made(1.0), bad])
    row = cells(ranking(collected(tmp_path, "adam")), "Adam")
    assert row[1] == "∞ [0.0476, ∞]"  # three of five
    assert row[-2:] == ["3 of 5", "1 of 2"]


def test_winners_are_those_of_each_measure(tmp_path: Path) -> None:
    store_method(PROTOCOL, "adam", [made(1.0)] * 5, tmp_path)
    store_method(PROTOCOL, ONE, [made(1.5, epoch_seconds=24.0)] * 5, tmp_path)  # ahead per epoch only
    epochs, seconds, time = winners(collected(tmp_path, "adam", ONE))
    assert epochs == [
        "loss, 10 epochs",
        KFAC,
        "Adam",
        "0.0625 [0.0625, 0.0625]",
        "0.688 [0.688, 0.688]",
        "100 %",
        "yes",
    ]
    assert seconds[:2] == ["loss, 60 s", "Adam"]
    assert time[:4] == ["time to the target", "Adam", KFAC, "60.0 [60.0, 60.0]"]  # that one much later, at its end


def test_a_lead_within_the_noise_of_the_seeds_is_none(tmp_path: Path) -> None:
    found = results(tmp_path, {"adam": 1.0, ONE: [1.2, 1.2, 1.2, 0.9, 1.2]})
    assert winners(found)[0][1:] == [KFAC, "Adam", "0.0769 [0.0769, 0.1000]", "0.846 [0.846, 1.1]", "80 %", "no"]


def test_where_everything_diverged_nobody_wins(tmp_path: Path) -> None:
    store_method(PROTOCOL, "adam", [made(1.0, "failed", epochs=3)] * 5, tmp_path)
    assert [row[1:] for row in winners(collected(tmp_path, "adam"))] == [["-"] * 6] * 2


def test_pairs_count_seeds(tmp_path: Path) -> None:
    found = results(tmp_path, {"adam": [1.0, 1.0, 1.0, 1.0, 1.0], ONE: [2.0, 0.5, 2.0, 1.0, 2.0]})
    lines = pairs(found, Budget(10))
    assert cells(lines, f"1 {KFAC}") == [f"1 {KFAC}", "", "70"]
    assert cells(lines, "2 Adam") == ["2 Adam", "30", ""]


def test_the_side_table_divides_by_one_level_at_the_same_settings(tmp_path: Path) -> None:
    names = {ONE: made(1.0), "nicolaides:deflated": measured(2.0, 0.5, epoch_seconds=9.0), "pcg:additive": made(4.0)}
    runs = [make_run("tiny", name, {}, seed=0, label="side", epochs=10) for name in (*names, "krylov:additive")]
    for run in runs[:-1]:
        store(run, names[run.method], tmp_path)
    lines = side_table(collect(study(side={"tiny": tuple(runs)}), tmp_path)["tiny"])
    assert cells(lines, "pcg:additive")[1:] == ["ours", "0.0244", "0.268", "333", "1", "-", "-", "done"]
    assert cells(lines, KFAC)[1:] == ["-", "0.0909", "-", "333", "-", "-", "-", "done"]
    assert cells(lines, "nicolaides:deflated")[1:] == [
        "the papers'",
        "0.1667",
        "1.83",
        "500",
        "1.5",
        "2",
        "0.125",
        "done",
    ]
    assert not any("krylov" in line for line in lines)  # it has not finished
    assert [line.split("|")[1].strip() for line in lines[3:6]] == ["pcg:additive", KFAC, "nicolaides:deflated"]


def measured(factor: float, rate: float = 1.0, **clock: float) -> list[dict]:
    lines = made(rate, **clock)
    for step in (6, 12):
        where = {"epoch": step / 18, "step": step, "seconds": 1.0, "cpu_seconds": 1.0}
        errors = {"error": factor * step, "error_free": 0.5, "error_one_level": 9.0, "error_free_one_level": 0.75}
        exact = {"error_free": 0.375, "error_free_one_level": 0.625}
        lines.insert(-2, where | {"measures": errors | {"decrease": 0.25}, "exact": exact})
        lines.insert(-2, where | {"batch_loss": 0.3, "coarse": {"decrease_ratio": factor, "share": 0.125}})
    lines.insert(
        -1, {"epoch": 10, "step": 180, "interactions": [[1.0, factor / 10], [factor / 10, 1.0]], "layers": ["a", "b"]}
    )
    return lines


def test_measures_are_medians_of_what_the_runs_hold(tmp_path: Path) -> None:
    store_method(PROTOCOL, TWO, [measured(factor) for factor in (1.0, 2.0, 3.0)], tmp_path)
    store_method(PROTOCOL, "adam", [made(1.0)], tmp_path)
    found = collected(tmp_path, TWO, "adam")
    runs = found.methods[TWO].finals
    assert series(runs, "measures", "error") == [(6 / 18, 12.0), (12 / 18, 24.0)]
    shown = ["15", "9", "0.5", "0.75", "0.375", "0.625", "0.25", "2", "0.125"]
    assert cells(measures_table(found), TWO_TITLE)[1:] == shown
    layers, matrix = interactions(runs) or ([], None)
    assert layers == ["a", "b"]
    assert matrix is not None
    assert matrix.tolist() == [[1.0, 0.1], [0.1, 1.0]]
    assert measures_table(collected(tmp_path, "adam")) == []
