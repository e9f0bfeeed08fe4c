"""The two-level method with dense float64 matrices: F, M^-1, R_0 and every correction, straight from the formulas."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.helpers.cases import Case
from tests.helpers.dense import cotangents, gradient_matrix, kfac_direction, kronecker_factors, theta, treated
from tests.helpers.explicit import explicit

SEED, FIRST_ID = 3, 100


class Dense:
    """Everything about one state of one model, as dense matrices over the layers' row-major [W | b] vectors."""

    def __init__(self, case: Case, model: nn.Module, lam: float, lam_c: float, fisher: str, samples: int | str) -> None:
        self.case, self.model, self.lam, self.lam_c = case, explicit(copy.deepcopy(model)), lam, lam_c
        self.ids = torch.arange(FIRST_ID, FIRST_ID + len(case.x))
        self.fisher, self.samples = fisher, samples
        self.names = list(treated(self.model))
        self.model.zero_grad()
        case.loss(self.model(case.x), case.y).backward()
        self.grad = self.flatten({n: gradient_matrix(m) for n, m in treated(self.model).items()})
        self.shapes = {n: gradient_matrix(m).shape for n, m in treated(self.model).items()}
        self.factors = kronecker_factors(case, copy.deepcopy(self.model), case.x, self._cotangents)
        self.U = torch.stack(list(self._columns()), dim=1)
        self.F = self.U @ self.U.T / len(case.x)
        self.F_l = self.F + lam_c * torch.eye(len(self.F)).double()
        self.zeta = self.precondition(self.grad)

    def _cotangents(self, logits: Tensor) -> Iterator[tuple[Tensor, float]]:
        return cotangents(self.case, logits, self.case.y, self.fisher, self.samples, SEED, 0, self.ids)

    def _columns(self) -> Iterator[Tensor]:
        """One gradient per sample and draw, by a forward and a backward of that sample alone."""
        for cotangent, weight in list(self._cotangents(self.model(self.case.x))):
            for b in range(len(self.case.x)):
                self.model.zero_grad()
                self.model(self.case.x[b : b + 1]).backward(cotangent[b : b + 1])
                yield self.flatten({n: gradient_matrix(m) for n, m in treated(self.model).items()}) * weight**0.5

    def flatten(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([parts[name].flatten() for name in self.names])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        sizes = [self.shapes[name].numel() for name in self.names]
        return {n: part.view(self.shapes[n]) for n, part in zip(self.names, vector.split(sizes), strict=True)}

    def precondition(self, vector: Tensor) -> Tensor:
        parts = self.split(vector)
        return self.flatten({n: kfac_direction(*self.factors[n], parts[n], self.lam, "eigen") for n in self.names})

    def per_layer(self, *vectors: Tensor) -> Tensor:
        """R_0^T with every vector cut into its layers: (p, layers * vectors)."""
        columns = []
        for name in self.names:
            for vector in vectors:
                parts = {n: part if n == name else torch.zeros_like(part) for n, part in self.split(vector).items()}
                columns.append(self.flatten(parts))
        return torch.stack(columns, dim=1)

    def basis(self, space: str, k: int, variant: str | None = None, delta: Tensor | None = None) -> Tensor:
        ones = torch.ones_like(self.grad)
        residual = self.precondition(self.grad - self.F_l @ self.zeta)
        with_delta = [self.zeta] if delta is None else [self.zeta, delta]
        if space == "nicolaides" or space == "tselepidis":
            return self.per_layer(ones)
        if space == "layer_step":
            return self.per_layer(self.zeta)
        if space == "layer_step_momentum":
            return self.per_layer(*with_delta)
        if space == "scalar":
            return self.zeta[:, None]
        if space == "scalar_momentum":
            return torch.stack(with_delta, dim=1)
        if space == "residual":
            return self.per_layer(residual)
        if space == "layer_step_residual":
            return self.per_layer(self.zeta, residual)
        if space == "krylov":
            powers = [residual if variant == "residual" else ones]
            for _ in range(k - 1):
                powers.append(self.precondition(powers[-1]))
            return self.per_layer(*powers)
        if space == "pcg":
            powers = [self.zeta]
            for _ in range(k - 1):
                powers.append(self.precondition(self.F_l @ powers[-1]))
            return self.per_layer(*powers)
        if space == "spectral":
            return self._spectral(k, variant != "smallest")
        if space == "spectral_bands":
            return self._bands(k)
        raise AssertionError(f"no dense reference for {space!r}: write one")

    def _eigenvectors(self, name: str) -> tuple[Tensor, Tensor]:
        """(values of G (x) A over all groups, the vectors as columns); the vectors are kron(q_G, q_A): row-major."""
        A, G, _ = self.factors[name]
        values, vectors = [], []
        for group, (a, g) in enumerate(zip(A, G, strict=True)):
            (la, qa), (lg, qg) = torch.linalg.eigh(a), torch.linalg.eigh(g)
            values.append(torch.kron(lg.clamp_min(0), la.clamp_min(0)))
            full = torch.zeros(len(A), len(g) * len(a), len(g) * len(a)).double()
            full[group] = torch.kron(qg, qa)
            vectors.append(full.flatten(0, 1))
        return torch.cat(values), torch.cat(vectors, dim=1)

    def _spectral(self, k: int, largest: bool) -> Tensor:
        columns = []
        for name in self.names:
            values, vectors = self._eigenvectors(name)
            for index in values.argsort(descending=largest, stable=True)[:k]:
                parts = {n: torch.zeros(self.shapes[n]).double() for n in self.names}
                parts[name] = vectors[:, index]
                columns.append(self.flatten(parts))
        return torch.stack(columns, dim=1)

    def _bands(self, k: int) -> Tensor:
        columns = []
        for name in self.names:
            values, vectors = self._eigenvectors(name)
            T = self.factors[name][2]
            spectrum = T * values + self.lam
            c = vectors.T @ self.split(self.zeta)[name].flatten()
            order = spectrum.argsort(descending=True, stable=True)
            share = (c**2 * spectrum)[order]
            band = ((share.cumsum(0) - share / 2) / share.sum() * k).long().clamp(0, k - 1)
            for j in range(k):
                keep = torch.zeros_like(c)
                keep[order[band == j]] = c[order[band == j]]
                parts = {n: torch.zeros(self.shapes[n]).double() for n in self.names}
                parts[name] = vectors @ keep
                columns.append(self.flatten(parts))
        return torch.stack(columns, dim=1)

    def cross_covariance_operator(self) -> Tensor:
        """E_ij = sum(A_ij) sum(G_ij) T_ij of the cross-covariance MATRICES, for layers with one location each."""
        rows: dict[str, tuple[Tensor, list[tuple[Tensor, float]]]] = {}
        for name in self.names:
            captured: list[tuple[Tensor, Tensor]] = []

            def keep(m: nn.Module, i: tuple, o: Tensor, into: list = captured) -> Tensor:
                into.append((i[0], o))
                return o.clone()  # an in-place activation must not touch what was recorded

            handle = treated(self.model)[name].register_forward_hook(keep)
            logits = self.model(self.case.x)
            handle.remove()
            module = treated(self.model)[name]
            a = captured[0][0].detach()
            a = a if module.bias is None else torch.cat([a, torch.ones(len(a), 1).double()], dim=1)
            gs = [
                (torch.autograd.grad(logits, captured[0][1], c, retain_graph=True)[0], weight)
                for c, weight in self._cotangents(logits)
            ]
            rows[name] = (a, gs)
        B, count = len(self.case.x), len(self.names)
        E = torch.zeros(count, count).double()
        for i, first in enumerate(self.names):
            for j, second in enumerate(self.names):
                A_ij = rows[first][0].T @ rows[second][0] / B
                pairs = zip(rows[first][1], rows[second][1], strict=True)
                G_ij = sum(g.T @ h * weight / B for (g, weight), (h, _) in pairs)
                E[i, j] = A_ij.sum() * G_ij.sum()
        return E

    def corrected(self, V: Tensor, correction: str, E: Tensor | None = None) -> Tensor:
        """zeta_2, with E^-1 as a pseudo-inverse so that dependent columns do no harm."""
        V = V[:, V.norm(dim=0) > 0]
        E = V.T @ self.F_l @ V if E is None else E
        Q = V @ torch.linalg.pinv(E, rtol=1e-13, hermitian=True) @ V.T
        if correction == "error_minimizing":
            return self.zeta + Q @ (self.grad - self.F_l @ self.zeta)
        if correction == "additive":
            return self.zeta + Q @ self.grad
        c = Q @ self.grad
        y = c + self.precondition(self.grad - self.F_l @ c)
        return y if correction == "deflated" else y + Q @ (self.grad - self.F_l @ y)

    def error(self, direction: Tensor) -> Tensor:
        """||d - zeta*||^2 in the F_l-norm."""
        e = direction - torch.linalg.solve(self.F_l, self.grad)
        return e @ self.F_l @ e


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([gradient_matrix(m).flatten() for m in treated(model).values()])


def decrease_ratio(dense: Dense, case: Case, model: nn.Module, lr: float) -> float:
    """(loss(theta) - loss(theta - lr d)) / (lr <d, grad> - lr^2 d^T F_l d / 2) of the d in ``param.grad``; it moves."""
    d = flat_gradient(model)
    predicted = lr * d @ dense.grad - 0.5 * lr**2 * d @ dense.F_l @ d
    with torch.no_grad():
        loss = case.loss(model(case.x), case.y)
        for p in model.parameters():
            p -= lr * p.grad
        decrease = loss - case.loss(model(case.x), case.y)
    return float(decrease / predicted)


__all__ = ["FIRST_ID", "SEED", "Dense", "decrease_ratio", "flat_gradient", "theta"]
