"""The callback in a LightningCLI: from YAML, from the command line, and its help."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning.cli import LightningCLI

from kfac_dist import CoarseConfig, DistributionConfig
from kfac_dist.callbacks import KFAC
from kfac_dist.schedules import ExponentialDamping, PiecewiseDamping
from tests.callbacks.tiny import Classifier

# The command line of pytest is none of the CLI's.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

EVERYTHING = """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: kfac_dist.callbacks.KFAC
      init_args:
        likelihood: categorical
        fisher_samples: exact
        output_module: last
        class_dim: 1
        damping:
          class_path: kfac_dist.schedules.ExponentialDamping
          init_args: {start: 0.1, decay: 0.9, minimum: 0.001}
        damping_method: eigen
        factor_sides: input
        factor_decay: 0.9
        factor_every_n_steps: 2
        inverse_every_n_steps: 4
        kl_clip: 0.001
        loss_reduction: mean_all
        skip_layers: [first, Conv2d]
        coarse:
          space: pcg
          vectors_per_layer: 2
          correction: balanced
          every_n_steps: 3
          max_samples: 64
          damping: adaptive
          initial_damping: 0.5
        distribution:
          strategy: hybrid
          gradient_worker_fraction: 0.5
          timeout: 30
        seed: 3
        clip_raw_gradients: 1.5
        log_every_n_steps: 5
        sample_ids_key: ids
        mask_key: 2
        kfac_approx: {attention: reduce, Conv: expand}
        max_factor_dim: 512
        large_factors: diagonal
        norm_blocks: full
        uncovered: diagonal
        initial_damping: 2
        inverse_schedule: staggered
        factor_samples: 0.5
        preconditioning: gradients
"""


def parse(*arguments: str) -> KFAC:
    """The callback of a command line."""
    cli = LightningCLI(Classifier, run=False, save_config_callback=None, args=list(arguments))
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, KFAC))
    return callback


def from_yaml(tmp_path, text: str) -> KFAC:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(f"--config={path}")


def options(callback: KFAC) -> dict[str, Any]:
    own = ("clip_raw_gradients", "log_every_n_steps", "sample_ids_key", "mask_key")
    return callback._options | {name: getattr(callback, name) for name in own}


def test_every_option_in_yaml(tmp_path):
    callback = from_yaml(tmp_path, EVERYTHING)
    assert options(callback) == {
        "likelihood": "categorical",
        "fisher_samples": "exact",
        "output_module": "last",
        "class_dim": 1,
        "damping": ExponentialDamping(0.1, 0.9, 0.001),
        "damping_method": "eigen",
        "factor_sides": "input",
        "factor_decay": 0.9,
        "factor_every_n_steps": 2,
        "inverse_every_n_steps": 4,
        "kl_clip": 0.001,
        "loss_reduction": "mean_all",
        "skip_layers": ("first", "Conv2d"),
        "coarse": CoarseConfig(
            space="pcg",
            vectors_per_layer=2,
            correction="balanced",
            every_n_steps=3,
            max_samples=64,
            damping="adaptive",
            initial_damping=0.5,
        ),
        "seed": 3,
        "clip_raw_gradients": 1.5,
        "log_every_n_steps": 5,
        "sample_ids_key": "ids",
        "mask_key": 2,
        "kfac_approx": {"attention": "reduce", "Conv": "expand"},
        "max_factor_dim": 512,
        "large_factors": "diagonal",
        "norm_blocks": "full",
        "uncovered": "diagonal",
        "initial_damping": 2,
        "inverse_schedule": "staggered",
        "factor_samples": 0.5,
        "preconditioning": "gradients",
    }
    assert callback._distribution == DistributionConfig(strategy="hybrid", gradient_worker_fraction=0.5, timeout=30)


def test_yaml_without_arguments_is_the_callback_without_arguments(tmp_path):
    text = "trainer:\n  accelerator: cpu\n  logger: false\n  callbacks:\n    - class_path: kfac_dist.callbacks.KFAC\n"
    callback = from_yaml(tmp_path, text)
    assert options(callback) == options(KFAC())
    assert callback._distribution == DistributionConfig()


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("damping=0.5", "damping", 0.5),
        ("loss_reduction=2.0", "loss_reduction", 2.0),
        ("loss_reduction=sum", "loss_reduction", "sum"),
        ("fisher_samples=4", "fisher_samples", 4),
        ("kl_clip=null", "kl_clip", None),
        ('skip_layers=["head"]', "skip_layers", ("head",)),
        ("skip_layers=head", "skip_layers", ("head",)),
        ("preconditioning=samples", "preconditioning", "samples"),
    ],
)
def test_the_command_line(argument, name, value):
    callback = parse(
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.callbacks+=KFAC",
        "--trainer.callbacks.likelihood=bernoulli",
        f"--trainer.callbacks.{argument}",
    )
    assert options(callback)[name] == value
    assert options(callback)["likelihood"] == "bernoulli"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("mem_opt", DistributionConfig(strategy="mem_opt")),
        ("0.5", DistributionConfig(strategy="hybrid", gradient_worker_fraction=0.5)),
        ('{"strategy": "mem_opt", "backend": "single"}', DistributionConfig(strategy="mem_opt", backend="single")),
    ],
)
def test_distribution_on_the_command_line(value, expected):
    callback = parse(
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.callbacks+=KFAC",
        f"--trainer.callbacks.distribution={value}",
    )
    assert callback._distribution == expected


def test_a_piecewise_schedule(tmp_path):
    text = EVERYTHING.replace("ExponentialDamping", "PiecewiseDamping").replace(
        "{start: 0.1, decay: 0.9, minimum: 0.001}", "{values: [0.1, 0.01], boundaries: [10]}"
    )
    assert options(from_yaml(tmp_path, text))["damping"] == PiecewiseDamping([0.1, 0.01], [10])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("damping_method: eigen", "damping_method: eigenvalues"),
        ("factor_every_n_steps: 2", "factor_every_n_steps: often"),
        ("kl_clip: 0.001", "momentum: 0.9"),
        ("norm_blocks: full", "norm_blocks: dense"),
    ],
)
def test_wrong_values_and_names_do_not_parse(tmp_path, capsys, right, wrong):
    with pytest.raises(SystemExit):
        from_yaml(tmp_path, EVERYTHING.replace(right, wrong))
    assert wrong.split(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("space: pcg", "space: multigrid", r"unknown coarse space 'multigrid'; known: krylov, layer_step"),
        ("max_samples: 64", "max_sample: 64", r"coarse has no 'max_sample'; it has space, vectors_per_layer"),
        ("correction: balanced", "correction: none", r"correction='none' is unknown; choose one of"),
        ("timeout: 30", "timeout: soon", r"timeout='soon' must be a finite number above 0"),
        ("timeout: 30", "time_out: 30", r"distribution has no 'time_out'; it has strategy"),
    ],
)
def test_what_is_wrong_one_level_deeper_is_said_before_there_is_a_trainer(tmp_path, right, wrong, message):
    with pytest.raises(ValueError, match=message):
        from_yaml(tmp_path, EVERYTHING.replace(right, wrong))


def test_help_shows_the_docstring(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Classifier, run=False, args=["--trainer.callbacks.help=kfac_dist.callbacks.KFAC"])
    text = capsys.readouterr().out
    assert "draws per sample" in text
    assert "--trainer.callbacks.kl_clip" in text
