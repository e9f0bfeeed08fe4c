from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.study.protocol import Protocol
from kfac_dist.study.report.comparisons import (
    against_best,
    against_one_level,
    against_scalar,
    best_one_level,
    headline,
)
from kfac_dist.study.report.verdicts import comparisons, overall, paragraph, summary
from tests.helpers.study_lines import made, store_method
from tests.helpers.study_report import ONE, PROTOCOL, SCALAR, TWO, collected, results

NAME = "two-level K-FAC, layer_step_momentum"
FIVE = [1.0, 1.1, 0.9, 1.2, 0.8]


def test_two_levels_are_compared_seed_by_seed_at_their_own_and_at_the_same_settings(tmp_path: Path) -> None:
    found = results(tmp_path, {ONE: FIVE, TWO: [rate * 2 for rate in FIVE]}, {TWO: [rate * 3 for rate in FIVE]})
    own, seconds, same, _ = against_one_level(found, TWO)
    assert [own.settings, same.settings] == ["own", "same"]
    assert own.losses == pytest.approx((1 / 21, 1 / 11))
    assert own.ratio.middle == pytest.approx(11 / 21)
    assert (own.ratio.low, own.ratio.high) == pytest.approx((13 / 25, 9 / 17))
    assert same.ratio.middle == pytest.approx(31 / 21)
    assert (own.won, same.won) == (1.0, 0.0)
    assert (own.ratio.verdict, same.ratio.verdict) == ("helps", "harms")
    assert seconds.losses == pytest.approx(own.losses)  # ten epochs take sixty seconds


@pytest.mark.parametrize(
    ("rate", "verdict", "words"),
    [
        ([2.0] * 5, "helps", "loss 48 % lower, lower in 100 % of 5 seeds"),
        ([0.5] * 5, "harms", "loss 83 % higher, lower in 0 % of 5 seeds"),
        ([1.0, 0.98, 1.01, 1.0, 0.99], "does not help", "loss equal, between 0.9 % lower and 1.9 % higher"),
        ([2.0, 0.5, 1.0, 1.1, 0.9], "undecided", "loss equal, between 48 % lower and 83 % higher, lower in 50 % of"),
        ([99.0] * 5, "helps", "loss 90.1 times lower, lower in 100 %"),
    ],
)
def test_the_paragraph_follows_the_numbers(tmp_path: Path, rate: list[float], verdict: str, words: str) -> None:
    found = results(tmp_path, {ONE: 1.0, TWO: rate})
    text = paragraph(found)
    assert f"The trials rank {NAME} best" in text
    assert f"Each at its own settings: after 10 epochs **{verdict}** ({words}" in text
    assert f"after 60 s **{verdict}** ({words}" in text
    assert "at the settings of the two-level method" not in text
    assert f"**{verdict}**" in overall({"tiny": found})[-2]
    assert f"per epoch, of 1 problem: {verdict} on 1" in summary({"tiny": found})
    assert ("nowhere is it ahead" in summary({"tiny": found})) == (verdict != "helps")


def test_another_one_level_method_that_is_better_is_told(tmp_path: Path) -> None:
    eigen, finals = "kfac_eigen", [made(3.0)] * 5
    results(tmp_path, {ONE: 1.0, TWO: 2.0})
    store_method(PROTOCOL, eigen, finals, tmp_path, [made(0.1)] * 2)
    worse = collected(tmp_path, ONE, TWO, eigen)
    assert best_one_level(worse) == ONE  # by the trials, whatever the final runs say
    assert not against_best(worse, TWO)
    store_method(PROTOCOL, eigen, finals, tmp_path, [made(9.0)] * 2)
    found = collected(tmp_path, ONE, TWO, eigen)
    assert best_one_level(found) == eigen
    text = paragraph(found)
    assert "Each at its own settings: after 10 epochs **helps**" in text
    best = "K-FAC, eigen damping, which the trials rank best of the one-level methods"
    assert f"- Against {best}: after 10 epochs **harms** (loss 48 % higher" in text
    assert "another one-level K-FAC method best, against that one: per epoch, of 1 problem: harms on 1" in summary(
        {"tiny": found}
    )
    assert "K-FAC, eigen damping" in "".join(comparisons(found))


