"""``kfac-dist inspect``: the table of a configured model, and what it says of bad command lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kfac_dist.launch import __main__ as command

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def no_options_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kfac-dist"])


def test_a_configuration_with_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "mnist_autoencoder_two_level.yaml")
    assert command.main(["inspect", "--config", config, "--world-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "2,837,314 of 2,837,314 trainable parameters (100.0%)" in out
    assert "785" in out
    assert "4 ranks" in out


def test_one_without_it_is_shown_with_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "mnist_autoencoder_sgd.yaml")
    assert command.main(["inspect", "--config", config]) == 0
    out = capsys.readouterr().out
    assert "no KFAC callback" in out
    assert "1 rank;" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--world-size", "0"], "--world-size 0 must be at least 1"),
        (["--trainer.callbacks.init_args.skip_layers=."], "no layer that K-FAC can treat"),
    ],
)
def test_bad_command_lines_exit_with_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(CONFIGS / "mnist_autoencoder_two_level.yaml")
    with pytest.raises(SystemExit) as exit_:
        command.main(["inspect", "--config", config, *arguments])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err
