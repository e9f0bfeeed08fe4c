"""Every rule fires on what it is about, with its numbers, and is silent just on the other side of its bound."""

from __future__ import annotations

from typing import Any

import pytest

from kfac_dist.callbacks.advice import RULES, Seen, advice


def seen(**numbers: Any) -> Seen:
    quiet = {"steps": 100, "shares": {}, "damping": 0.03, "factor_every_n_steps": 5, "inverse_every_n_steps": 10}
    return Seen(**quiet | numbers)


COARSE = {"gain": 0.02, "shares": {"coarse": 0.09}}
INVERSES = {"shares": {"inverses": 0.41}}
RANKS = {"ranks": 4}
SPREAD = RANKS | {"all_inverses_everywhere": False}
# What was seen, what is said.
FIRES = [
    (
        COARSE,
        "the coarse level reduced the squared error by 2.0% of the direction's energy at 9% of the time: it is safe to "
        "leave it off for this net (coarse=None)",
    ),
    (
        COARSE | {"rate_free": True},
        "the coarse level reduced the squared error by 2.0% of the direction's energy at 9% of the time: as it also "
        "chooses the learning rate, solve less often (a coarse every_n_steps above 1)",
    ),
    (INVERSES, "inverses cost 41% of the time: raise inverse_every_n_steps (now 10)"),
    (
        INVERSES | RANKS,
        "inverses cost 41% of the time: raise inverse_every_n_steps (now 10) or use distribution='mem_opt', which does "
        "not exchange them",
    ),
    (INVERSES | SPREAD, "inverses cost 41% of the time: raise inverse_every_n_steps (now 10)"),
    (
        {"shares": {"capture": 0.2, "factors": 0.1}},
        "the factors cost 30% of the time: raise factor_every_n_steps (now 5) or take them from a share of the samples "
        "(factor_samples)",
    ),
    (
        {"shares": {"capture": 0.2, "factors": 0.1}, "factor_samples": 0.25},
        "the factors cost 30% of the time: raise factor_every_n_steps (now 5)",
    ),
    (
        {"shares": {"precondition": 0.6}},
        "preconditioning costs 60% of the time: factor_sides='input' halves it, a larger batch dilutes it",
    ),
    (
        {"shares": {"precondition": 0.6}, "sides": "input"} | RANKS,
        "preconditioning costs 60% of the time: distribution='mem_opt' spreads it over the 4 ranks, a larger batch "
        "dilutes it",
    ),
    (
        {"conditions": {"first": 1.25, "last": 40.0}},
        "damping dominates the spectrum of layer first (condition 1.2): the direction there is the gradient times a "
        "number; lower damping (now 0.03), or leave such layers to the optimizer with skip_layers",
    ),
    (
        {"conditions": {f"{i}": 1.5 for i in range(6)}},
        "damping dominates the spectrum of layers 0 (condition 1.5), 1 (condition 1.5), 2 (condition 1.5), 3 "
        "(condition 1.5) and 2 more: the direction there is the gradient times a number; lower damping (now 0.03), or "
        "leave such layers to the optimizer with skip_layers",
    ),
    (
        {"conditions": {"first": 3e8, "last": 40.0}},
        "the damped block of layer first (condition 3e+08) is ill-conditioned, which float32 cannot resolve: raise "
        "damping (now 0.03)",
    ),
    (
        {"clip": 0.04},
        "the KL clip scaled the steps by 0.04 in the mean: it, not lr, sets the step size; lower lr, raise kl_clip, or "
        "raise damping",
    ),
    (
        {"counts": {"inverse_fallbacks": 3.0}},
        "3 factorisations needed float64, jitter or an older inverse: raise damping (now 0.03)",
    ),
    (
        {"counts": {"dropped_statistics": 2.0}},
        "2 factor updates were dropped, as something was not finite: lower lr, and look at the data",
    ),
    (
        {"counts": {"coarse/failures": 2.0, "coarse/abandoned": 1.0}},
        "the coarse level failed 2 times and gave up 1 of 100 steps: let its damping adapt "
        "(CoarseConfig(damping='adaptive')) or start it higher (initial_damping)",
    ),
]
SILENT = [
    {},
    {"gain": 0.05, "shares": {"coarse": 0.09}},
    {"gain": 0.02, "shares": {"coarse": 0.02}},
    {"gain": None, "shares": {"coarse": 0.09}},
    {"shares": {"inverses": 0.25}},
    {"shares": {"capture": 0.125, "factors": 0.125}},
    {"shares": {"precondition": 0.25}},
    {"conditions": {"first": 2.0, "last": 1e7}},
    {"clip": 0.1},
    {"clip": None},
    {"counts": {"inverse_fallbacks": 0.0, "dropped_statistics": 0.0, "coarse/failures": 0.0, "coarse/abandoned": 0.0}},
]


@pytest.mark.parametrize(("numbers", "said"), FIRES)
def test_a_rule_fires_with_its_numbers(numbers, said):
    assert advice(seen(**numbers)) == [said]


@pytest.mark.parametrize("numbers", SILENT)
def test_a_rule_is_silent_on_the_other_side_of_its_bound(numbers):
    assert advice(seen(**numbers)) == []


def test_every_rule_fires_somewhere():
    silent = [rule.__name__ for rule in RULES if all(rule(seen(**numbers)) is None for numbers, _ in FIRES)]
    assert silent == []


def test_failures_come_first():
    said = advice(seen(shares={"inverses": 0.41}, counts={"dropped_statistics": 1.0}))
    assert [line.split(" ")[1] for line in said] == ["factor", "cost"]
