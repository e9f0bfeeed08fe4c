"""The methods of the study: each one's optimizer, what is searched for it, and where its documented settings are.

A method is a declaration. ``METHODS`` holds them by name, in the order of the tables; ``two_level(space, correction)``
makes any pair of a coarse space and a correction into one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW

from kfac_dist import KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from kfac_dist.coarse.base import StepSpace
from kfac_dist.config import CoarseConfig
from kfac_dist.study.muon import FullPrecisionMuon
from kfac_dist.study.natural_gradient import build_natural_gradient
from kfac_dist.study.rivals import KFAC_PYTORCH, import_kfac_pytorch
from kfac_dist.study.search import Range
from kfac_dist.study.stepper import Stepper

Settings = Mapping[str, Any]
Builder = Callable[[nn.Module, Mapping[str, Any], Settings, int], Stepper]
"""(model, the problem's K-FAC keywords, settings, seed) -> what makes the training steps."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        title: for tables.
        build: makes its optimizer.
        space: what is searched; the defaults are the first trial.
        fixed: the other settings.
        cost: what a step costs, updates included, in steps of SGD on the MNIST autoencoder with one thread; only the
            estimate of a plan's time is made of it.
        ours: whether it is this package's.
        one_level: for two levels, the method without the coarse level.
        dense_only: whether it is for problems that are ``dense`` only.
        missing: why it cannot run here, or None.
    """

    title: str
    build: Builder
    space: Mapping[str, Range]
    fixed: Settings = field(default_factory=dict)
    cost: float = 1.0
    ours: bool = False
    one_level: str | None = None
    dense_only: bool = False
    missing: Callable[[], str | None] = lambda: None


# -- what is compared with ---------------------------------------------------------------------------------------------


def build_muon(model: nn.Module, kfac: Settings, settings: Settings, seed: int) -> Stepper:
    """Muon for matrices, AdamW for the rest; convolutions have four dimensions and go to AdamW, too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = AdamW([p for p in trained if p.ndim != 2], lr=settings["rest_lr"])
    matrices = {name: value for name, value in settings.items() if name != "rest_lr"}
    return Stepper([FullPrecisionMuon([p for p in trained if p.ndim == 2], **matrices), rest])


def build_adam(model: nn.Module, kfac: Settings, settings: Settings, seed: int) -> Stepper:
    """Adam."""
    return Stepper([Adam(model.parameters(), lr=settings["lr"], betas=(0.9, settings["beta2"]))])


def build_soap(model: nn.Module, kfac: Settings, settings: Settings, seed: int) -> Stepper:
    """SOAP of ``pytorch_optimizer``."""
    from pytorch_optimizer import SOAP  # noqa: PLC0415  optional: the extra "study"

    rest = {name: value for name, value in settings.items() if name != "beta1"}
    return Stepper([SOAP(model.parameters(), betas=(settings["beta1"], 0.95), **rest)])


def build_shampoo(model: nn.Module, kfac: Settings, settings: Settings, seed: int) -> Stepper:
    """Distributed Shampoo in the form that ``pytorch_optimizer`` calls ScalableShampoo."""
    from pytorch_optimizer import ScalableShampoo  # noqa: PLC0415  optional: the extra "study"

    rest = {name: value for name, value in settings.items() if name != "beta1"}
    return Stepper([ScalableShampoo(model.parameters(), betas=(settings["beta1"], 0.999), **rest)])


def build_kfac_pytorch(model: nn.Module, kfac: Settings, settings: Settings, seed: int) -> Stepper:
    """K-FAC of kfac-pytorch, under SGD with momentum."""
    keywords = dict(settings)
    optimizer = SGD(model.parameters(), lr=keywords["lr"], momentum=keywords.pop("momentum"))
    preconditioner = import_kfac_pytorch().KFACPreconditioner(model, **keywords)
    return Stepper([optimizer], precondition=lambda closure, loss: preconditioner.step())


def without(package: str, cure: str) -> Callable[[], str | None]:
    """Says that ``package`` is missing, where it is."""
    return lambda: None if importlib.util.find_spec(package) else f"needs {package}: {cure}"


# -- K-FAC -------------------------------------------------------------------------------------------------------------


def build_kfac(model: nn.Module, kfac: Settings, settings: Settings, seed: int) -> Stepper:
    """K-FAC under SGD; settings that begin with ``coarse_`` are the coarse level's, the others KFACPreconditioner's."""
    keywords = dict(settings)
    lr, momentum = keywords.pop("lr"), keywords.pop("momentum")
    uncovered_lr = keywords.pop("uncovered_lr", None)
    names = [name for name in keywords if name.startswith("coarse_")]
    coarse = {name.removeprefix("coarse_"): keywords.pop(name) for name in names}
    preconditioner = KFACPreconditioner(
        model, coarse=CoarseConfig(**coarse) if coarse else None, seed=seed, **kfac, **keywords
    )
    if uncovered_lr is None:
        optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
    else:
        optimizer = SGD(preconditioner.parameter_groups(lr, uncovered_lr, uncovered_momentum=0.9))
    return Stepper(
        [optimizer],
        accumulate=preconditioner.accumulate,
        # The problems' models draw no random numbers: the loss that was trained on is the closure's.
        precondition=lambda closure, loss: preconditioner.step(lr=optimizer, closure=closure, loss=loss),
        preconditioner=preconditioner,
    )


INTERVALS = {"factor_every_n_steps": 10, "inverse_every_n_steps": 10}
MOMENTUM = {"momentum": 0.9}
# lr and kl_clip as in the README's examples, damping KFACPreconditioner's own default.
ONE_LEVEL = {"lr": Range(0.1, 0.01, 0.3), "damping": Range(0.01, 0.003, 0.3), "kl_clip": Range(0.01, 0.003, 0.3)}
# The coarse level chooses the steps: lr = 1, no momentum, and a clip that only catches failures.
CHOSEN = {"damping": Range(0.01, 0.001, 0.1), "kl_clip": Range(3.0, 0.3, 30.0)}
RATE_FREE = {"lr": 1.0, "momentum": 0.0, "uncovered_lr": 0.01, "coarse_damping": "adaptive"}


def one_level(title: str, cost: float, **fixed: Any) -> Method:
    """One-level K-FAC with fixed keywords, by the cheapest route where a batch is small (exact to rounding)."""
    settings = INTERVALS | MOMENTUM | {"preconditioning": "samples"} | fixed
    return Method(title=title, build=build_kfac, space=ONE_LEVEL, fixed=settings, cost=cost, ours=True)


def two_level(
    space: str,
    correction: str | None = None,
    *,
    title: str | None = None,
    one_level: str = "kfac",
    cost: float = 5.0,
    search: Mapping[str, Range] | None = None,
    tuned: bool = True,
    **fixed: Any,
) -> Method:
    """Two-level K-FAC with any coarse space and correction.

    Spaces that hold the one-level direction choose the step (lr = 1, adaptive coarse damping); the others correct a
    direction whose step is SGD's.

    Args:
        space: the coarse space.
        correction: None: the space's own default.
        title: for tables.
        one_level: the method without the coarse level.
        cost: see :class:`Method`.
        search: further hyper-parameters, or other ranges.
        tuned: False: nothing is searched, the defaults of what would be are fixed.
        **fixed: further settings.
    """
    chooses = issubclass(coarse_spaces[space], StepSpace)
    settings = INTERVALS | (RATE_FREE if chooses else MOMENTUM) | {"coarse_space": space} | fixed
    if correction is not None:
        settings["coarse_correction"] = correction
    searched = (CHOSEN if chooses else ONE_LEVEL) | dict(search or {})
    if not tuned:
        settings = {name: entry.default for name, entry in searched.items()} | settings
        searched = {}
    return Method(
        title=title or f"two-level K-FAC, {space}" + (f", {correction}" if correction else ""),
        build=build_kfac,
        space=searched,
        fixed={name: value for name, value in settings.items() if name not in searched},
        cost=cost,
        ours=True,
        one_level=one_level,
    )


# -- all of them -------------------------------------------------------------------------------------------------------

OPTIONAL = without("pytorch_optimizer", "pip install 'kfac-dist[study]'")
FIXED_COARSE = {"coarse_damping": Range(1.0, 0.1, 10.0)}

METHODS: dict[str, Method] = {
    "sgd": Method(
        title="SGD with momentum",
        build=lambda model, kfac, settings, seed: Stepper([SGD(model.parameters(), **settings)]),
        space={"lr": Range(1e-3, 3e-4, 3e-2), "momentum": Range(0.9, 0.8, 0.99, "log_to_one")},
    ),
    "adam": Method(
        title="Adam",
        build=build_adam,
        space={"lr": Range(1e-3, 1e-4, 1e-2), "beta2": Range(0.999, 0.9, 0.9999, "log_to_one")},
        cost=1.1,
    ),
    "adamw": Method(
        title="AdamW",
        build=lambda model, kfac, settings, seed: Stepper([AdamW(model.parameters(), **settings)]),
        space={"lr": Range(1e-3, 1e-4, 1e-2), "weight_decay": Range(1e-2, 1e-4, 1.0)},
        cost=1.1,
    ),
    # The defaults are those of the example in torch.optim.Muon's documentation.
    "muon": Method(
        title="Muon (float32)",
        build=build_muon,
        space={
            "lr": Range(0.02, 2e-3, 0.1),
            "momentum": Range(0.95, 0.8, 0.99, "log_to_one"),
            "rest_lr": Range(3e-4, 1e-4, 1e-2),
        },
        fixed={"weight_decay": 0.0},
        cost=11.0,
    ),
    "soap": Method(
        title="SOAP",
        build=build_soap,
        space={"lr": Range(3e-3, 5e-4, 2e-2), "beta1": Range(0.95, 0.8, 0.98, "log_to_one")},
        fixed={"precondition_frequency": 10},
        cost=10.0,
        missing=OPTIONAL,
    ),
    "shampoo": Method(
        title="Distributed Shampoo",
        build=build_shampoo,
        space={"lr": Range(1e-3, 1e-4, 1e-2), "beta1": Range(0.9, 0.8, 0.98, "log_to_one")},
        # Grafted onto RMSProp; refreshed as often as SOAP and K-FAC, from the tenth step on.
        fixed={"graft_type": 3, "preconditioning_compute_steps": 10, "start_preconditioning_step": 10},
        cost=19.0,
        missing=OPTIONAL,
    ),
    "kfac_pytorch": Method(
        title="kfac-pytorch",
        build=build_kfac_pytorch,
        space={"lr": Range(0.1, 0.01, 0.3), "damping": Range(1e-3, 1e-5, 0.1), "kl_clip": Range(1e-3, 1e-4, 0.1)},
        fixed=MOMENTUM | {"factor_update_steps": 10, "inv_update_steps": 10},
        cost=8.0,
        missing=lambda: None if KFAC_PYTORCH.given() else KFAC_PYTORCH.cure,
    ),
    "natural_gradient": Method(
        title="exact natural gradient",
        build=build_natural_gradient,
        # The F of one batch has the rank of its samples, and nothing of the batches before: more damping than K-FAC.
        space=ONE_LEVEL | {"damping": Range(0.1, 0.01, 3.0)},
        fixed=MOMENTUM,
        cost=8.0,  # in steps of the small CNN
        dense_only=True,
    ),
    "kfac": one_level("K-FAC, factored damping", cost=2.9),
    "kfac_input": one_level("K-FAC, input side only", cost=2.3, factor_sides="input"),
    "kfac_eigen": one_level("K-FAC, eigen damping", cost=6.5, damping_method="eigen"),
    "scalar": two_level("scalar"),
    "scalar_momentum": two_level("scalar_momentum"),
    "layer_step_momentum": two_level("layer_step_momentum"),
    # Nothing is searched: a user who tunes nothing gets this.
    "rate_free": two_level(
        "layer_step_momentum", title="two-level K-FAC, layer_step_momentum, nothing tuned", tuned=False
    ),
    "rate_free_adaptive": two_level(
        "layer_step_momentum",
        title="two-level K-FAC, layer_step_momentum, nothing tuned, both dampings adaptive",
        tuned=False,
        damping="adaptive",
        coarse_damping="auto",
    ),
    "rate_free_256": two_level(
        "layer_step_momentum",
        title="two-level K-FAC, layer_step_momentum, nothing tuned, 256 samples",
        tuned=False,
        coarse_max_samples=256,
    ),
    "layer_step_momentum_fixed": two_level(
        "layer_step_momentum",
        title="two-level K-FAC, layer_step_momentum, fixed coarse damping",
        search=FIXED_COARSE,
    ),
    "layer_step_momentum_input": two_level(
        "layer_step_momentum",
        title="two-level K-FAC, layer_step_momentum, input side only",
        one_level="kfac_input",
        cost=3.3,
        factor_sides="input",
    ),
}


# With one vector per layer, these are other spaces: nicolaides and layer_step.
SEVERAL: Mapping[str, Mapping[str, Any]] = {
    space: {"coarse_vectors_per_layer": 2} for space in ("krylov", "pcg", "spectral_bands")
}


def method(name: str) -> Method:
    """A method by its name, or ``<space>:<correction>`` for any pair of a coarse space and a correction.

    Raises:
        ValueError: there is none of that name.
    """
    if name in METHODS:
        return METHODS[name]
    space, colon, correction = name.partition(":")
    if colon:
        CoarseConfig(space=space, correction=correction)
        return two_level(space, correction, **SEVERAL.get(space, {}))
    raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}, or <coarse space>:<correction>")
