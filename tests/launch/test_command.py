from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytorch_lightning import LightningModule

import kfac_dist
from kfac_dist.launch import __main__ as command
from kfac_dist.launch.train import TrainingCLI, refusal

CONFIG = Path(__file__).parents[2] / "configs" / "mnist_autoencoder_sgd.yaml"


@pytest.fixture(autouse=True)
def no_options_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where it is given arguments beside those in sys.argv."""
    monkeypatch.setattr(sys, "argv", ["kfac-dist"])


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in command.SUBCOMMANDS)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"kfac-dist {kfac_dist.__version__}"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [([], "a subcommand is missing"), (["train"], "unknown subcommand 'train'; choose one of fit")],
)
def test_a_command_line_without_a_known_subcommand_exits_with_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(argv) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert not captured.out


def test_subcommands_are_dispatched_with_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = types.ModuleType("echo_subcommand")
    module.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "echo_subcommand", module)
    monkeypatch.setitem(command.SUBCOMMANDS, "echo", command.Subcommand("echo_subcommand", "repeats itself"))
    assert command.main(["echo", "--loud"]) == 7
    assert seen == [["echo", "--loud"]]


def test_module_and_script_are_one_command() -> None:
    outputs = [
        subprocess.run([*program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        for program in ((sys.executable, "-m", "kfac_dist.launch"), (str(Path(sys.executable).with_name("kfac-dist")),))
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("kfac-dist ")


def test_fit_help_explains_the_problems_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["fit", "--model.help", "Autoencoder"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--model.init {default,xavier,kaiming}" in out
    assert "after every layer but the code layer" in out


def test_a_key_that_does_not_exist_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(CONFIG.read_text())
    content["data"]["init_args"]["batchsize"] = 3
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as end:
        command.main(["fit", "--config", str(wrong)])
    assert end.value.code == 2
    assert "'batchsize' is not" in capsys.readouterr().err


def test_a_value_that_is_not_allowed_is_an_error_that_lists_what_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["fit", "--config", str(CONFIG), "--model.activation=gelu"])
    assert end.value.code == 2
    assert "relu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"coarse": {"space": "layer_step", "max_samples": -3}}, "max_samples=-3 must be"),
        ({"coarse": {"spase": "layer_step"}}, "coarse has no 'spase'; it has space, "),
        ({"coarse": "layer_stepp"}, "unknown coarse space 'layer_stepp'; known: "),
        ({"damping": -1.0}, "damping=-1.0 must be a finite number above 0"),
        ({"distribution": {"timeout": -1.0}}, "timeout=-1.0 must be"),
    ],
)
@pytest.mark.parametrize("subcommand", ["fit", "inspect"])
def test_a_value_that_the_callback_refuses_ends_with_its_message_alone(
    subcommand: str, option: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(CONFIG.read_text())
    content["trainer"]["callbacks"] = [{"class_path": "kfac_dist.callbacks.KFAC", "init_args": option}]
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as end:
        command.main([subcommand, "--config", str(wrong)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"error: {message}" in " ".join(said.split())
    assert "Traceback" not in said
    assert "subclass of Callback" not in said


class Broken(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        raise ValueError("a mistake of its own")


def test_a_mistake_in_a_class_of_the_users_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a mistake of its own") as caught:
        TrainingCLI(["--model=tests.launch.test_command.Broken", "--data=Digits"], run=False)
    assert refusal(caught.value) is None


def test_problems_have_short_names_and_the_seed_is_0() -> None:
    cli = TrainingCLI(
        ["--model=DigitsCNN", "--data=Digits", "--data.batch_size=32", "--trainer.logger=false"], run=False
    )
    assert (type(cli.model).__name__, type(cli.datamodule).__name__) == ("DigitsCNN", "Digits")
    assert cli.datamodule.batch_size == 32
    assert cli.config.seed_everything == 0


def test_the_command_line_overrides_the_file_and_the_models_own_optimizer() -> None:
    cli = TrainingCLI(
        ["--config", str(CONFIG), "--optimizer=Adam", "--optimizer.lr=0.5", "--trainer.logger=false"], run=False
    )
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer).__name__ == "Adam"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_fit_trains_and_leaves_its_configuration_and_record(tmp_path: Path) -> None:
    arguments = [
        *("fit", "--config", str(CONFIG), "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"),
        *("--model.widths=[784,20,5]", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"),
        *("--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={tmp_path}"),
        *("--trainer.callbacks+=EpochRecord", f"--trainer.callbacks.path={tmp_path / 'run.jsonl'}"),
    ]
    for _ in range(2):  # the second run overwrites what the first one has left
        assert command.main(arguments) == 0
    line = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["model"]["init_args"]["widths"] == [784, 20, 5]
    assert saved["seed_everything"] == 0
