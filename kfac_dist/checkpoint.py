"""Saving and loading a preconditioner: plain tensors and numbers, no collective, any world size."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from kfac_dist.config import check_number
from kfac_dist.one_level import OneLevel
from kfac_dist.state import STATE_VERSION, LayerState, layer_state_from_dict
from kfac_dist.two_level import TwoLevel

SHAPING = ("factor_sides", "max_factor_dim", "large_factors", "norm_blocks", "uncovered")
"""The settings on which the layers and the shapes of their factors depend, beside ``skip_layers``."""


def save(step: int, one_level: OneLevel, two_level: TwoLevel | None) -> dict[str, Any]:
    """The state as it is now, for :func:`written`: it stays what it is, and costs nothing to take."""
    return {
        "version": STATE_VERSION,
        "step": step,
        "loss_scale": one_level.loss_scale,
        "counts": dict(one_level.counts),
        "damping": one_level.damping.state_dict(),
        "config": _settings(one_level, two_level),
        "layers": {name: dataclasses.replace(state) for name, state in one_level.states.items()},
        "coarse": None if two_level is None else two_level.state_dict(),
    }


def written(state: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`save` took, equal on every rank, as plain tensors that can be loaded with ``weights_only=True``."""
    return {**state, "layers": {name: layer.to_dict() for name, layer in state["layers"].items()}}


def _settings(one_level: OneLevel, two_level: TwoLevel | None) -> dict[str, int | float | str]:
    """Every setting of the method, by name; those of a coarse level begin with "coarse ".

    Without ``skip_layers``: the layers themselves are compared.
    """
    values: dict[str, object] = {"coarse space": None}
    for field in dataclasses.fields(one_level.config):
        if field.name != "skip_layers":
            values[field.name] = getattr(one_level.config, field.name)
    if two_level is not None:
        for field in dataclasses.fields(two_level.config):
            values[f"coarse {field.name}"] = getattr(two_level.config, field.name)
    return {name: _plain(value) for name, value in values.items()}


def changed_settings(
    state: Mapping[str, Any], one_level: OneLevel, two_level: TwoLevel | None
) -> dict[str, tuple[object, object]]:
    """Setting -> (value in the saved state, value now), where both levels have it and the values differ."""
    now = _settings(one_level, two_level)
    return {name: (then, now[name]) for name, then in state["config"].items() if name in now and then != now[name]}


def _cure(state: Mapping[str, Any], one_level: OneLevel, two_level: TwoLevel | None) -> str:
    """What to do where other layers or other shapes were saved, with the settings that may have made them so."""
    changed = changed_settings(state, one_level, two_level)
    differ = {name: changed[name] for name in SHAPING if name in changed}
    named = [f"{name}, which was {then!r} and is {now!r}" for name, (then, now) in differ.items()]
    return f"load it into the model it was saved from, with the same {'; '.join([*named, 'skip_layers'])}"


def _plain(value: object) -> int | float | str:
    """A number or a text; without the memory address of a schedule, which is another one on every rank."""
    return value if type(value) in (int, float, str) else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # type: ignore[return-value]


def load(state: Mapping[str, Any], one_level: OneLevel, two_level: TwoLevel | None) -> int:
    """Take over a saved state and return its step; inverses are rebuilt at the next step.

    Raises:
        ValueError: another version, other layers or other shapes, or a damaged part; nothing is taken over then.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise ValueError(f"this {type(state).__name__} is no K-FAC state: pass what state_dict() of K-FAC gave")
    if state["version"] != STATE_VERSION:
        raise ValueError(
            f"K-FAC state of version {state['version']!r}; this release reads version {STATE_VERSION}: go on with the "
            "release that wrote it, or without its K-FAC state"
        )
    missing = {"step", "loss_scale", "counts", "config", "layers", "coarse"} - set(state)
    if missing:
        raise ValueError(f"K-FAC state without {', '.join(sorted(missing))}: the checkpoint is damaged")
    try:
        saved, mine = set(state["layers"]), set(one_level.states)
        step = int(state["step"])
        counts = {key: int(value) for key, value in state["counts"].items() if key in one_level.counts}
        loss_scale, coarse = float(state["loss_scale"]), state["coarse"]
        check_number("loss_scale", loss_scale, 0.0, open_low=True)
        if step < 0 or not all(isinstance(part, Mapping) for part in (state["config"], coarse or {})):
            raise ValueError(f"step={step}, config and coarse level of types {type(state['config'])}, {type(coarse)}")
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the K-FAC state is damaged: {error}") from error
    cure = _cure(state, one_level, two_level)
    if saved != mine:
        raise ValueError(
            f"K-FAC state of other layers: only in the checkpoint {sorted(saved - mine)}, only in the model "
            f"{sorted(mine - saved)}; {cure}"
        )
    states: dict[str, LayerState] = {}
    for layer in one_level.layers:
        shapes = one_level.factor_shapes(layer)
        part = state["layers"][layer.name]
        states[layer.name] = layer_state_from_dict(layer.name, part, shapes, one_level.dtype, one_level.device, cure)
    damping = one_level.damping.read(state.get("damping"))
    if two_level is not None:
        like = torch.zeros((), dtype=one_level.dtype, device=one_level.device)
        two_level.load_state_dict(coarse, {layer.name: layer.shape for layer in one_level.layers}, like)
    # From here on nothing can fail.
    one_level.damping.take(damping)
    one_level.states = states
    one_level.loss_scale = loss_scale
    one_level.counts |= counts
    one_level.rebuild = any(part.inverted is not None for part in states.values())
    return step
