"""Layer families: one file each, registered by its import here. A new family is one new file and one line below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kfac_dist.compat import clean_name, is_uninitialized
from kfac_dist.config import LayerOptions
from kfac_dist.layers import (  # noqa: F401 - imported for their registration
    attention,
    conv,
    conv_transpose,
    embedding,
    generic,
    linear,
    norm,
    recurrent,
)
from kfac_dist.layers.base import Layer, claims_of, family_of, layers
from kfac_dist.layers.ties import find_ties
from kfac_dist.layers.watch import Part, Record

__all__ = ["FoundLayers", "Layer", "Part", "Record", "covered_parameters", "find_layers", "layers"]


@dataclass
class FoundLayers:
    """What :func:`find_layers` found.

    Attributes:
        layers: the layers that can be preconditioned, in the order of ``named_modules``.
        refused: module -> reason, for those that train parameters of their own but keep their plain gradient.
        skipped: module -> the option that leaves it alone: no news for the user.
        reduced: layer -> what its factors fell back to, because they would be too large.
    """

    layers: list[Layer] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    reduced: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.layers, self.refused))


def find_layers(model: nn.Module, options: LayerOptions | None = None) -> FoundLayers:
    """The layers of ``model`` that can be preconditioned.

    Args:
        model: the plain model, without DDP.
        options: which modules to leave alone, and how to treat the others; None: the defaults.

    Raises:
        ValueError: a lazy module has not seen its first batch.
    """
    options = options or LayerOptions()
    modules = [(clean_name(raw_name), module) for raw_name, module in model.named_modules()]
    ties = find_ties(modules, options)
    claimed: dict[int, str] = {}
    found = FoundLayers()
    for name, module in modules:
        claims = claims_of(module)
        claimed |= {id(child): name for child in claims}
        own = [p for m in (module, *claims) for p in m._parameters.values() if p is not None]
        if any(is_uninitialized(parameter) for parameter in own):
            raise ValueError(f"module {name!r} is lazy: run one forward pass before K-FAC is built")
        if not any(parameter.requires_grad for parameter in own):
            continue
        if id(module) in claimed:
            _follow(claimed[id(module)], name, found)
            continue
        if options.skips(name, type(module).__name__):
            found.skipped[name] = "skip_layers"
            continue
        tie = ties.get(module)
        if tie is not None:
            if tie.layer is None or name in tie.own_biases:
                found.refused[name] = tie.reason(name)
            if tie.layer is not None and tie.layer.module is module:
                _take(tie.layer, options, found)
            continue
        family, reason = family_of(module, anything=options.uncovered == "diagonal")
        if family is None:
            found.refused[name] = _of_a_container(module) + reason
            continue
        for layer in family.adapt(name, module, options):
            _take(layer, options, found)
        if family.left_out(module):
            found.refused[name] = f"no layer holds its {', '.join(family.left_out(module))}"
    return found


def covered_parameters(found: Iterable[Layer]) -> list[nn.Parameter]:
    """The parameters of which the layers are made, each of them once."""
    return list({id(parameter): parameter for layer in found for parameter in layer.parameters}.values())


def _of_a_container(module: nn.Module) -> str:
    """The names of the parameters of a module whose children are treated by themselves: it is not left alone whole."""
    mine = {id(child) for child in claims_of(module)}
    if all(id(child) in mine or name == "parametrizations" for name, child in module.named_children()):
        return ""
    own = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.requires_grad]
    return f"only its own {', '.join(own)}: " if own else ""


def _follow(parent: str, name: str, found: FoundLayers) -> None:
    """A module that another one computes with is left alone where that one is."""
    for left_alone in (found.refused, found.skipped):
        if parent in left_alone and not any(layer.name == name for layer in found.layers):
            left_alone[name] = f"{parent} computes with it: {left_alone[parent]}"


def _take(layer: Layer, options: LayerOptions, found: FoundLayers) -> None:
    if options.skips(layer.name, type(layer.module).__name__):
        found.skipped[layer.name] = "skip_layers"
        return
    if layer.joint and options.factor_sides == "input":
        found.refused[layer.name] = "its block needs output gradients, and factor_sides='input' looks at inputs only"
        return
    smaller = layer.configure(options)
    if smaller is not None:
        found.reduced[layer.name] = smaller
    found.layers.append(layer)
