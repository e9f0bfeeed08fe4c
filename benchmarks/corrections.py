"""Two-level corrections from their formulas, dense, as published and with one or more deviations put in.

Every deviation has a name (``DEVIATIONS`` of :mod:`benchmarks.public_codes`); a set of names makes one reading of a
method. With the empty set the corrections are those
of :class:`~kfac_dist.KFACPreconditioner`. docs/study/public-codes.md says where each of them was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.states import State


@dataclass
class LayerSamples:
    """What one layer has seen: rows a (B, T, d_in + 1) and g (B, T, d_out), its gradient, the sides of its map."""

    a: Tensor
    g: Tensor
    gradient: Tensor
    bias: bool
    sides: tuple[int, ...]

    @property
    def locations(self) -> int:
        """T."""
        return self.a.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and G, means over samples and locations."""
        a, g = self.a.flatten(0, 1), self.g.flatten(0, 1)
        return a.T @ a / len(a), g.T @ g / len(g)

    def along(self, v: Tensor) -> Tensor:
        """g^T v a at every sample and location, (B, T)."""
        return ((self.g @ v) * self.a).sum(2)

    def back(self, weights: Tensor) -> Tensor:
        """Sum over samples and locations of weight g a^T, for weights (B, T)."""
        return torch.einsum("bt,bto,bti->oi", weights, self.g, self.a)


def samples_of(state: State) -> list[LayerSamples]:
    """The layers' inputs and output gradients for the sampled targets of the state."""
    layers = state.fisher.layers
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(out)

    handles = [layer.module.register_forward_hook(keep) for layer in layers]
    logits = state.model(state.x)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits, outputs, state.cotangent)
    found, start, B = [], 0, len(state.x)
    for layer, x, g in zip(layers, inputs, gradients, strict=True):
        a = layer.input_rows(x.detach())[0]
        if layer.has_bias:
            a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        size = layer.output_dim * layer.input_dim
        gradient = state.gradient[start : start + size].view(layer.output_dim, layer.input_dim)
        rows = layer.output_rows(g)[0]
        found.append(
            LayerSamples(a.unflatten(0, (B, -1)), rows.unflatten(0, (B, -1)), gradient, layer.has_bias, g.shape[2:])
        )
        start += size
    return found


@dataclass
class Memory:
    """What a reading carries from one state of the training to the next."""

    updates: int = 0
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    E: Tensor | None = None
    sums: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


@dataclass
class Corrected:
    """One-level and two-level direction, per layer, and the decrease that the coarse system promises."""

    fine: list[Tensor]
    direction: list[Tensor]
    promised: float


