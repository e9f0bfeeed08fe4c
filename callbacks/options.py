"""The callback's options as they come from code or YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from kfac_dist.coarse import coarse_spaces
from kfac_dist.comm import communicators
from kfac_dist.config import CoarseConfig, DistributionConfig, KFACConfig, check_number
from kfac_dist.likelihoods import likelihoods


def method_of(options: Mapping[str, Any]) -> KFACConfig:
    """The method's configuration among the callback's options.

    Raises:
        ValueError: a value is out of its bounds.
    """
    known = {field.name for field in fields(KFACConfig)}
    likelihood = options["likelihood"] or "empirical"
    return KFACConfig(**{name: value for name, value in options.items() if name in known} | {"likelihood": likelihood})


def check_options(options: Mapping[str, Any], clip_raw_gradients: float | None, log_every_n_steps: int | None) -> None:
    """Raise ValueError for a value that is out of its bounds, before there is a model."""
    method = method_of(options)
    if method.likelihood != "empirical":
        likelihoods[method.likelihood]
    if not isinstance(options["output_module"], (str, type(None))):
        raise ValueError(
            f"output_module={type(options['output_module']).__name__}(..) must be a name: what model.named_modules() "
            "calls the module"
        )
    if clip_raw_gradients is not None:
        if method.preconditioning == "samples":
            raise ValueError(
                f"clip_raw_gradients={clip_raw_gradients!r} clips gradients, and "
                'preconditioning="samples" forms none: use kl_clip, the Trainer\'s gradient_clip_val, which acts on '
                'the directions, or preconditioning="gradients"'
            )
        check_number("clip_raw_gradients", clip_raw_gradients, 0.0, open_low=True)
    if log_every_n_steps is not None:
        check_number("log_every_n_steps", log_every_n_steps, 0)


def parse_distribution(value: str | float | DistributionConfig | Mapping[str, Any]) -> DistributionConfig:
    """A strategy's name, a gradient-worker fraction, a configuration or its keywords.

    Raises:
        ValueError: an unknown name or keyword, or a value out of its bounds.
    """
    if not isinstance(value, Mapping):
        return _with_known_backends(DistributionConfig.parse(value))
    known = [field.name for field in fields(DistributionConfig)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"distribution has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    return _with_known_backends(DistributionConfig(**value))


def _with_known_backends(config: DistributionConfig) -> DistributionConfig:
    """The configuration, refused where it names a backend that nobody has registered."""
    for name in {config.backend, config.coarse_backend} - {"auto", None}:
        communicators[name]  # type: ignore[index]
    return config


def parse_coarse(value: str | CoarseConfig | Mapping[str, Any] | None) -> CoarseConfig | None:
    """None, the name of a coarse space, a configuration or its keywords.

    Raises:
        ValueError: an unknown name or keyword, or a value out of its bounds.
    """
    if isinstance(value, Mapping):
        known = [field.name for field in fields(CoarseConfig)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"coarse has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
        value = CoarseConfig(**value)
    config = CoarseConfig.parse(value)
    if config is not None:
        coarse_spaces[config.space](config)
    return config


def exactly(name: str) -> str:
    """The regular expression that matches the module ``name`` and nothing else."""
    return rf"\A{re.escape(name)}\Z"


def entry(batch: Any, option: str, key: str | int | None) -> Any:
    """What ``batch`` holds under ``key``: an item of a mapping or sequence, else an attribute; None for key None.

    Raises:
        MisconfigurationException: there is no such thing.
    """
    if key is None:
        return None
    try:
        named = isinstance(key, str) and not isinstance(batch, Mapping)
        return getattr(batch, str(key)) if named else batch[key]
    except (KeyError, IndexError, TypeError, AttributeError):
        held = f"keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise MisconfigurationException(f"{option}={key!r} is not in the batch, which is or has {held}") from None
