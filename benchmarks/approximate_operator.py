"""The additive correction of Tselepidis et al. 2020, dense, as published and with deviations put in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.corrections import Corrected, LayerSamples, Memory, added, fine_level, preconditioned

UPDATES_PER_INVERSION = 10  # the default of the public code: statistics every 10 steps, inverses every 100


def tselepidis(layers: Sequence[LayerSamples], lam: float, deviations: frozenset[str], memory: Memory) -> Corrected:
    """The direction zeta + V E^-1 R_0 grad, V_i = 1, E_ij = sum(A_ij) sum(G_ij) T_ij + lambda p_i delta_ij."""
    eigen = fine_level(layers, deviations, memory)
    zeta = preconditioned(layers, eigen, [layer.gradient for layer in layers], lam, deviations)
    SA, SG, T = _cross_sums(layers, deviations)
    if "in_place" in deviations or "over_B" in deviations:
        SA, SG = _averaged_sums(SA, SG, T, deviations, memory)
    E = SA * SG if deviations & {"no_T", "over_B"} else SA * SG * T
    if "average" in deviations and memory.E is not None:
        E = 0.95 * memory.E + 0.05 * E
    memory.E = E
    sizes = torch.tensor([float(layer.gradient.numel()) for layer in layers], dtype=torch.float64)
    E = E + lam * torch.diag(torch.ones_like(sizes) if "lambda" in deviations else sizes)
    V = [[torch.ones_like(layer.gradient)] for layer in layers]
    return added(zeta, V, E, [layer.gradient for layer in layers])


def _cross_sums(layers: Sequence[LayerSamples], deviations: frozenset[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Means over samples and locations of (1^T a_i)(1^T a_j) and (1^T g_i)(1^T g_j), and T_ij."""
    inputs, outputs = ([rows.sum(2) for rows in each] for each in zip(*((x.a, x.g) for x in layers), strict=True))
    m = len(layers)
    SA, SG, T = (torch.zeros(m, m, dtype=torch.float64) for _ in range(3))
    for i in range(m):
        for j in range(m):
            coarser = min(layers[i], layers[j], key=lambda layer: layer.locations)
            for sums, total in ((inputs, SA), (outputs, SG)):
                one, other = (_resized(sums[k], layers[k], coarser, deviations) for k in (i, j))
                total[i, j] = (one * other).mean()
            T[i, j] = coarser.locations
    return SA, SG, T


def _resized(sums: Tensor, layer: LayerSamples, like: LayerSamples, deviations: frozenset[str]) -> Tensor:
    if layer.locations == like.locations:
        return sums
    if "no_T" in deviations:
        return F.interpolate(sums[:, None], like.locations, mode="nearest")[:, 0]
    maps = sums.view(len(sums), 1, *layer.sides)
    sides = like.sides or (1, 1)
    if "over_B" in deviations:
        return F.interpolate(maps, sides, mode="nearest").flatten(1)
    return F.adaptive_avg_pool2d(maps, sides).flatten(1)


def _averaged_sums(
    SA: Tensor, SG: Tensor, T: Tensor, deviations: frozenset[str], memory: Memory
) -> tuple[Tensor, Tensor]:
    """The averages over the updates since the last inversion, all of them on the samples of this state."""
    locations = T.diagonal()
    cross = SG
    if "over_B" in deviations:  # a scaled by 1 / T, g by T: the diagonal is right, the rest is a mean over B alone
        scale = locations[:, None] * locations
        SA, SG, cross = SA * T / scale, SG * scale, SG * scale * T
    first = memory.sums is None
    zeros = torch.zeros_like(SA)
    A, G, own_A, own_G = memory.sums or (zeros, zeros, zeros.diagonal(), zeros.diagonal())
    for _ in range(1 if first else UPDATES_PER_INVERSION):
        rho = min(1 - 1 / (memory.updates + 1), 0.95)
        own_A = rho * own_A + (1 - rho) * SA.diagonal()
        own_G = rho * own_G + (1 - rho) * SG.diagonal()
        A = (rho * A + (1 - rho) * SA).tril(-1) + A.triu(1) + torch.diag(own_A)
        diagonal = rho * own_G + (1 - rho) * cross.diagonal() if "over_B" in deviations else own_G
        G = (rho * G + (1 - rho) * cross).triu(1) + G.tril(-1) + torch.diag(diagonal)
        memory.updates += 1
    whole_A, whole_G = A + A.T - torch.diag(A.diagonal()), G + G.T - torch.diag(G.diagonal())
    keep = (whole_A, whole_G) if "in_place" in deviations else (A, G)
    memory.sums = (*keep, own_A, own_G)
    return whole_A, whole_G


def growth(layers: Sequence[LayerSamples], lam: float, inversions: int) -> list[tuple[float, float]]:
    """How averages that are symmetrised in place grow on constant data.

    Returns:
        after each inversion, the largest off-diagonal sum of the inputs' averages over what it should be, and the
        smallest eigenvalue of E over the largest.
    """
    deviations, memory, found = frozenset({"in_place"}), Memory(), []
    wanted, outputs, T = _cross_sums(layers, deviations)
    apart = ~torch.eye(len(layers), dtype=torch.bool)
    sizes = torch.tensor([float(layer.gradient.numel()) for layer in layers], dtype=torch.float64)
    for _ in range(inversions):
        A, G = _averaged_sums(wanted, outputs, T, deviations, memory)
        values = torch.linalg.eigvalsh(A * G * T + lam * torch.diag(sizes))
        found.append((float((A[apart] / wanted[apart]).abs().amax()), float(values[0] / values[-1])))
    return found
