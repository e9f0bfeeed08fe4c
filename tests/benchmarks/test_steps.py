from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import __main__ as program
from benchmarks.steps import memory, one_level, peer, ranks, two_levels
from benchmarks.steps.floors import DENSE, SAMPLES, products
from benchmarks.steps.problems import SMOKE, Sizes, autoencoder
from benchmarks.steps.processes import on_ranks
from benchmarks.steps.runs import Run, race_settings
from benchmarks.steps.timing import Schedule, Spread, Timed, Times, measure, ratio

SGD = Times(Schedule(), [{"plain": [10.0]}, {"plain": [20.0]}])


def times(*rounds: tuple[float, float]) -> Times:
    return Times(Schedule(True), [{"plain": [plain], "curvature": [update]} for plain, update in rounds])


@pytest.mark.parametrize(
    ("schedule", "every", "shares"),
    [
        (Schedule(), 10, {"plain": 1.0}),
        (Schedule(True), 10, {"curvature": 0.1, "plain": 0.9}),
        (Schedule(True, 1), 100, {"curvature, coarse": 0.01, "coarse": 0.99}),
        (Schedule(True, 5), 10, {"curvature, coarse": 0.1, "coarse": 0.1, "plain": 0.8}),
        (Schedule(True, 20), 10, {"curvature, coarse": 0.05, "curvature": 0.05, "plain": 0.9}),
        (Schedule(True, 1, True), 10, {"curvature, coarse, loss": 0.1, "coarse, loss": 0.1, "coarse": 0.8}),
        (Schedule(True, 2, True), 10, {"curvature, coarse, loss": 0.1, "coarse": 0.4, "loss": 0.1, "plain": 0.4}),
    ],
)
def test_a_cycle_has_as_many_steps_of_each_kind_as_fall_into_it(
    schedule: Schedule, every: int, shares: dict[str, float]
) -> None:
    assert schedule.cycle(every) == pytest.approx(shares)


def test_a_block_has_every_kind_of_a_cycle() -> None:
    for schedule in (Schedule(True, coarse, adaptive) for coarse in (0, 1, 2, 5, 10) for adaptive in (False, True)):
        seen = {schedule.kind(step, schedule.block) for step in range(schedule.block)}
        assert seen >= {*schedule.cycle(10), *schedule.cycle(100)}


def test_ratios_are_of_cycles_of_the_same_round() -> None:
    over = ratio(times((20.0, 120.0), (60.0, 160.0)), SGD, 10)  # 30 / 10 and 70 / 20
    assert (over.low, over.median, over.high) == pytest.approx((3.125, 3.25, 3.375))
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_steps_that_never_do_without_the_loss_count_as_they_are() -> None:
    adaptive = Times(Schedule(True, 1, True), [{"curvature, coarse, loss": [9.0], "coarse, loss": [3.0]}])
    assert adaptive.cycles(10) == pytest.approx([0.1 * 9.0 + 0.9 * 3.0])
    with pytest.raises(RuntimeError, match="no step of the kind 'curvature' was timed, only \\['plain'\\]"):
        Times(Schedule(True), [{"plain": [1.0]}]).cycles(10)


def test_everything_takes_turns() -> None:
    calls = []

    class Noted(Timed):
        def __init__(self, name: str) -> None:
            self.name = name

        def begin(self) -> None:
            calls.append(self.name)

    found = measure([Noted("a"), Noted("b")], 3)
    assert calls == ["a", "b"] * 4  # the first block of each warms up
    assert [len(each["plain"]) for each in found["b"].rounds] == [4, 4, 4]


def test_a_block_begins_from_the_same_weights_and_a_diverged_one_is_no_measurement() -> None:
    run = Run("SGD", autoencoder(SMOKE, 8))
    start = [parameter.clone() for parameter in run.net.parameters()]
    run.step()
    assert not all(map(torch.equal, run.net.parameters(), start))
    run.begin()
    assert all(map(torch.equal, run.net.parameters(), start))
    run.net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="SGD: weights are not finite after 1 steps"):
        run.begin()


