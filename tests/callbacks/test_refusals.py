"""Every set-up that cannot work is refused, and the message says the cure."""

from __future__ import annotations

import contextlib
import inspect
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import strategies
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.utils.checkpoint import checkpoint

from kfac_dist import DistributionConfig
from kfac_dist.callbacks import KFAC
from tests.callbacks.tiny import Classifier, Manual, fit, hooks, kfac

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC", "OMPI_", "PMI_", "SLURM_", "MPI_")


def with_strategy(strategy, **options) -> SimpleNamespace:
    defaults = {"world_size": 1, "precision": "32-true", "accumulate_grad_batches": 1}
    return SimpleNamespace(strategy=strategy, **defaults | options)


def blank(cls) -> object:
    """An instance whose requirements (devices, packages) are not asked for."""
    return object.__new__(cls)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (FSDPStrategy, "shards the parameters"),
        (ModelParallelStrategy, "shards the parameters"),
        (DeepSpeedStrategy, "shards gradients"),
        (XLAStrategy, "XLA"),
        (SingleDeviceXLAStrategy, "XLA"),
        (type("Mystery", (), {}), "not known"),
    ],
)
def test_strategies_that_shard_or_trace(strategy, reason):
    with pytest.raises(MisconfigurationException, match=rf'{strategy.__name__}: .*{reason}.*strategy="ddp"'):
        kfac().setup(with_strategy(blank(strategy)), Classifier(), "fit")


def test_every_strategy_of_lightning_is_refused_or_single_device_or_ddp():
    """Whoever comes new is refused until somebody has looked."""
    accepted = set()
    concrete = [name for name in strategies.__all__ if not inspect.isabstract(getattr(strategies, name))]
    for name in concrete:
        with contextlib.suppress(MisconfigurationException):
            kfac().setup(with_strategy(blank(getattr(strategies, name))), Classifier(), "fit")
            accepted.add(name)
    assert accepted == {"DDPStrategy", "SingleDeviceStrategy"}


def test_ddp_subclasses_and_classes_of_the_same_name_are_accepted():
    class Custom(DDPStrategy):
        pass

    other_package = type("DDPStrategy", (), {"__module__": "lightning.pytorch.strategies.ddp"})
    for strategy in (Custom(), blank(SingleDeviceStrategy), blank(other_package)):
        kfac().setup(with_strategy(strategy), Classifier(), "fit")
    kfac().setup(with_strategy(blank(FSDPStrategy)), Classifier(), "validate")  # only a fit needs gradients


@pytest.mark.parametrize(
    "options",
    [
        {"ddp_comm_state": PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=1)},
        {"model_averaging_period": 4},
    ],
)
def test_post_local_sgd(options):
    with pytest.raises(MisconfigurationException, match="leave out ddp_comm_state and model_averaging_period"):
        kfac().setup(with_strategy(DDPStrategy(**options)), Classifier(), "fit")


def test_a_static_graph_with_accumulation_gets_a_hint():
    strategy = DDPStrategy(static_graph=True)
    with pytest.warns(UserWarning, match="static_graph=True.*with or without KFAC"):
        kfac().setup(with_strategy(strategy, accumulate_grad_batches=2), Classifier(), "fit")


def test_half_precision_parameters():
    with pytest.raises(MisconfigurationException, match=r"16-true.*'16-mixed'"):
        fit(Classifier(), [kfac()], precision="16-true")


# -- optimizers -------------------------------------------------------------------------------------------------------


class With(Classifier):
    """With the optimizers that ``build`` makes of the parameters."""

    def __init__(self, build):
        super().__init__()
        self.build = build

    def configure_optimizers(self):
        return self.build(list(self.parameters()))


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        return super().step(closure)


def two(parameters):
    return [torch.optim.SGD(parameters[:2], lr=0.1), torch.optim.SGD(parameters[2:], lr=0.1)]


class ManualWithTwo(Manual):
    def configure_optimizers(self):
        return two(list(self.parameters()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: With(torch.optim.LBFGS), "LBFGS.*use torch.optim.SGD"),
        (lambda: With(lambda parameters: Twice(parameters, lr=0.1)), "Twice evaluates its closure several times"),
        (lambda: With(lambda parameters: None), "returned 0: return one"),
        (ManualWithTwo, "returned 2: return one"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned `None`")
def test_optimizers(model, message):
    model = model()
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, [kfac()])
    assert hooks(model) == 0


def test_a_fused_optimizer_with_a_gradient_scaler():
    def fused(parameters):
        return torch.optim.SGD(parameters, lr=0.1, fused=True)

    with pytest.raises(MisconfigurationException, match=r"SGD\(fused=True\).*leave out fused=True"):
        fit(With(fused), [kfac()], plugins=[MixedPrecision("16-mixed", "cpu")])
    fit(With(fused), [kfac()], precision="bf16-mixed")


def test_a_manual_backward_that_lightning_does_not_see():
    class Unseen(Manual):
        def manual_backward(self, loss):
            loss.backward()

    with pytest.raises(MisconfigurationException, match=r"self\.manual_backward"):
        fit(Unseen(), [kfac()])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_that_rescales_components_warns(optimizer):
    with pytest.warns(UserWarning, match=f"{optimizer.__name__} rescales .*use torch.optim.SGD"):
        fit(With(optimizer), [kfac()], max_steps=1)


def test_weight_decay_is_explained_and_is_not_preconditioned():
    def decaying(parameters):
        return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5)

    plain, decayed = Classifier(), With(decaying)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    fit(plain, [kfac()], max_steps=1)
    with pytest.warns(UserWarning, match=r"SGD\(weight_decay=0.5\) adds weight_decay \* parameter to the DIRECTION"):
        fit(decayed, [kfac()], max_steps=1)
    shrunk = {name: p.detach() - 0.1 * 0.5 * before[name] for name, p in plain.named_parameters()}
    torch.testing.assert_close(dict(decayed.named_parameters()), shrunk, rtol=1e-6, atol=1e-7)


