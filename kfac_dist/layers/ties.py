"""Weights that several modules share: one layer, with the calls of all of them as its locations.

An output layer whose weight is the table of an embedding (GPT) is such a layer too. Its block is the sum of two
products and of what lies between them: of the output use, with the gradients of the logits on the side of the tokens,
and of the table's use, with the counts of the tokens there and gradients on the other side. Pooled as locations of one
layer they make one product G (x) A, of which G is DIAGONAL, whatever its order.

Errors of the directions in the norm of the damped dense block, in lengths of the exact one, measured on Transformers of
12 to 24 symbols from the start to the end of training, with a damping of a tenth of the block's mean eigenvalue: pooled
0.6 to 2.7; the sum of both products, inverted exactly, 0.6 to 4.1; the output use alone 1.5 to 13, and worse still with
a dense G (up to 475 for a thousandth of it), since nothing damps what the table's use adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kfac_dist.config import LayerOptions
from kfac_dist.layers.base import Layer, claims_of, family_of

Named = tuple[str, nn.Module]


@dataclass(frozen=True)
class Tie:
    """What becomes of the modules that share a weight.

    Attributes:
        members: the modules.
        layer: their layer; None where there is none for them.
        own_biases: the modules whose bias no layer covers, because not all of them have the same.
    """

    members: Sequence[Named]
    layer: Layer | None
    own_biases: Sequence[str] = ()

    def reason(self, name: str) -> str:
        """Why the module ``name`` is left alone, or its bias."""
        others = ", ".join(repr(other) for other, _ in self.members if other != name) or "itself"
        if name in self.own_biases:
            return f"only its bias: the weight is shared with {others}, the bias is not"
        return f"it shares a parameter with {others} in a way that no layer covers"


def find_ties(modules: Sequence[Named], options: LayerOptions) -> Mapping[nn.Module, Tie]:
    """Module -> its tie, for those that share a trainable parameter with others."""
    users: dict[int, list[tuple[Named, str]]] = {}
    claims = {module: claims_of(module) for _, module in modules}
    claimed = {child for children in claims.values() for child in children}
    for name, module in modules:
        if module in claimed:
            continue
        own = list(module._parameters.items())
        own += [(f"its {key}", p) for child in claims[module] for key, p in child._parameters.items()]
        for key, parameter in own:
            if parameter is not None and parameter.requires_grad:
                users.setdefault(id(parameter), []).append(((name, module), key))
    groups: list[tuple[list[Named], list[list[str]]]] = []  # modules that hang together, and how they share what
    for uses in users.values():
        if len(uses) > 1:
            members, keys = [member for member, _ in uses], [[key for _, key in uses]]
            for group in [group for group in groups if any(member in group[0] for member in members)]:
                groups.remove(group)
                members, keys = group[0] + members, group[1] + keys
            groups.append((list(dict.fromkeys(members)), keys))
    ties = [_tie(members, keys, options) for members, keys in groups]
    return {module: tie for tie in ties for _, module in tie.members}


def _tie(members: Sequence[Named], keys: Sequence[Sequence[str]], options: LayerOptions) -> Tie:
    weights = [each for each in keys if "weight" in each]
    biases = [each for each in keys if "weight" not in each]
    whole = weights == [["weight"] * len(members)] and all(set(each) == {"bias"} for each in biases)
    if not whole or any(options.skips(name, type(module).__name__) for name, module in members):
        return Tie(members, None)
    for name, module in members:
        tie = _owned(name, module, members, options)
        if tie is not None:
            return tie
    return Tie(members, None)


def _owned(name: str, module: nn.Module, members: Sequence[Named], options: LayerOptions) -> Tie | None:
    """The tie as one layer of ``module``, where that family takes the calls of all the others."""
    family = family_of(module)[0]
    found = [] if family is None else list(family.adapt(name, module, options))
    if family is None or len(found) != 1 or found[0].joint:
        return None
    owner = found[0]
    alike = [(other, m) for other, m in members if family_of(m)[0] is family]
    biases = {other: m._parameters.get("bias") for other, m in alike}
    own = [other for other, bias in biases.items() if bias is not None and bias.requires_grad]
    if len({id(bias) for bias in biases.values()}) == 1:
        own = []
    else:
        owner.leave_bias()
    for _, other in members:
        other_family = family_of(other)[0]
        if other is not module:
            use = None if other_family is None else other_family.use_of(owner, other)
            if use is None:
                return None
            owner.uses = (*owner.uses, use)
    return Tie(members, owner, own)
