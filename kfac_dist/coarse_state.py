"""Reading the coarse level's part of a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def saved_momentum(
    saved: Mapping[str, Tensor] | None, shapes: Mapping[str, tuple[int, ...]], like: Tensor
) -> dict[str, Tensor] | None:
    """The saved momentum, in the type and on the device of ``like``; ValueError where it does not fit the layers."""
    for name, delta in (saved or {}).items():
        if name not in shapes or tuple(delta.shape) != shapes[name]:
            raise ValueError(
                f"the momentum of layer {name!r} has shape {tuple(delta.shape)}, this model wants {shapes.get(name)}; "
                "load it into the model it was saved from"
            )
        if not bool(torch.isfinite(delta).all()):
            raise ValueError(f"the momentum of layer {name!r} is not finite")
    return None if saved is None else {name: delta.to(like, copy=True) for name, delta in saved.items()}


def saved_coefficients(
    saved: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> tuple[list[str], Tensor] | None:
    """The saved coefficients of the last solve, with the names of their layers; ValueError where they are others."""
    if saved is None:
        return None
    names, coefficients = list(saved["layers"]), saved["coefficients"]
    if not set(names) <= set(shapes) or not bool(torch.isfinite(coefficients).all()):
        raise ValueError(f"coefficients of the layers {names}, not all finite or not all in this model")
    return names, coefficients.to(device=device, copy=True)