def fine_level(
    layers: Sequence[LayerSamples], deviations: frozenset[str], memory: Memory
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(l_G, Q_G, l_A, Q_A) of every layer, of the averages that the memory holds."""
    new = [layer.factors() for layer in layers]
    if "iterations" in deviations and memory.factors:  # the weight of 100 iterations after the one update that was
        pairs = zip(memory.factors, new, strict=True)
        new = [(0.95 * A + 0.05 * a, 0.95 * G + 0.05 * g) for (A, G), (a, g) in pairs]
    memory.factors = new
    return [(*_eigen(G), *_eigen(A)) for A, G in new]


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0), vectors


def preconditioned(
    layers: Sequence[LayerSamples], eigen: Sequence, parts: Sequence[Tensor], lam: float, deviations: frozenset[str]
) -> list[Tensor]:
    """(T G (x) A + lambda)^-1 of every layer, or lambda on both factors."""
    result = []
    for layer, (lg, qg, la, qa), part in zip(layers, eigen, parts, strict=True):
        spectrum = layer.locations * torch.outer(lg, la) + lam
        if "both" in deviations:
            spectrum = layer.locations * torch.outer(lg + lam, la + lam)
        if "twice" in deviations:
            spectrum = torch.outer(lg + 2 * lam, la + 2 * lam)
        result.append(qg @ ((qg.T @ part @ qa) / spectrum) @ qa.T)
    return result


def koroko(
    layers: Sequence[LayerSamples], space: str, lam: float, deviations: frozenset[str], memory: Memory
) -> Corrected:
    """The direction zeta + V E^-1 R_0 r, E = V^T (F + lambda) V, with a space of Koroko et al. 2023."""
    eigen = fine_level(layers, deviations, memory)
    gradients = [_mixed(layer) if "layout" in deviations else layer.gradient for layer in layers]
    outer = deviations - {"twice"}
    zeta = preconditioned(layers, eigen, [layer.gradient for layer in layers], lam, outer)
    w = sum(layer.along(z).sum(1) for layer, z in zip(layers, zeta, strict=True))
    products = [_fisher_rows(layer, w, deviations) for layer in layers]  # type: ignore[arg-type]
    residual = [g - f - lam * z for g, f, z in zip(gradients, products, zeta, strict=True)]
    basis_damping = deviations if "twice" in deviations else outer
    V = _basis(layers, space, eigen, residual, lam, deviations, basis_damping)
    E = _operator(layers, V, lam, deviations)
    if "average" in deviations and memory.E is not None:
        E = 0.95 * memory.E + 0.05 * E
    memory.E = E
    target = gradients if "rhs" in deviations else residual
    return added(zeta, V, E, target)


def _mixed(layer: LayerSamples) -> Tensor:
    if not layer.bias:
        return layer.gradient
    flat = torch.cat([layer.gradient[:, :-1].flatten(), layer.gradient[:, -1]])
    return flat.view(layer.gradient.shape)


def _fisher_rows(layer: LayerSamples, w: Tensor, deviations: frozenset[str]) -> Tensor:
    return layer.back(_spread(layer, w, deviations)) / len(w)


def _spread(layer: LayerSamples, w: Tensor, deviations: frozenset[str]) -> Tensor:
    """The weight of every sample at each of its locations, (B, T); samples run fastest where the rows' locations do."""
    if "locations" in deviations:
        return w.repeat(layer.locations).view(len(w), layer.locations)
    return w[:, None].expand(-1, layer.locations)


def _basis(
    layers: Sequence[LayerSamples],
    space: str,
    eigen: Sequence,
    residual: Sequence[Tensor],
    lam: float,
    deviations: frozenset[str],
    damping: frozenset[str],
) -> list[list[Tensor]]:
    ones = [torch.ones_like(layer.gradient) for layer in layers]
    if space == "nicolaides":
        columns = [ones]
    elif space == "residual":
        columns = [preconditioned(layers, eigen, residual, lam, damping)]
    elif space == "krylov":
        columns = [ones, preconditioned(layers, eigen, ones, lam, damping)]
    else:
        end = 0 if space == "spectral, smallest" else -1
        pairs = [(qg[:, end], qa[:, end]) for _, qg, _, qa in eigen]
        columns = [[torch.outer(g, a) for g, a in pairs]]
        if "kron" in deviations:
            columns = [[torch.outer(a, g).flatten().view(len(g), len(a)) for g, a in pairs]]
    scale: Callable[[Tensor], Tensor] = torch.linalg.vector_norm
    if "p_i" in deviations:
        scale = _largest
    return [[vectors[i] / scale(vectors[i]) for vectors in columns] for i in range(len(layers))]


def _largest(v: Tensor) -> Tensor:
    return v.abs().amax()


def _operator(
    layers: Sequence[LayerSamples], V: Sequence[Sequence[Tensor]], lam: float, deviations: frozenset
) -> Tensor:
    owners = [layer for layer, vectors in zip(layers, V, strict=True) for _ in vectors]
    vectors = [v for each in V for v in each]
    along = [layer.along(v) for layer, v in zip(owners, vectors, strict=True)]
    m, B = len(vectors), len(layers[0].a)
    E = torch.zeros(m, m, dtype=torch.float64)
    for i in range(m):
        for j in range(m):
            E[i, j] = (along[i] * _spread(owners[i], along[j].sum(1), deviations)).sum() / B
    if len(vectors) == len(layers):  # the code computes the lower triangle; with two vectors per layer, everything
        E = E.tril() + E.tril(-1).T
    for i in range(m):
        for j in range(m):
            if "p_i" in deviations:
                E[i, j] += lam * vectors[i].numel() * (i == j)
            elif owners[i] is owners[j]:
                E[i, j] += lam * float((vectors[i] * vectors[j]).sum())
    return E


def added(zeta: Sequence[Tensor], V: Sequence[Sequence[Tensor]], E: Tensor, target: Sequence[Tensor]) -> Corrected:
    """Zeta + V E^-1 V^T target."""
    rhs = torch.stack([(v * t).sum() for vectors, t in zip(V, target, strict=True) for v in vectors])
    beta = torch.linalg.pinv(E, rtol=1e-12) @ rhs  # vectors of one layer may be parallel
    steps = iter(beta)
    corrected = [z + sum(next(steps) * v for v in vectors) for z, vectors in zip(zeta, V, strict=True)]
    return Corrected(list(zeta), corrected, float(rhs @ beta))


def exact_on(layers: Sequence[LayerSamples], lam: float, samples: int, deviations: frozenset[str]) -> list[Tensor]:
    """(F' + lambda)^-1 grad, F' of a random sub-batch: one for all layers, or ("draws") another for each of them."""
    generator = torch.Generator().manual_seed(0)
    columns, index = [], None
    for layer in layers:
        if index is None or "draws" in deviations:
            index = torch.randint(len(layer.a), (samples,), generator=generator)
        columns.append(torch.einsum("bto,bti->oib", layer.g[index], layer.a[index]).flatten(0, 1))
    U = torch.cat(columns) / samples**0.5
    gradient = torch.cat([layer.gradient.flatten() for layer in layers])
    inner = torch.linalg.solve(torch.eye(samples, dtype=U.dtype) + U.T @ U / lam, U.T @ gradient)
    d = gradient / lam - U @ inner / lam**2
    parts = d.split([layer.gradient.numel() for layer in layers])
    return [part.view(layer.gradient.shape) for part, layer in zip(parts, layers, strict=True)]
