"""What the user is told once: modules that K-FAC leaves alone, and settings that fall back to something."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from kfac_dist.layers import FoundLayers, Layer


class Notices:
    """Warnings that are given once, on rank 0."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._given: set[str] = set()

    def first(self, key: str) -> bool:
        """Whether this is the first time that ``key`` comes up."""
        if key in self._given:
            return False
        self._given.add(key)
        return True

    def once(self, key: str, message: str) -> None:
        """Warn, the first time."""
        if self.first(key) and self._rank == 0:
            warnings.warn(message, stacklevel=4)

    def found(self, found: FoundLayers) -> None:
        """Name the modules that no layer type treats, with the reasons, and the factors that were cut down."""
        if found.refused:
            named = "; ".join(f"{name or '(the model)'} ({reason})" for name, reason in found.refused.items())
            self.once("refused", f"these modules keep their plain gradient: {named}")
        if found.reduced:
            named = "; ".join(f"{name} ({what})" for name, what in found.reduced.items())
            self.once("reduced", f"factors larger than max_factor_dim: {named}")

    def silent(self, silent: Sequence[Layer], recomputed: Collection[str]) -> None:
        """Name the layers that were not recorded in the first curvature batch."""
        troubled = [f"{layer.name} ({layer.trouble})" for layer in silent if layer.trouble is not None]
        if troubled:
            self.once("trouble", f"these layers keep their plain gradient: {'; '.join(troubled)}")
        names = [layer.name for layer in silent if layer.trouble is None]
        if not names:
            return
        if any(name in recomputed for name in names):
            cause = "they were only seen while a checkpointed forward was recomputed: use use_reentrant=False"
        else:
            cause = (
                "their hooks did not fire on the way to the logits (unused, called without __call__, or compiled "
                "before K-FAC was built)"
            )
        self.once("silent", f"these layers keep their plain gradient: {', '.join(names)}; {cause}")

    def resumed(self, changed: Mapping[str, tuple[object, object]]) -> None:
        """Name the settings that differ from those of the checkpoint."""
        if changed:
            named = "; ".join(f"{name} was {then!r} and is {now!r}" for name, (then, now) in sorted(changed.items()))
            message = f"resumed with other settings than those of the checkpoint, which count from now on: {named}"
            self.once(message, message)


def check_layers(model: nn.Module, found: FoundLayers) -> None:
    """Raise ValueError where there is nothing to precondition, or where it lies on several devices."""
    if not found.layers:
        reasons = (
            "; ".join(f"{name or '(the model)'}: {reason}" for name, reason in found.refused.items())
            or "it trains no such module"
        )
        raise ValueError(f"{type(model).__name__} has no layer that K-FAC can treat ({reasons}); check skip_layers")
    devices = {str(layer.device) for layer in found.layers}
    if len(devices) > 1:
        raise ValueError(f"the layers lie on several devices ({', '.join(sorted(devices))}); put the model on one")
