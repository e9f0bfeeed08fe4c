"""Layer families: one file each, registered by its import here. A new family is one new file and one line below."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

from kfac_dist.compat import clean_name, is_uninitialized
from kfac_dist.layers import conv2d, linear  # noqa: F401 - imported for their registration
from kfac_dist.layers.base import Layer, layers

__all__ = ["Layer", "find_layers", "layers"]


def find_layers(model: nn.Module, skip: Sequence[str] = ()) -> tuple[list[Layer], dict[str, str]]:
    """The layers of ``model`` that can be preconditioned, in the order of ``named_modules``.

    Args:
        model: the plain model, without DDP.
        skip: regular expressions, searched in module names and class names: what they find is left alone.

    Returns:
        The layers, and name -> reason for every module that trains parameters of its own but keeps its plain gradient
        (skipped ones do not count: the user knows of them).

    Raises:
        ValueError: a lazy module has not seen its first batch.
    """
    owners = Counter(id(p) for _, m in model.named_modules() for p in m._parameters.values() if p is not None)
    found: list[Layer] = []
    refused: dict[str, str] = {}
    for raw_name, module in model.named_modules():
        name = clean_name(raw_name)
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(is_uninitialized(parameter) for parameter in own):
            raise ValueError(f"module {name!r} is lazy: run one forward pass before K-FAC is built")
        if not any(parameter.requires_grad for parameter in own):
            continue
        if any(re.search(pattern, text) for pattern in skip for text in (name, type(module).__name__)):
            continue
        if any(owners[id(parameter)] > 1 for parameter in own):
            refused[name] = "it shares a parameter with another module"
            continue
        reasons = [(cls, cls.refusal(module)) for cls in (layers[key] for key in layers)]
        adapter = next((cls for cls, reason in reasons if reason is None), None)
        if adapter is not None:
            found.append(adapter(name, module))
        else:
            specific = next((reason for _, reason in reasons if reason), "")
            refused[name] = specific or f"no layer type is registered for {type(module).__name__}"
    return found, refused
