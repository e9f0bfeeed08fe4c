"""Mistakes that public implementations of two-level K-FAC made: each of these tests fails when we make it too.

Traps 2 and 7 are in test_direction.py, 9 also in test_coarse_solver.py, 10 in test_tselepidis.py, 11 in
test_coarse_memory.py, 12 to 15 in the tests of factors and accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.coarse import CoarseSpace, FineLevel, coarse_spaces, dense
from kfac_dist.coarse.spectral import Spectral
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import Setup, lockstep, relative
from tests.helpers.dense_coarse import FIRST_ID, Dense, flat_gradient

ALL = cases()


def one_step(case: Case, setup: Setup) -> Tensor:
    model = case.model()
    kfac = setup.preconditioner(case, model)
    logits = model(case.x)
    kfac.accumulate(sample_ids=torch.arange(FIRST_ID, FIRST_ID + len(case.x)))
    case.loss(logits, case.y).backward()
    kfac.step()
    assert kfac.metrics["coarse/failures"] == 0
    kfac.close()
    return flat_gradient(model)


def dense_state(case: Case, setup: Setup) -> Dense:
    return Dense(case, case.model(), setup.lam, setup.damping(0), setup.fisher, setup.draws)


@pytest.mark.parametrize(("space", "k"), [("nicolaides", 1), ("spectral", 2), ("krylov", 2), ("residual", 1)])
def test_trap_1_the_right_hand_side_is_the_restricted_residual(space: str, k: int) -> None:
    """R_0 grad there is the additive form under another name."""
    case, setup = ALL["mlp-categorical"], Setup(space=space, k=k)
    state = dense_state(case, setup)
    V = state.basis(space, k)
    found = one_step(case, setup)
    assert relative(found, state.corrected(V, "error_minimizing")) < 1e-8
    assert relative(found, state.corrected(V, "additive")) > 1e-3
    assert torch.linalg.norm(V.T @ (state.grad - state.F_l @ found)) < 1e-9 * torch.linalg.norm(V.T @ state.grad)


def test_trap_3_spectral_vectors_are_eigenvectors_of_the_row_major_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """kron(q_G, q_A), not kron(q_A, q_G): a layer with as many outputs as inputs would not even notice by its shape."""

    def square() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 5))

    made = ALL["mlp-gaussian"]
    case = Case(square, made.x, torch.cat([made.y, made.y[:, :2]], dim=1), "gaussian")
    seen: dict[str, list[Tensor]] = {}
    vectors = Spectral.vectors

    def spy(self: Spectral, fine: FineLevel) -> Mapping[str, Sequence]:
        result = vectors(self, fine)
        seen.update({name: [dense(v) for v in each] for name, each in result.items()})
        return result

    monkeypatch.setattr(Spectral, "vectors", spy)
    setup = Setup(space="spectral", k=3)
    one_step(case, setup)
    for name, (A, G, _) in dense_state(case, setup).factors.items():
        K = torch.kron(G[0], A[0])
        largest = torch.linalg.eigvalsh(K).flip(0)[:3]
        for j, v in enumerate(seen[name]):
            v = v.flatten()
            assert torch.linalg.norm(K @ v - largest[j] * v) < 1e-12 * float(largest[0])
            assert float(v.norm()) == pytest.approx(1.0)
        wrong = torch.kron(A[0], G[0]) @ seen[name][0].flatten() - largest[0] * seen[name][0].flatten()
        assert torch.linalg.norm(wrong) > 1e-3 * float(largest[0])


class Probe(CoarseSpace):
    """Two random, far from orthogonal vectors per layer; remembers the products that the coarse level made with F."""

    fixed_count = 2
    E: Tensor
    product: Tensor
    raw: Tensor

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Tensor]]:
        generator = torch.Generator().manual_seed(5)
        first, second = (
            {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in fine.shapes.items()}
            for _ in range(2)
        )
        second = {name: first[name] + 0.1 * v for name, v in second.items()}
        Probe.raw = torch.stack([torch.cat([v.flatten() for v in each.values()]) for each in (first, second)], 1)
        Probe.product = torch.cat([v.flatten() for v in fine.product(first).values()])
        return {name: [first[name], second[name]] for name in first}

    def operator(self, moment: Tensor, samples: float) -> Tensor:
        Probe.E = super().operator(moment, samples)
        return Probe.E


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> type[Probe]:
    monkeypatch.setitem(coarse_spaces._entries, "probe", Probe)
    # The vectors as they come, so that the operator is V^T F V of known V.
    monkeypatch.setattr(
        "kfac_dist.basis.orthonormal_coefficients", lambda gram, eps: torch.eye(gram.shape[-1]).to(gram).expand_as(gram)
    )
    return Probe


class Frames(nn.Module):
    """Three frames per sample, folded behind the samples for the convolution and the layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(2, 3, 2, stride=2), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.tanh(self.conv(x.flatten(0, 1)))
        return self.head(torch.tanh(self.inner(maps.mean((2, 3)))).view(len(x), 3, 4).amax(1))