def test_floors_add_their_parts_to_sgd() -> None:
    parts = {part: Times(Schedule(), [{"plain": [2.0]}, {"plain": [4.0]}]) for part in DENSE.parts | SAMPLES.parts}
    assert DENSE.ratio({"SGD": SGD, **parts}, 10).median == pytest.approx(1 + 0.2 + 3 * 0.02)
    assert SAMPLES.ratio({"SGD": SGD, **parts}, 10).median == pytest.approx(1 + 0.2 - 0.2 + 3 * 0.02)


def test_pieces_of_floors_are_the_products_they_stand_for() -> None:
    made = products(6, 4, 3, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    x, dy, W = (torch.randn(shape, generator=generator) for shape in ((6, 4), (6, 3), (3, 4)))
    A, G = (s.T @ s / 6 + 0.1 * torch.eye(s.shape[1]) for s in (x, dy))
    torch.testing.assert_close(made["dense products"](), G @ W @ A)
    torch.testing.assert_close(made["rank-B products"](), G @ (dy.T @ x) @ A)
    torch.testing.assert_close(made["input rank-B products"](), dy.T @ x @ A)
    torch.testing.assert_close(made["weight gradients"](), dy.T @ x)
    torch.testing.assert_close(made["moments"](), (x.T @ x, dy.T @ dy))
    for name in ("Cholesky inverses", "input Cholesky inverses"):
        torch.testing.assert_close(torch.cat([each.flatten() for each in made[name]()]), inverses_of(name, A, G))


def inverses_of(name: str, A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.inverse().flatten() for m in ((A,) if name.startswith("input") else (A, G))])


CELL = one_level.Cell("one level", {}, (3.3, 3.2), rivals=("inverse", "eigen"))
NET = one_level.Net("net", (CELL,), {"inverse": (4.0, 8.0), "eigen": (5.0, 6.5)})


def test_targets_are_kept_or_missed() -> None:
    found = one_level.rows(NET, {"SGD": SGD, "one level": times((20.0, 120.0), (60.0, 160.0))})
    assert [row[3] for row in found] == ["", "100", "10"]
    assert [row[4:7] for row in found[1:]] == [
        ["2.58 (2.34-2.81)", "3.3", "kept"],
        ["3.25 (3.12-3.38)", "3.2", "missed"],
    ]


def test_the_faster_method_of_the_peer_is_the_one_to_beat_and_recorded_ratios_stand_in() -> None:
    own = {"SGD": SGD, "one level": times((20.0, 120.0), (40.0, 240.0))}  # 2.1 and 3 times SGD
    rows = one_level.against_peer(NET, own)
    assert [row[1:4] for row in rows] == [
        ["100", "inverse", "0.53 (of 4, recorded)"],
        ["10", "eigen", "0.46 (of 6.5, recorded)"],
    ]
    peers = {
        "kfac-pytorch, inverse": times((18.0, 330.0), (36.0, 660.0)),
        "kfac-pytorch, eigen": times((25.0, 35.0), (50.0, 70.0)),
    }
    rows = one_level.against_peer(NET, own | peers)
    assert [(row[2], row[4]) for row in rows] == [("inverse", "kept"), ("eigen", "missed")]


def test_the_settings_of_the_race_are_read_with_the_names_of_the_preconditioner(tmp_path: Path) -> None:
    file = tmp_path / "race.yaml"
    file.write_text(
        "trainer:\n  callbacks:\n    - class_path: kfac_dist.callbacks.KFAC\n      init_args:\n"
        "        likelihood: bernoulli\n        damping: 0.5\n        clip_raw_gradients: true\n"
        "        coarse: {space: layer_step, max_samples: 64, every_n_steps: 5, damping: adaptive}\n"
        "optimizer:\n  init_args: {lr: 1.0}\n"
    )
    settings = race_settings(file)
    assert settings.fine == {"damping": 0.5}
    other = settings.with_space("layer_step_residual")
    assert (other.space, other.max_samples, other.every_n_steps, other.damping) == (
        "layer_step_residual", 64, 5, "adaptive",
    )  # fmt: skip
    assert set(race_settings().fine) >= {"damping"}  # the one that is there
    assert two_levels.TARGETS.keys() == {"layer_step", "layer_step_momentum", "layer_step_residual"}


