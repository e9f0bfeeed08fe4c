"""The uniform numbers behind sampled targets."""

from __future__ import annotations

import torch

from kfac_dist.draws import uniforms

IDS = torch.arange(2000)


def test_a_pure_function_of_its_arguments() -> None:
    before = torch.get_rng_state()
    numbers = uniforms(3, 5, 0, IDS, 8)
    assert numbers.shape == (2000, 8)
    assert numbers.dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(uniforms(3, 5, 0, IDS, 8), numbers)
    for other in ((4, 5, 0), (3, 6, 0), (3, 5, 1), (5, 3, 0), (0, 5, 3)):
        assert not (uniforms(*other, IDS, 8) == numbers).any()


def test_a_sample_keeps_its_numbers_wherever_it_lies() -> None:
    numbers = uniforms(3, 5, 0, IDS, 50)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(3, 5, 0, IDS[order], 50), numbers[order])
    assert torch.equal(uniforms(3, 5, 0, IDS[700:701], 50), numbers[700:701])
    assert torch.equal(uniforms(3, 5, 0, IDS.int(), 3), numbers[:, :3])
    assert uniforms(3, 5, 0, IDS[:0], 50).shape == (0, 50)


def reference(seed: int, step: int, draw: int, sample: int, index: int) -> float:
    """SplitMix64's output function in Python's integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = 0
    for key in (seed, step, draw):
        state = mix((state + key + golden) & mask)
    row = mix(mix((sample + golden) & mask) ^ state)
    return ((mix((row + (index + 1) * golden) & mask) >> 12) + 0.5) / 2**52


def test_the_same_numbers_as_an_independent_implementation() -> None:
    """Checkpoints, ranks and releases must agree on them."""
    ids = [0, 12345, 2**62 + 7]
    for key in ((3, 5, 0), (2**63 - 1, 10**9, 17)):
        found = uniforms(*key, torch.tensor(ids), 3)
        assert found.tolist() == [[reference(*key, sample, index) for index in range(3)] for sample in ids]
    assert uniforms(3, 5, 0, torch.tensor([0]), 1).item() == 0.11051881649094375


def test_extreme_keys_are_fine() -> None:
    ids = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    numbers = uniforms(2**63 - 1, 10**12, 999, ids, 4)
    assert ((numbers > 0) & (numbers < 1)).all()
    assert len(numbers.flatten().unique()) == 16


def test_roughly_uniform_and_uncorrelated() -> None:
    numbers = uniforms(0, 0, 0, IDS, 50)
    assert ((numbers > 0) & (numbers < 1)).all()
    counts = torch.histc(numbers.flatten(), 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 43.8  # chi^2, 19 degrees of freedom: one in a thousand
    centred = (numbers - 0.5) * 12**0.5
    along_ids = (centred[1:] * centred[:-1]).mean()
    along_outputs = (centred[:, 1:] * centred[:, :-1]).mean()
    along_steps = (centred * (uniforms(0, 1, 0, IDS, 50) - 0.5) * 12**0.5).mean()
    along_seeds = (centred * (uniforms(1, 0, 0, IDS, 50) - 0.5) * 12**0.5).mean()
    for correlation in (along_ids, along_outputs, along_steps, along_seeds):
        assert correlation.abs() < 4 / 100_000**0.5
    assert len(numbers.flatten().unique()) == numbers.numel()
