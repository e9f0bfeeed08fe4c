"""Random numbers as a pure function of (seed, step, draw, sample id, output index).

A counter-based generator in the manner of SplitMix64 (Steele, Lea and Flood 2014): whoever holds a sample draws the
same numbers for it, so N ranks can equal one, and the global random streams are never touched.

Shapes: ``sample_ids`` (B,) int64; results (B, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
_MASK64 = (1 << 64) - 1
_CACHED = 1 << 15  # numbers


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) shift: torch's ``>>`` on int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def uniforms(seed: int, step: int, draw: int, sample_ids: Tensor, n: int) -> Tensor:
    """Numbers in the open interval (0, 1), float64 (float32 on devices without float64), shape (B, n)."""
    state = torch.zeros((), dtype=torch.int64, device=sample_ids.device)
    for key in (seed, step, draw):
        state = _mix(state + _signed(key + _GOLDEN))
    rows = _mix(_mix(sample_ids.to(torch.int64) + _GOLDEN) ^ state)
    counters = torch.arange(1, n + 1, dtype=torch.int64, device=sample_ids.device) * _GOLDEN
    if sample_ids.device.type == "mps":
        return (_shift_right(_mix(rows[:, None] + counters), 41).to(torch.float32) + 0.5) * 2.0**-23
    numbers = torch.empty(len(rows), n, dtype=torch.float64, device=sample_ids.device)
    # In parts that stay in a processor's cache: the dozen passes over them are all that this costs.
    part = max(1, _CACHED // max(n, 1)) if sample_ids.device.type == "cpu" else max(1, len(rows))
    for some, out in zip(rows.split(part), numbers.split(part), strict=True):
        out.copy_(_shift_right(_mix(some[:, None] + counters), 12)).add_(0.5).mul_(2.0**-52)
    return numbers


def default_sample_ids(rank: int, micro_batch: int, size: int, device: torch.device) -> Tensor:
    """Ids (size,) that are unique among ranks (below 2^20) and micro-batches (below 2^15) of one step."""
    offset = ((rank & 0xFFFFF) << 43) | ((micro_batch & 0x7FFF) << 28)
    return torch.arange(size, dtype=torch.int64, device=device) + offset
