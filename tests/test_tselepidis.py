"""The approximate operator of Tselepidis et al. against cross-covariance matrices, for layers with unlike maps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config import CORRECTIONS
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import Setup, relative
from tests.helpers.dense import output_rows, patches, treated
from tests.helpers.dense_coarse import Dense
from tests.test_traps import dense_state, one_step


def unlike() -> nn.Module:
    """36, 9, 9 and 1 locations; positive weights, so that sums of entries do not vanish."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2, stride=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 2, 3, padding=1),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    for p in model.parameters():
        p.data.abs_()
    return model


def volumes() -> nn.Module:
    """8 locations in three dimensions, 2 in three, 3 in one, and 1."""
    model = nn.Sequential(
        nn.Conv3d(2, 3, 2, padding=(0, 1, 1), stride=(1, 2, 2)),
        nn.Tanh(),
        nn.Conv3d(3, 2, (1, 2, 2), bias=False),
        nn.Flatten(2),
        nn.ConvTranspose1d(2, 2, 2),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    for p in model.parameters():
        p.data.abs_()
    return model


def conv_case(name: str = "unlike") -> Case:
    made = cases()
    if name == "volumes":
        x = made["cnn"].x.unflatten(3, (3, 2))[:, :, :3]
        return Case(volumes, x, made["mlp-gaussian"].y, "gaussian")
    return Case(unlike, made["cnn"].x, made["mlp-gaussian"].y, "gaussian")


def maps_of(state: Dense) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Inputs, and output gradients by draw, of every layer as maps (B, d, H, W)."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in treated(state.model).items():

        def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> Tensor:
            shape = out.shape[2:] if out.dim() > 2 else (1,)
            inputs[name] = patches(m, args[0].detach())[:, :, 0].mT.unflatten(2, shape)
            outputs[name] = out
            return out.clone()

        handles.append(module.register_forward_hook(keep))
    logits = state.model(state.case.x)
    for handle in handles:
        handle.remove()
    draws = []
    for cotangent, weight in state._cotangents(logits):
        gradients = torch.autograd.grad(logits, list(outputs.values()), cotangent, retain_graph=True)
        rows = {n: output_rows(treated(state.model)[n], g)[:, :, 0].mT for n, g in zip(outputs, gradients, strict=True)}
        draws.append({n: g.unflatten(2, inputs[n].shape[2:]) * weight**0.5 for n, g in rows.items()})
    return inputs, draws


def covariance(one: Tensor, other: Tensor) -> tuple[Tensor, int]:
    """Mean of products over samples and the T locations of the coarser map, the finer one averaged down; and T."""
    size = min(one.shape[2:], other.shape[2:], key=math.prod)
    pooling = [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d]
    if one.dim() != other.dim():
        one, other, size = one.flatten(2), other.flatten(2), (math.prod(size),)
    one, other = (pooling[len(size) - 1](z, size).flatten(2) for z in (one, other))
    return torch.einsum("bit,bjt->ij", one, other) / (len(one) * one.shape[2]), one.shape[2]


def dense_operator(state: Dense) -> Tensor:
    """E_ij = sum(A_ij) sum(G_ij) T_ij."""
    inputs, draws = maps_of(state)
    E = torch.zeros(len(state.names), len(state.names)).double()
    for i, first in enumerate(state.names):
        for j, second in enumerate(state.names):
            A, T = covariance(inputs[first], inputs[second])
            G = sum(covariance(draw[first], draw[second])[0] for draw in draws)
            E[i, j] = A.sum() * G.sum() * T
    return E


@pytest.mark.parametrize("draws", [1, 2, "exact"])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["unlike", "volumes"])
def test_trap_10_cross_covariances_are_means_over_locations_too(name: str, correction: str, draws: int | str) -> None:
    """Off the diagonal as on it, whatever the two layers' numbers of locations are."""
    case, setup = conv_case(name), Setup(space="tselepidis", draws=draws, correction=correction)
    state = dense_state(case, setup)
    E = dense_operator(state)
    for i, name in enumerate(state.names):  # on the diagonal it is K-FAC's own block
        A, G, T = state.factors[name]
        assert E[i, i] == pytest.approx(float(T * torch.kron(G[0], A[0]).sum()))
    lengths = torch.tensor([state.shapes[n].numel() for n in state.names]).double().sqrt()
    E = E / lengths[:, None] / lengths + setup.damping(0) * torch.eye(len(E)).double()
    off_diagonal = E - torch.diag(E.diagonal())
    assert off_diagonal.norm() > 0.3 * E.norm()
    wanted = state.corrected(state.basis("tselepidis", 1) / lengths, correction, E)
    assert relative(one_step(case, setup), wanted) < 1e-9


def test_it_is_an_approximation() -> None:
    """Its operator is not that of the same vectors: "nicolaides" has the exact one."""
    case, setup = conv_case(), Setup(space="tselepidis", correction="error_minimizing")
    state = dense_state(case, setup)
    found, exact = one_step(case, setup), one_step(case, Setup(space="nicolaides"))
    assert state.error(exact) < state.error(found)
    V = state.basis("tselepidis", 1)
    V = V / V.norm(dim=0)
    lengths = torch.tensor([state.shapes[n].numel() for n in state.names]).double().sqrt()
    assert relative(dense_operator(state) / lengths[:, None] / lengths, V.T @ state.F @ V) > 0.05