def frames() -> Case:
    x = ALL["cnn"].x
    return Case(Frames, torch.stack([x, x.flip(2), x.roll(1, 0)], dim=1), ALL["cnn"].y, "categorical")


@pytest.mark.parametrize("draws", [1, 2, "exact"])
@pytest.mark.parametrize("name", ["cnn", "convolutions", "shared", "sequences", "frames"])
def test_trap_4_samples_and_locations_keep_their_order(name: str, draws: int | str, probe: type[Probe]) -> None:
    """In U^T v and in F v, where a sample has many locations (repeat is not repeat_interleave)."""
    case, setup = frames() if name == "frames" else ALL[name], Setup(space="probe", draws=draws)
    one_step(case, setup)
    state = dense_state(case, setup)
    V = state.per_layer(*probe.raw.T)
    assert relative(probe.E, V.T @ state.F @ V) < 1e-12
    assert relative(probe.product, state.F_l @ probe.raw[:, 0]) < 1e-12


@pytest.mark.parametrize("name", ["mlp-categorical", "cnn"])
def test_trap_5_all_layers_use_the_same_sub_batch(name: str, probe: type[Probe]) -> None:
    """Another draw of samples for each layer leaves the diagonal blocks and destroys those between the layers."""
    setup = Setup(space="probe", max_samples=5)
    one_step(ALL[name], setup)
    state = dense_state(ALL[name], setup)
    V, U = state.per_layer(*probe.raw.T), state.U[:, :5]
    wanted = V.T @ U @ U.T @ V / 5
    assert relative(probe.E, wanted) < 1e-12
    between = wanted.clone()
    for i in range(0, len(wanted), 2):
        between[i : i + 2, i : i + 2] = 0
    assert between.norm() > 0.03 * wanted.norm()  # there is something to destroy


@pytest.mark.parametrize("space", ["probe", "nicolaides", "layer_step_residual", "layer_step_momentum"])
def test_trap_6_the_coarse_damping_is_that_of_the_vectors(space: str, probe: type[Probe]) -> None:
    """lam_c V^T V for vectors of any length and angle, not lam_c (or lam_c p) on the diagonal."""
    setup = Setup(space=space, lam_c=20.0)  # it outweighs F
    if space != "probe":
        for step in lockstep(setup, "mlp-categorical", 3):
            assert relative(step.found, step.wanted) < 1e-8
        return
    case = ALL["mlp-categorical"]
    state = dense_state(case, setup)
    found = one_step(case, setup)
    V = state.per_layer(*probe.raw.T)
    assert relative(found, state.corrected(V, "error_minimizing")) < 1e-8
    # It matters: with the damping on the diagonal alone the direction is another one.
    E = V.T @ state.F @ V + 20.0 * torch.diag((V.T @ V).diagonal())
    wrong = state.zeta + V @ torch.linalg.solve(E, V.T @ (state.grad - state.F_l @ state.zeta))
    assert relative(wrong, found) > 1e-2


@pytest.mark.parametrize("factor_every", [1, 6])
@pytest.mark.parametrize("space", ["layer_step", "layer_step_momentum", "residual", "scalar"])
def test_trap_8_basis_and_operator_belong_together(space: str, factor_every: int) -> None:
    """The basis moves every step: E is made anew from the kept samples (6), and never averaged over batches (1)."""
    for step in lockstep(Setup(space=space, factor_every=factor_every), "mlp-categorical", 5, lr=0.3):
        ref = step.reference
        assert relative(step.found, step.wanted) < 1e-8
        decrease = float(ref.error(ref.zeta) - ref.error(step.found))
        assert step.kfac.metrics["coarse/decrease"] == pytest.approx(decrease, rel=1e-8)


@pytest.mark.parametrize("space", ["nicolaides", "tselepidis", "layer_step"])
def test_trap_9_constant_data_give_a_constant_operator(space: str) -> None:
    """A buffer that is symmetrised in place grows with every step."""
    case, setup = ALL["mlp-categorical"], Setup(space=space, factor_every=1, draws="exact")
    model = case.model()
    kfac = setup.preconditioner(case, model)
    first: dict[str, float] = {}
    for _ in range(25):
        model.zero_grad()
        logits = model(case.x)
        kfac.accumulate()
        case.loss(logits, case.y).backward()
        kfac.step()
        found = {key: kfac.metrics[f"coarse/{key}"] for key in ("condition", "decrease", "decrease_ratio")}
        first = first or found
        assert found == pytest.approx(first, rel=1e-9)
    kfac.close()