# -- launchers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    return monkeypatch


MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_processes_that_the_trainer_does_not_connect(clean_environment):
    for name, value in MPIRUN.items():
        clean_environment.setenv(name, value)
    message = r"openmpi started 4 processes.*Trainer\(devices=2, num_nodes=2.*backend=\"single\""
    with pytest.raises(MisconfigurationException, match=message):
        fit(Classifier(), [kfac()])
    fit(Classifier(), [kfac(distribution=DistributionConfig(backend="single"))])
    kfac().setup(with_strategy(DDPStrategy(), world_size=4), Classifier(), "fit")


def test_variables_that_contradict_one_another(clean_environment):
    clean_environment.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(MisconfigurationException, match="OMPI_COMM_WORLD_SIZE is missing"):
        fit(Classifier(), [kfac()])


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "unknown likelihood 'poisson'; known: bernoulli, categorical, gaussian"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": None}, "damping=None"),
        ({"factor_decay": 1.5}, "factor_decay=1.5"),
        ({"factor_every_n_steps": 0}, "factor_every_n_steps=0"),
        ({"fisher_samples": 0}, "fisher_samples=0"),
        ({"kl_clip": -1.0}, "kl_clip=-1.0"),
        ({"loss_reduction": "max"}, "loss_reduction='max'"),
        ({"skip_layers": ["("]}, "skip_layers"),
        ({"distribution": "ring"}, "distribution='ring'"),
        ({"distribution": 1.5}, "distribution=1.5"),
        ({"distribution": {"strategies": "mem_opt"}}, "no 'strategies'; it has strategy,"),
        ({"clip_raw_gradients": 0.0}, "clip_raw_gradients=0.0"),
        ({"log_every_n_steps": -1}, "log_every_n_steps=-1"),
        ({"output_module": nn.Linear(1, 1)}, r"output_module=Linear\(..\) must be a name"),
    ],
)
def test_options_out_of_their_bounds_are_refused_at_once(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        KFAC(**{"likelihood": "categorical"} | options)


def test_missing_batch_keys():
    with pytest.raises(MisconfigurationException, match=r"mask_key='valid' is not in the batch"):
        fit(Classifier(), [kfac(mask_key="valid")])
    with pytest.raises(MisconfigurationException, match=r"sample_ids_key=7 is not in the batch"):
        fit(Classifier(), [kfac(sample_ids_key=7)])


# -- models -----------------------------------------------------------------------------------------------------------


class Pair(Classifier):
    def forward(self, x):
        return {"logits": super().forward(x)}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])["logits"], batch[1])


class Direct(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.last(self.hidden(batch[0])), batch[1])


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize(("model", "what"), [(Pair, "returned dict"), (Direct, "was not called")])
def test_where_the_logits_are_not_found_the_modules_are_named(model, what, likelihood):
    with pytest.raises(MisconfigurationException, match=f"{what}.*set output_module to one of .*last"):
        fit(model(), [kfac(likelihood=likelihood)])
    fit(model(), [kfac(likelihood=likelihood, output_module="last")])


def test_an_output_module_that_does_not_exist():
    with pytest.raises(MisconfigurationException, match="'head' is no module of the model; there are: first"):
        fit(Classifier(), [kfac(output_module="head")])


def test_probabilities_instead_of_logits():
    class Softmax(Classifier):
        def forward(self, x):
            return super().forward(x).softmax(1)

    with pytest.raises(MisconfigurationException, match="wants logits"):
        fit(Softmax(), [kfac()])


def test_a_model_without_layers_for_kfac():
    with pytest.raises(MisconfigurationException, match="no layer that K-FAC can treat"):
        fit(Classifier(), [kfac(skip_layers=["Linear"])])


class Recomputed(Classifier):
    """The last layer is recomputed the reentrant way, and the first one lies before it."""

    def forward(self, x):
        return checkpoint(self.last, self.hidden(x), use_reentrant=True)


def test_reentrant_checkpointing():
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fit(Recomputed(), [kfac()])
    with pytest.warns(UserWarning, match="keep their plain gradient: first; .* use use_reentrant=False"):
        fit(Classifier(recompute="reentrant"), [kfac()])
