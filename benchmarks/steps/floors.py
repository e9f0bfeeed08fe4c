"""The arithmetic that no implementation can leave out, timed by itself on this machine, in the same rounds.

Matrices of the layers' sizes, results into memory that is there already (but for the inverses), nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.steps.problems import Problem
from benchmarks.steps.timing import Spread, Timed, Times


@dataclass(frozen=True)
class Floor:
    """A sum of parts: those of every step and those of a step with new curvature.

    Attributes:
        name: of the route.
        plain: parts of every step, beside SGD's.
        less: parts of SGD's step that are left out.
        curvature: parts of a step with new curvature.
    """

    name: str
    plain: tuple[str, ...]
    curvature: tuple[str, ...]
    less: tuple[str, ...] = ()

    @property
    def parts(self) -> set[str]:
        """Everything that has to be timed."""
        return {*self.plain, *self.curvature, *self.less}

    def ratio(self, times: Mapping[str, Times], every: int) -> Spread:
        """The floor over SGD's step, round by round."""
        sgd = times["SGD"].cycles(every)
        total = list(sgd)
        weights = {part: 1.0 for part in self.plain} | {part: -1.0 for part in self.less}
        weights |= {part: 1.0 / every for part in self.curvature}
        for part, weight in weights.items():
            total = [sum_ + weight * own for sum_, own in zip(total, times[part].cycles(every), strict=True)]
        return Spread.of([own / other for own, other in zip(total, sgd, strict=True)])


CURVATURE = ("backward of sampled targets", "moments", "Cholesky inverses")
DENSE = Floor("two dense products per layer", ("dense products",), CURVATURE)
ROWS = Floor("rank-B products beside the weight gradients", ("rank-B products",), CURVATURE)
SAMPLES = Floor("rank-B products", ("rank-B products",), CURVATURE, less=("weight gradients",))
INPUT_CURVATURE = ("input moments", "input Cholesky inverses")
INPUT_ROWS = Floor("input rank-B products beside the weight gradients", ("input rank-B products",), INPUT_CURVATURE)
INPUT_SAMPLES = Floor("input rank-B products", INPUT_ROWS.plain, INPUT_CURVATURE, less=("weight gradients",))
WITHOUT_MOMENTS = Floor("two dense products per layer, without moments", DENSE.plain, (CURVATURE[0], CURVATURE[2]))


class Piece(Timed):
    """A list of operations."""

    def __init__(self, name: str, operations: Sequence[Callable[[], object]]) -> None:
        self.name = name
        self.operations = operations

    def step(self) -> None:
        """All of them."""
        for operation in self.operations:
            operation()


class SampledBackward(Timed):
    """From the logits to the outputs of all layers, without gradients of weights."""

    name = "backward of sampled targets"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.net = problem.build()
        self.outputs: list[Tensor] = []
        for layer in layers(self.net):
            layer.register_forward_hook(lambda module, inputs, output: self.outputs.append(output))

    def begin(self) -> None:
        """A fresh forward."""
        self.outputs.clear()
        self.loss = self.problem.loss(self.net(self.problem.x), self.problem.y)

    def step(self) -> None:
        """The backward."""
        torch.autograd.grad(self.loss, self.outputs, retain_graph=True)


def layers(net: nn.Module) -> list[nn.Module]:
    """The linear maps and convolutions."""
    return [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def pieces(problem: Problem, floors: Sequence[Floor]) -> list[Timed]:
    """What the floors are made of, for the net's layers and, with one row per sample, its batch."""
    wanted = set().union(*(floor.parts for floor in floors))
    operations: dict[str, list[Callable[[], object]]] = {part: [] for part in sorted(wanted)}
    generator = torch.Generator().manual_seed(0)
    for layer in layers(problem.build()):
        g, d_in = layer.weight.flatten(1).shape
        for name, made in products(len(problem.x), d_in + (layer.bias is not None), g, generator).items():
            if name in wanted:
                operations[name].append(made)
    sampled = [SampledBackward(problem)] if SampledBackward.name in wanted else []
    return [*sampled, *(Piece(name, made) for name, made in operations.items() if made)]


def products(rows: int, a: int, g: int, generator: torch.Generator) -> dict[str, Callable[[], object]]:
    """The operations of one layer: activities (rows, a), output gradients (rows, g), weights (g, a)."""
    x, dy, W = (torch.randn(shape, generator=generator) for shape in ((rows, a), (rows, g), (g, a)))
    A, G = (s.T @ s / rows + 0.1 * torch.eye(s.shape[1]) for s in (x, dy))
    half, full, AA, GG = (torch.empty_like(matrix) for matrix in (W, W, A, G))
    xA, dyG = torch.empty_like(x), torch.empty_like(dy)

    def invert(matrix: Tensor, root: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix, out=root))

    return {
        "dense products": lambda: torch.mm(torch.mm(G, W, out=half), A, out=full),
        "weight gradients": lambda: torch.mm(dy.T, x, out=full),
        "rank-B products": lambda: torch.mm(torch.mm(dy, G, out=dyG).T, torch.mm(x, A, out=xA), out=full),
        "input rank-B products": lambda: torch.mm(dy.T, torch.mm(x, A, out=xA), out=full),
        "moments": lambda: (torch.mm(x.T, x, out=AA), torch.mm(dy.T, dy, out=GG)),
        "input moments": lambda: torch.mm(x.T, x, out=AA),
        "Cholesky inverses": lambda: (invert(A, AA), invert(G, GG)),
        "input Cholesky inverses": lambda: (invert(A, AA),),
    }
