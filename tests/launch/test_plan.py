"""``kfac-dist plan``: its rows against the cost model, a configured model's work, and what it says of bad lines."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from kfac_dist.config import CoarseConfig, KFACConfig
from kfac_dist.costs import Machine, Method, strategies
from kfac_dist.launch import __main__ as command
from kfac_dist.launch import plan as planner
from kfac_dist.launch.calibrate import calibrate
from kfac_dist.launch.workload import workload
from kfac_dist.networks import networks
from kfac_dist.study import Autoencoder, MNISTDigits

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def no_options_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kfac-dist"])


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_a_layer_list_has_one_row_per_world_and_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    arguments = ["--flops", "2e13", "--bandwidth", "5e9", "--plot", str(picture), "--inverse-every-n-steps", "50"]
    assert command.main(["plan", "--layers", "resnet50", "--world-size", "1", "8", *arguments]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert [row[:2] for row in found] == [[n, s] for n in ("1", "8") for s in ("comm_opt", "mem_opt", "best")]
    expected = strategies(networks["resnet50"](), Method(inverse_every=50), Machine.from_rates(2e13, 5e9), 8)
    assert found[3][-1] == f"{expected['comm_opt'].step / expected['comm_opt'].sgd:.2f}"
    assert found[4][8] == f"{expected['mem_opt'].bytes_per_step / 1e6:,.1f}"
    assert "Inversions scale to 4.6 ranks" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_documented_plan_is_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (CONFIGS.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    called, shown = re.findall(r"```(?:bash|text)\n(.*?)```", text, re.DOTALL)[:2]
    assert command.main(called.split()[1:]) == 0
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_a_configuration_is_planned_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "mnist_autoencoder_two_level.yaml")
    assert command.main(["plan", "--config", config, "--world-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "Autoencoder, 2.8 M parameters" in out
    assert [row[1] for row in rows(out)] == ["comm_opt", "mem_opt", "best"]


def test_rows_and_flops_of_a_model_are_those_of_its_layers() -> None:
    autoencoder = Autoencoder(widths=[784, 20, 5])
    network = workload(autoencoder, MNISTDigits(batch_size=16), KFACConfig())
    assert [layer.rows for layer in network.layers] == [1.0] * len(network.layers)
    assert network.batch == 16
    assert network.parameters == sum(p.numel() for p in autoencoder.parameters())
    assert network.flops == pytest.approx(2 * (network.parameters), rel=0.03)  # the biases are no products


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name a layer list"),
        (["--layers", "resnet50", "--config", "x.yaml"], "name a layer list"),
        (["--layers", "alexnet"], "invalid choice: 'alexnet'"),
        (["--layers", "resnet50", "--world-size", "0"], "--world-size [0] must be above 0"),
        (["--layers", "resnet50", "--model.width=3"], "unknown options beside --layers: --model.width=3"),
    ],
)
def test_bad_command_lines_exit_with_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(["plan", *arguments])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_the_calibration_gives_rates_that_a_machine_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfac_dist.launch.calibrate.ORDER", 256)
    machine = calibrate()
    assert 1e8 < machine.eigh < machine.cholesky < machine.gemm < 1e15
    assert 1e7 < machine.memory < 1e14
    assert 1e5 < machine.bandwidth < 1e13
    assert 1e-8 < machine.operation < 1e-2
    assert 1e-7 < machine.latency < 1.0


def test_a_coarse_level_and_draws_are_part_of_the_method() -> None:
    config = KFACConfig()
    assert planner.method_of(config, None, 5).draws == 0
    method = planner.method_of(config, CoarseConfig(space="layer_step_momentum"), 5)
    assert (method.coarse, method.coarse_samples) == (10, 64)
    assert planner.method_of(config, CoarseConfig(space="scalar"), 5).coarse == 1
