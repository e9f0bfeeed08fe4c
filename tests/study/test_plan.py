from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.coarse import coarse_spaces
from kfac_dist.config import CORRECTIONS
from kfac_dist.study.methods import method
from kfac_dist.study.plan import STAGES, Budget, StudyPlan, by_turns
from kfac_dist.study.protocol import TUNING_SEED, lines_of
from kfac_dist.study.readings import training_loss
from kfac_dist.study.runner import file_of, finished, read_lines, run_all
from kfac_dist.study.search import trials

METHODS = ("sgd", "kfac", "layer_step_momentum")


def plan(**changes) -> StudyPlan:
    settings = {"title": "a study", "problems": {"tiny": Budget(epochs=1)}, "methods": METHODS, "trials": 2}
    return StudyPlan(**settings | {"tuning_epochs": 1, "seeds": (0, 1)} | changes)


def test_every_method_gets_the_same_trials_and_the_same_fresh_seeds(tmp_path: Path) -> None:
    runs = plan().runs("tuning", tmp_path)
    assert {name: sum(run.method == name for run in runs) for name in METHODS} == dict.fromkeys(METHODS, 2)
    assert {run.seed for run in runs} == {TUNING_SEED}
    finals = plan().runs("finals", tmp_path, assume=True)
    assert {(run.method, run.seed) for run in finals} == {(name, seed) for name in METHODS for seed in (0, 1)}
    assert {run.clock for run in finals} == {"cpu"}
    # Seed by seed: what a busy machine does falls on all methods alike.
    assert [run.seed for run in finals] == [0, 0, 0, 1, 1, 1]


def test_a_stage_without_the_trials_runs_nothing(tmp_path: Path) -> None:
    assert not any(plan().runs(stage, tmp_path) for stage in ("finals", "twins"))


def test_a_method_that_searches_nothing_has_one_trial() -> None:
    assert not method("rate_free").space
    assert trials(method("rate_free").space, 6) == [{}]
    assert method("rate_free").fixed["damping"] == method("layer_step_momentum").space["damping"].default


def test_the_stages_build_on_one_another(tmp_path: Path) -> None:
    study = plan(problems={"tiny": Budget(epochs=1, side_epochs=1, methods=("rate_free",))})
    protocol = study.protocols["tiny"]
    run_all(study.runs("tuning", tmp_path), tmp_path, 1)
    losses = [[training_loss(read_lines(file_of(run, tmp_path))) for run in protocol.tuning(name)] for name in METHODS]
    for name, each in zip(METHODS, losses, strict=True):
        best = min(range(2), key=lambda i: each[i])
        assert protocol.chosen(name, tmp_path) == trials(method(name).space, 2)[best]
    chosen = {name: protocol.chosen(name, tmp_path) for name in METHODS}
    finals = study.runs("finals", tmp_path)
    assert all(chosen[run.method].items() <= run.settings.items() for run in finals if run.method != "rate_free")
    assert sum(run.method == "rate_free" for run in finals) == 2  # but no twin: its trials chose nothing
    twins = study.runs("twins", tmp_path)
    assert {(run.method, run.label, run.seed) for run in twins} == {
        ("kfac", "as-layer_step_momentum", seed) for seed in (0, 1)
    }
    two = chosen["layer_step_momentum"]
    assert {run.settings["damping"] for run in twins} == {two["damping"]}
    assert {run.settings["lr"] for run in twins} == {chosen["kfac"]["lr"]}
    side = study.runs("side", tmp_path)
    pairs = {f"{space}:{correction}" for space in coarse_spaces for correction in CORRECTIONS}
    assert {run.method for run in side} == pairs | {"kfac"}
    assert len(side) == len(pairs) + 1
    corrected = next(run for run in side if run.method == "nicolaides:additive").settings
    assert chosen["kfac"].items() <= corrected.items()
    assert two.items() <= next(run for run in side if run.method == "scalar:deflated").settings.items()
    run_all(finals[:1], tmp_path, 1)
    assert finished(finals[0], tmp_path)
    assert not lines_of(protocol.finals("sgd", chosen["sgd"]), tmp_path)  # only one of its two seeds
    assert len(lines_of(protocol.finals("sgd", chosen["sgd"])[:1], tmp_path)) == 1