def test_the_same_settings_have_a_verdict_of_their_own(tmp_path: Path) -> None:
    text = paragraph(results(tmp_path, {ONE: 1.0, TWO: 2.0}, {TWO: 4.0}))
    own, same = text.split("K-FAC, factored damping at the settings of the two-level method: ")
    assert "after 10 epochs **helps**" in own
    assert "after 10 epochs **harms**" in same


def test_diverged_runs_turn_the_verdict(tmp_path: Path) -> None:
    found = results(tmp_path, {ONE: 1.0, TWO: 2.0})
    bad = made(2.0)
    bad[-2], bad[-1] = bad[-2] | {"loss": 7.0}, bad[-1] | {"end": "diverged"}
    store_method(PROTOCOL, TWO, [made(2.0), made(2.0), bad, bad, bad], tmp_path, [made(2.0)] * 2)
    assert "after 60 s **helps**" in paragraph(found)
    text = paragraph(collected(tmp_path, ONE, TWO))
    assert "after 60 s **undecided** (loss diverged, between 48 % lower and diverged, lower in 40 % of 5 seeds)" in text


def test_the_trials_choose_whom_the_verdict_is_about(tmp_path: Path) -> None:
    other = "layer_step_momentum_fixed"
    results(tmp_path, {ONE: 1.0})
    store_method(PROTOCOL, TWO, [made(9.0)] * 5, tmp_path, [made(2.0)] * 2)
    store_method(PROTOCOL, other, [made(0.5)] * 5, tmp_path, [made(2.0), made(3.0)])
    found = collected(tmp_path, ONE, TWO, other)
    assert headline(found) == other  # its final runs are the worse ones
    assert "after 10 epochs **harms**" in paragraph(found)
    assert headline(found, "paper") is None


def test_the_verdict_is_about_a_method_that_was_tuned_as_its_one_level_form_was(tmp_path: Path) -> None:
    found = results(tmp_path, {ONE: 1.0, TWO: 2.0, "rate_free_adaptive": 9.0})
    assert headline(found) == headline(found, "ours") == TWO  # the other's trial is the best, and its only one
    alone = collected(tmp_path, ONE, "rate_free_adaptive")
    assert headline(alone) is None
    assert "no verdict" in paragraph(alone)


def test_the_summary_holds_the_scalar_baseline_against_the_coarse_level(tmp_path: Path) -> None:
    first = results(tmp_path / "1", {ONE: 1.0, TWO: 2.0, SCALAR: 2.0})
    second = results(tmp_path / "2", {ONE: 1.0, TWO: 2.0, SCALAR: 0.5})
    own, scalar = summary({"1": first, "2": second}).split(" Where it has a coefficient per layer, ")
    assert "per epoch, of 2 problems: helps on 2; per second, of 2 problems: helps on 2." in own
    assert "per epoch, of 2 problems: does not help on 1 and helps on 1; per second, of 2 problems" in scalar
    assert "scalar" not in summary({"1": results(tmp_path / "3", {ONE: 1.0, TWO: 2.0})})


def test_where_both_diverged_their_losses_are_not_called_equal(tmp_path: Path) -> None:
    bad = made(2.0)
    bad[-2], bad[-1] = bad[-2] | {"loss": 7.0}, bad[-1] | {"end": "diverged"}
    for name in (ONE, TWO):
        store_method(PROTOCOL, name, [bad] * 5, tmp_path, [made(2.0)] * 2)
    text = paragraph(collected(tmp_path, ONE, TWO))
    assert "**does not help** (loss infinite, as both diverged, lower in 50 % of 5 seeds)" in text


