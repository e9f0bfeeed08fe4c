"""What K-FAC does with every module of a model: its treatment, its factors, their memory, and who owns them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from kfac_dist.assignment import Assignment, Side
from kfac_dist.coarse import coarse_spaces
from kfac_dist.compat import clean_name, unwrap
from kfac_dist.config import CoarseConfig, DistributionConfig, KFACConfig
from kfac_dist.curvature import packed_words
from kfac_dist.factors import FactorShape
from kfac_dist.layers import FoundLayers, Layer, covered_parameters, find_layers
from kfac_dist.notices import check_layers
from kfac_dist.one_level import assignment_of, factor_dtype, wants_eigenbases

SIDES: tuple[Side, ...] = ("A", "G")
COLUMNS = ("module", "class", "treatment", "parameters", "A", "G", "factors", "inverses", "owner")


@dataclass(frozen=True)
class Row:
    """One layer, or one module that is left alone.

    Attributes:
        name: of the layer: the module's, or a part's.
        kind: the module's class.
        treatment: "K-FAC", "K-FAC (reduce)", "Fisher block", or why the module is left alone.
        covered: whether its gradient is preconditioned.
        parameters: how many trainable ones.
        factors: side -> how it is stored; empty where the module is left alone.
        factor_bytes: the moving averages, on every rank.
        inverse_bytes: on the ranks that precondition the layer.
        owner: which rank inverts which factor, and which ranks precondition.
    """

    name: str
    kind: str
    treatment: str
    covered: bool
    parameters: int
    factors: Mapping[Side, FactorShape]
    factor_bytes: int = 0
    inverse_bytes: int = 0
    owner: str = ""

    def cells(self) -> list[str]:
        """The row of the table, in the order of its columns."""
        sides = [_order(self.factors[side]) if side in self.factors else "" for side in SIDES]
        sizes = [_bytes(number) if self.factors else "" for number in (self.factor_bytes, self.inverse_bytes)]
        return [self.name, self.kind, self.treatment, f"{self.parameters:,}", *sides, *sizes, self.owner]


@dataclass(frozen=True)
class Summary:
    """The rows of all modules that hold parameters; ``str`` and ``rich.print`` show it as a table.

    Attributes:
        rows: layers and modules, in the order of ``named_modules``.
        world_size: the number of ranks that the owners are of.
    """

    rows: Sequence[Row]
    world_size: int

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def covered(self) -> int:
        """Those whose gradient is preconditioned."""
        return sum(row.parameters for row in self.rows if row.covered)

    @property
    def share(self) -> float:
        """The share of the trainable parameters that is covered, in [0, 1]."""
        return self.covered / self.parameters if self.parameters else 0.0

    def __rich__(self) -> Table:
        factors, inverses = (sum(getattr(row, name) for row in self.rows) for name in ("factor_bytes", "inverse_bytes"))
        table = Table(
            title=f"K-FAC covers {self.covered:,} of {self.parameters:,} trainable parameters ({self.share:.1%})",
            caption=f"factors {_bytes(factors)} on every rank, inverses {_bytes(inverses)} in all, {self.world_size} "
            f"rank{'s' * (self.world_size > 1)}; 7 x 143: 7 diagonal blocks of order 143",
        )
        for column in COLUMNS:
            number = column in ("parameters", "A", "G", "factors", "inverses")
            table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
        for row in self.rows:
            table.add_row(*row.cells(), style=None if row.covered else "dim")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160, color_system=None).print(self)
        return text.getvalue()


def summarise(
    model: nn.Module, found: FoundLayers, assignment: Assignment, dtype: torch.dtype, *, eigen: bool
) -> Summary:
    """The treatment of every module of ``model`` that holds parameters.

    Args:
        model: the plain model.
        found: its layers, and why other modules are left alone.
        assignment: who inverts and who preconditions.
        dtype: the type of factors and inverses.
        eigen: whether eigendecompositions are held rather than inverses.
    """
    by_module: dict[int, list[Layer]] = {}
    for layer in found.layers:
        by_module.setdefault(id(layer.module), []).append(layer)
    owners = {id(use.module): layer.name for layer in found.layers for use in layer.uses}
    names = {layer.name for layer in found.layers}
    rows, counted = [], {id(parameter) for parameter in covered_parameters(found.layers)}
    for raw_name, module in model.named_modules():
        name = clean_name(raw_name)
        rows += [_layer_row(layer, assignment, dtype, eigen) for layer in by_module.get(id(module), ())]
        if id(module) in owners:
            rows.append(Row(name, type(module).__name__, f"K-FAC, as a use of {owners[id(module)]}", True, 0, {}))
        own = [p for p in module._parameters.values() if p is not None and id(p) not in counted]
        counted |= {id(parameter) for parameter in own}
        reason = found.refused.get(name) or found.skipped.get(name)
        if own and (reason or name not in names):
            trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
            reason = reason or ("frozen" if not trained else "not covered by a layer of the module")
            rows.append(Row(name or "(the model)", type(module).__name__, reason, False, trained, {}))
    return Summary(rows, assignment.world_size)


def inspect(
    model: nn.Module,
    config: KFACConfig,
    distribution: DistributionConfig | None = None,
    coarse: CoarseConfig | None = None,
    world_size: int = 1,
) -> Summary:
    """The summary of a preconditioner that is not built: no hook, no communicator, any number of ranks.

    Raises:
        ValueError: the model has no layer that can be preconditioned, or a lazy one.
    """
    plain = unwrap(model)
    found = find_layers(plain, config)
    check_layers(plain, found)
    eigen = wants_eigenbases(config) or (coarse is not None and coarse_spaces[coarse.space](coarse).uses_eigenbases)
    assignment = assignment_of(found.layers, config, distribution or DistributionConfig(), world_size)
    return summarise(plain, found, assignment, factor_dtype(found.layers), eigen=eigen)


def _layer_row(layer: Layer, assignment: Assignment, dtype: torch.dtype, eigen: bool) -> Row:
    if layer.trouble is not None:
        return Row(layer.name, type(layer.module).__name__, layer.trouble, False, math.prod(layer.shape), {})
    factors = {side: shape for side, shape in layer.factors.items() if (layer.name, side) in assignment.owner}
    words = sum(math.prod(shape.stored) for shape in factors.values())
    values = sum(shape.stored[0] * shape.size for shape in factors.values()) if eigen else 0
    if layer.joint:
        treatment = "Fisher block"
    else:
        treatment = "K-FAC" if layer.approximation == "expand" else f"K-FAC ({layer.approximation})"
    owners = ", ".join(f"{side}: {assignment.owner[layer.name, side]}" for side in factors)
    column = assignment.columns[assignment.column_of[layer.name]]
    workers = f"; used on {_ranks(column)}" if assignment.gradient_workers < assignment.world_size else ""
    return Row(
        layer.name,
        type(layer.module).__name__,
        treatment,
        True,
        math.prod(layer.shape),
        factors,
        sum(map(packed_words, factors.values())) * dtype.itemsize,
        (words + values) * dtype.itemsize,
        owners + workers,
    )


def _ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _order(shape: FactorShape) -> str:
    if shape.blocks == 1:
        text = f"{shape.dim}"
    else:
        text = f"{shape.dim} diag" if shape.size == 1 else f"{shape.blocks} x {shape.size}"
    return text if shape.groups == 1 else f"{shape.groups} * {text}"


def _bytes(number: int) -> str:
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
