"""Saving and loading a preconditioner: plain tensors and numbers, no collective, any world size."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from kfac_dist.one_level import OneLevel
from kfac_dist.state import STATE_VERSION, LayerState, layer_state_from_dict
from kfac_dist.two_level import TwoLevel


def save(step: int, one_level: OneLevel, two_level: TwoLevel | None) -> dict[str, Any]:
    """The state, equal on every rank; it can be loaded with ``weights_only=True``."""
    values = {field.name: getattr(one_level.config, field.name) for field in dataclasses.fields(one_level.config)}
    return {
        "version": STATE_VERSION,
        "step": step,
        "loss_scale": one_level.loss_scale,
        "counts": dict(one_level.counts),
        "config": {name: _plain(value) for name, value in values.items()},
        "layers": {name: state.to_dict() for name, state in one_level.states.items()},
        "coarse": None if two_level is None else two_level.state_dict(),
    }


def _plain(value: object) -> int | float | str:
    """A number or a text; without the memory address of a schedule, which is another one on every rank."""
    return value if type(value) in (int, float, str) else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # type: ignore[return-value]


def load(state: Mapping[str, Any], one_level: OneLevel, two_level: TwoLevel | None) -> int:
    """Take over a saved state and return its step; inverses are rebuilt at the next step.

    Raises:
        ValueError: another version, other layers or other shapes, or a damaged part; nothing is taken over then.
    """
    version = state.get("version")
    if version != STATE_VERSION:
        raise ValueError(f"K-FAC state of version {version!r}; this release reads version {STATE_VERSION}")
    missing = {"step", "loss_scale", "counts", "layers"} - set(state)
    if missing:
        raise ValueError(f"K-FAC state without {', '.join(sorted(missing))}: the checkpoint is damaged")
    try:
        saved, mine = set(state["layers"]), set(one_level.states)
        step, loss_scale = int(state["step"]), float(state["loss_scale"])
        counts = {key: int(value) for key, value in state["counts"].items() if key in one_level.counts}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the K-FAC state is damaged: {error}") from error
    if saved != mine:
        raise ValueError(
            f"K-FAC state of other layers: only in the checkpoint {sorted(saved - mine)}, only in the model "
            f"{sorted(mine - saved)}; load it into the model it was saved from, with the same skip_layers"
        )
    states: dict[str, LayerState] = {}
    for layer in one_level.layers:
        shapes = one_level.factor_shapes(layer)
        part = state["layers"][layer.name]
        states[layer.name] = layer_state_from_dict(layer.name, part, shapes, one_level.dtype, one_level.device)
    coarse = state.get("coarse")
    if two_level is not None:
        like = torch.zeros((), dtype=one_level.dtype, device=one_level.device)
        two_level.load_state_dict(coarse, {layer.name: layer.shape for layer in one_level.layers}, like)
    one_level.states = states
    one_level.loss_scale = loss_scale
    one_level.counts |= counts
    one_level.rebuild = any(part.inverted is not None for part in states.values())
    return step