def test_a_clone_that_is_not_installed_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kfac"
    package.mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "9.8"\n')
    (package / "__init__.py").write_text(
        "import importlib.metadata\nfound = importlib.metadata.version('kfac-pytorch')\n"
    )
    with pytest.raises(FileNotFoundError, match="holds no kfac/preconditioner"):
        peer.load(tmp_path)
    (package / "preconditioner.py").write_text("class KFACPreconditioner:\n    pass\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "kfac"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        assert peer.load(tmp_path).__name__ == "KFACPreconditioner"
        assert sys.modules["kfac"].found == "9.8"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "kfac"]:
            del sys.modules[name]
    assert str(tmp_path) not in sys.path


def test_a_step_takes_as_long_as_on_the_slower_rank() -> None:
    schedule = {"curvature": False, "coarse_every": 0, "adaptive": False}
    both: list[dict[str, Any]] = [
        {"SGD": {"schedule": schedule, "rounds": [{"plain": values}]}} for values in ([1.0, 5.0], [3.0, 2.0])
    ]
    assert ranks.slowest(both)["SGD"].rounds == [{"plain": [3.0, 5.0]}]


def grown_bytes(rank: int) -> list[int]:
    """What live_bytes() sees of a tensor of 1,000 numbers, its views, and one of 7 numbers that goes again."""
    before = memory.live_bytes()
    kept = torch.ones(1000)
    views = [kept[:10], kept.view(10, 100), torch.ones(7)]
    grown = [memory.live_bytes() - before]
    del views
    return [*grown, memory.live_bytes() - before]


def test_bytes_of_tensors_are_counted_once_per_storage() -> None:
    assert on_ranks(grown_bytes, 1) == [[4 * 1007, 4000]]  # in a process that nobody else leaves tensors in


def test_memory_of_one_rank_holds_at_least_factors_and_inverses() -> None:
    (found,) = on_ranks(memory.measured, 1, SMOKE, 1, "inverse", "comm_opt", None)
    orders = [(49, 12), (12, 4), (4, 12), (12, 49)]
    triangles = 4 * sum(n * (n + 1) // 2 for a, g in orders for n in (a + 1, g))
    assert 2 * triangles <= found["formula"] <= found["steady"]
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    assert memory.peer_formula(net, "inverse") == 4 * 2 * (16 + 4)
    assert memory.peer_formula(net, "eigen") == 4 * (2 * (16 + 4) + 4 * 2)


@pytest.mark.slow
def test_ranks_answer_from_processes_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert on_ranks(divmod, 2, 1) == [[0, 0], [1, 0]]
    with pytest.raises(RuntimeError, match="divmod failed on one of 2 ranks"):
        on_ranks(divmod, 2, 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "results.md"
    program.main(["--smoke", "--threads", "1", "--only", "one-level", "profile", "--output", str(page)])
    text = page.read_text()
    assert "## One level over SGD\n" in text
    assert "ResNet-20, 8 x 8, batch 2" in text
    assert len(re.findall(r"^\| one level \| [\d.]+ \| [\d.]+ \| 10+ \|", text, re.MULTILINE)) == 6
    for cell in one_level.AUTOENCODER.cells:
        assert len(re.findall(rf"^\| {cell.name} \| [\d.]+ \| [\d.]+ \| 10+ \|", text, re.MULTILINE)) >= 2
    for kind in ("curvature", "plain"):
        assert re.search(rf"^\| ResNet-20 \| {kind} \| [\d.]+ \| [\d.]+ \|", text, re.MULTILINE)
    assert "no clone of kfac-pytorch" in capsys.readouterr().out


@pytest.mark.parametrize("space", ["layer_step_momentum", "layer_step_residual"])
def test_two_levels_are_compared_at_equal_settings(space: str) -> None:
    rows = two_levels.compare(SMOKE, {space: race_settings().with_space(space)}, 1)
    assert [row[0] for row in rows] == ["one level"] * 2 + [space] * 2
    assert rows[2][1:3] == ["8", "32"]
    assert all(float(row[4]) > 0 for row in rows)


def test_sizes_beyond_the_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 4096 from digit 500 on needs more than the 4500 digits"):
        autoencoder(Sizes(), 4096, 500)
