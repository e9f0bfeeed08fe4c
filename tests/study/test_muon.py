from __future__ import annotations

import pytest
import torch

from kfac_dist.study.muon import FullPrecisionMuon, orthogonalise

CUBIC = (1.5, -0.5, 0.0)  # converges to the polar factor; Muon's own quintic stays within some 30 % of it
MUON = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (12, 12)])
def test_the_polar_factor_in_full_precision(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(orthogonalise(matrix, CUBIC, 60, 1e-7), u @ vt, atol=1e-12)
    single = orthogonalise(matrix.float(), CUBIC, 60, 1e-7)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), u @ vt, atol=1e-5)  # bfloat16 would leave 1e-2


def test_five_steps_of_muons_own_quintic() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 10)
    values = torch.linalg.svdvals(orthogonalise(matrix, MUON, 5, 1e-7))
    assert 0.65 < values.min() <= values.max() < 1.25


def test_two_steps_are_those_of_torch_up_to_its_bfloat16() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 10), torch.randn(2, 24, 10)
    ends = []
    for optimizer in (torch.optim.Muon, FullPrecisionMuon):
        weight = torch.nn.Parameter(start.clone())
        muon = optimizer([weight], lr=0.1, weight_decay=0.3)
        for gradient in gradients:
            weight.grad = gradient.clone()
            muon.step()
        ends.append(weight.detach())
    moved = (ends[0] - start).norm()
    assert 0 < (ends[0] - ends[1]).norm() < 0.02 * moved


def test_another_adjustment_is_refused() -> None:
    with pytest.raises(ValueError, match="adjust_lr_fn='match_rms_adamw'"):
        FullPrecisionMuon([torch.nn.Parameter(torch.ones(2, 2))], adjust_lr_fn="match_rms_adamw")