def test_each_family_has_a_headline_of_its_own(tmp_path: Path) -> None:
    paper = "nicolaides:deflated"
    found = results(tmp_path, {ONE: 1.0, TWO: 3.0, paper: 0.5, SCALAR: 9.0})
    assert (headline(found, "paper"), headline(found, "ours"), headline(found)) == (paper, TWO, TWO)
    theirs, ours = overall({"tiny": found})[3:5]
    assert theirs.count("**harms**, 1.83 [1.83, 1.83] (two-level K-FAC, nicolaides, deflated)") == 2
    assert ours.count("**helps**, 0.355 [0.355, 0.355]") == 2


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (1.0, "a coefficient per layer is better (loss 48 % lower"),
        (2.0, "one for the whole net does as well: the scalar baseline explains what is gained (loss equal"),
        (3.0, "one for the whole net is better (loss 48 % higher"),
        ([1.0, 3.0, 2.0, 2.0, 2.0], "it is undecided whether one for the whole net does as well"),
    ],
)
def test_the_scalar_baseline_is_judged_by_the_same_rule(tmp_path: Path, rate, words: str) -> None:
    found = results(tmp_path, {ONE: 1.0, TWO: 2.0, SCALAR: rate})
    text = paragraph(found)
    assert f"Against two-level K-FAC, scalar_momentum, each at its own settings: after 10 epochs {words}" in text
    assert [each.other for each in against_scalar(found, TWO)] == [SCALAR] * 2
    assert against_scalar(found, SCALAR) == against_scalar(found, ONE) == []


def test_the_cost_of_a_step_is_a_ratio_seed_by_seed(tmp_path: Path) -> None:
    store_method(PROTOCOL, ONE, [made(1.0)] * 5, tmp_path)
    store_method(PROTOCOL, TWO, [made(1.0, epoch_seconds=6.0 * c) for c in (2, 2.5, 2.2, 2.1, 2.3)], tmp_path)
    found = collected(tmp_path, ONE, TWO)
    assert f"A step of it costs 2.2 [2, 2.5] times one of {'K-FAC, factored damping'}." in paragraph(found)
    own = against_one_level(found, TWO)
    assert own[0].ratio.middle == 1.0
    assert own[1].ratio.middle == pytest.approx((1 / (1 + 10 / 2.2)) * 11, rel=0.01)  # it is slower by the clock only


def test_few_seeds_give_no_verdict(tmp_path: Path) -> None:
    found = results(tmp_path, {ONE: 1.0, TWO: 3.0}, protocol=Protocol(problem="tiny", trials=2, seeds=(0, 1)))
    text = paragraph(found)
    assert "after 10 epochs **undecided**, too few seeds for a verdict (loss 65 % lower, lower in 100 % of 2" in text
    assert "undecided on 1 (too few seeds for a verdict)" in summary({"tiny": found})


def test_without_a_pair_there_is_no_verdict(tmp_path: Path) -> None:
    found = results(tmp_path, {"adam": 1.0, TWO: 3.0})
    assert "no verdict" in paragraph(found)
    assert comparisons(found) == []
    assert "did not run" in overall({"tiny": found})[3]
    assert overall({"tiny": found})[4].count("none that was tuned beside its one-level form") == 2
    assert overall({"tiny": collected(tmp_path, ONE, TWO)})[4].count("not finished") == 2
    assert overall({"tiny": collected(tmp_path, ONE, "rate_free")})[4].count("none that was tuned beside") == 2
    assert "No two-level method has been compared" in summary({"tiny": found})


def test_what_was_not_tuned_is_not_compared_at_the_same_settings_nor_with_a_tuned_scalar(tmp_path: Path) -> None:
    rates = {ONE: 1.0, SCALAR: 1.0, "rate_free": 2.0}
    assert results(tmp_path, rates, {SCALAR: 1.0}).missing == 0
    found = results(tmp_path, rates, {SCALAR: 1.0, "rate_free": 4.0})
    assert {each.settings for each in against_one_level(found, "rate_free")} == {"own"}
    assert against_scalar(found, "rate_free") == []