def test_the_twin_of_a_method_that_corrects_a_direction_has_all_of_its_settings() -> None:
    one, two = trials(method("kfac").space, 3)[1:]
    name = "nicolaides:error_minimizing"
    twins = plan().protocols["tiny"].twin(name, {"kfac": one, name: two})
    assert [run.method for run in twins] == ["kfac"] * 2
    assert all(two.items() <= run.settings.items() for run in twins)
    chosen = {"damping": 0.5, "kl_clip": 7.0}
    (run, _) = plan().protocols["tiny"].twin("layer_step_momentum", {"kfac": one, "layer_step_momentum": chosen})
    assert (one | {"damping": 0.5}).items() <= run.settings.items()


def test_a_problem_can_do_without_the_twins(tmp_path: Path) -> None:
    for twins, labels in ((True, {"as-layer_step_momentum"}), (False, set())):
        study = plan(problems={"tiny": Budget(twins=twins)})
        assert {run.label for run in study.runs("twins", tmp_path, assume=True)} == labels
        assert study.protocols["tiny"].has_twin("layer_step_momentum") == twins
        assert not study.protocols["tiny"].has_twin("kfac")


def test_one_level_has_no_twin() -> None:
    with pytest.raises(ValueError, match="'kfac' is no two-level method"):
        plan().protocols["tiny"].twin("kfac", {"kfac": {}})


def test_spaces_that_are_others_with_one_vector_get_two() -> None:
    for space in ("krylov", "pcg", "spectral_bands"):
        assert method(f"{space}:additive").fixed["coarse_vectors_per_layer"] == 2
    assert "coarse_vectors_per_layer" not in method("nicolaides:additive").fixed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problems": {}}, "name at least one of"),
        ({"problems": {"mist": Budget()}}, "problem 'mist' is unknown; choose one of"),
        ({"methods": ("adamm",)}, "unknown method 'adamm'"),
        ({"problems": {"tiny": Budget(methods=("nicolaides:wrong",))}}, "correction='wrong'"),
        ({"seeds": (0, 100)}, "give at least one, but not 100"),
        ({"seeds": ()}, "give at least one"),
        ({"seeds": (0, 1, 0)}, r"seeds=\[0, 1, 0\]: give each once"),
        ({"trials": 0}, "trials=0"),
        ({"tuning_epochs": 0}, "tuning_epochs=0"),
        ({"threads": 0}, "threads=0"),
        ({"threads": 2}, "set clock='wall'"),
        ({"device": "meat"}, "device='meat' is no device"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{"clock": "wall"} | changes if "device" in changes else changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"epochs": 0}, "epochs=0"), ({"seconds": -1.0}, "seconds=-1"), ({"side_epochs": -1}, "side")],
)
def test_a_wrong_budget_is_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**changes)


def test_turns_go_on_when_a_group_is_exhausted() -> None:
    assert by_turns([["a", "b", "c"], ["d"], []]) == ["a", "d", "b", "c"]
    assert STAGES[0] == "tuning"


def test_the_learning_rate_of_sgd_is_searched_where_the_loss_lives() -> None:
    rates = {}
    for problem in ("mnist_autoencoder", "digits_cnn"):
        points = plan(problems={problem: Budget()}, trials=6).protocols[problem].points_of("sgd")
        rates[problem] = [point["lr"] for point in points]
        assert all(point.keys() == {"lr", "momentum"} for point in points)
    assert max(rates["mnist_autoencoder"]) < 0.03 <= max(rates["digits_cnn"])
    assert rates["digits_cnn"][0] == 0.05
