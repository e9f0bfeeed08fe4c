from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pytorch_lightning import LightningDataModule, LightningModule

from kfac_dist.callbacks import KFAC
from kfac_dist.launch.train import TrainingCLI

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
QUIET = ("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false")
WITHOUT_KFAC = {"mnist_autoencoder_adam", "mnist_autoencoder_sgd"}


@pytest.fixture(autouse=True)
def no_options_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where it is given arguments beside those in sys.argv."""
    monkeypatch.setattr(sys, "argv", ["kfac-dist"])


def parse(file: Path, *options: str) -> TrainingCLI:
    return TrainingCLI(["--config", str(file), *QUIET, *options], run=False, save_config_callback=None)


def test_there_are_configurations() -> None:
    assert {file.stem for file in FILES} >= {"mnist_autoencoder", "curves_autoencoder", "digits_cnn"} | WITHOUT_KFAC


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_configuration_is_parsed_and_instantiated(file: Path) -> None:
    cli = parse(file, "--trainer.accelerator=cpu")
    assert isinstance(cli.model, LightningModule)
    assert isinstance(cli.datamodule, LightningDataModule)
    assert any(isinstance(callback, KFAC) for callback in cli.trainer.callbacks) == (file.stem not in WITHOUT_KFAC)
    optimizers = cli.model.configure_optimizers()
    settings = cli.config.get("optimizer") or cli.config.model  # a problem has an optimizer of its own
    assert optimizers.param_groups[0]["lr"] == settings.init_args.lr
    assert sum(len(group["params"]) for group in optimizers.param_groups) == len(list(cli.model.parameters()))


SMALL_GPT = ("--model.width=16", "--model.depth=1", "--model.heads=2", "--data.batch_size=4")
SMALL_IMAGES = ("--model.net=cuda_convnet", "--data.dataset=digits", "--data.batch_size=8")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mnist_autoencoder", ()),
        ("digits_cnn", ()),
        ("cifar_resnet20", SMALL_IMAGES),
        ("cifar_resnet20_two_level", SMALL_IMAGES),
        ("char_gpt", SMALL_GPT),
        ("char_gpt_two_level", SMALL_GPT),
    ],
)
def test_one_batch_of_training(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    cli = parse(
        CONFIGS / f"{name}.yaml",
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        f"--trainer.default_root_dir={tmp_path}",
        *options,
    )
    before = [p.detach().clone() for p in cli.model.parameters()]
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 1
    assert all((p != b).any() for p, b in zip(cli.model.parameters(), before, strict=True))
    assert not any(module._forward_hooks for module in cli.model.modules())
