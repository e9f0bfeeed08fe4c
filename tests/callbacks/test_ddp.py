"""The callback under Lightning's DDP on real gloo processes."""

from __future__ import annotations

import pytest
import torch

from tests.callbacks import jobs
from tests.callbacks.tiny import BATCH, Classifier, assert_equal, fit, hooks, kfac, loader, weights

TIMEOUT = 120.0
EXACT = {"rtol": 1e-10, "atol": 1e-12}
# Everything but the step of the last factor update is taken from the batch, so that ranks can be compared with one.
SAMPLED = {"likelihood": "categorical", "sample_ids_key": 2, "factor_every_n_steps": 2, "kl_clip": 1e-3}
EMPIRICAL = {"likelihood": "empirical", "factor_every_n_steps": 2, "kl_clip": 1e-3}


def run(ranks, size, job, *args, **kwargs):
    return ranks.run(size, job, *args, init=False, timeout=TIMEOUT, **kwargs)


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_raw_gradients_are_bitwise_the_same_in_every_variant(ranks, likelihood):
    results = run(ranks, 2, jobs.variants, likelihood)
    for by_variant in results:
        for name in jobs.VARIANTS:
            (steps, losses), (watched_steps, watched_losses), _, left = by_variant[name]
            assert left == 0, name
            assert len(steps) >= 1
            assert_equal(watched_steps, steps)
            assert_equal(watched_losses, losses)
    factors = {name: result[2] for name, result in results[0].items()}
    for name in jobs.VARIANTS:
        assert_equal(results[1][name][2], factors[name])  # replicated
        if name not in ("accumulated", "16-mixed", "bf16-mixed"):
            torch.testing.assert_close(factors[name], factors["plain"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(factors["16-mixed"], factors["plain"], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(factors["bf16-mixed"], factors["plain"], rtol=1e-1, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "distribution"),
    [
        (SAMPLED, "comm_opt"),
        (SAMPLED, "mem_opt"),
        (EMPIRICAL, "comm_opt"),
        (EMPIRICAL | {"kl_clip": None}, 0.5),
        (SAMPLED | {"coarse": {"space": "layer_step_residual"}}, "mem_opt"),
        (SAMPLED | {"coarse": {"space": "layer_step", "damping": "adaptive"}}, "comm_opt"),
    ],
)
def test_two_ranks_equal_one_process(ranks, options, distribution):
    options = options | {"distribution": distribution}
    alone = jobs.train(0, 1, options, strategy="auto")
    for together in run(ranks, 2, jobs.train, options):
        torch.testing.assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("options", [SAMPLED, EMPIRICAL])
def test_two_ranks_equal_one_process_in_every_variant_of_ddp(ranks, options):
    alone = jobs.fits(0, 1, options)
    for together in run(ranks, 2, jobs.fits, options):
        torch.testing.assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("every", [None, 1])
def test_only_rank_0_logs(ranks, every):
    steps = [(0, 0.0), (1, 1.0), (2, 2.0)]
    first, second = run(ranks, 2, jobs.logged, every)
    assert first == steps
    assert second == ([] if every else steps)  # what goes through the module is Lightning's to keep on rank 0


@pytest.mark.parametrize("options", [SAMPLED, EMPIRICAL])
def test_two_ranks_that_accumulate_equal_one_process_with_the_big_batch(ranks, options):
    alone = jobs.train(0, 1, options, strategy="auto")
    for together in run(ranks, 2, jobs.train, options, batch=BATCH // 2, accumulate_grad_batches=2):
        torch.testing.assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("options", [SAMPLED, EMPIRICAL])
def test_a_fit_goes_on_at_another_world_size(ranks, tmp_path, options):
    paths = [str(tmp_path / f"{index}.ckpt") for index in range(3)]
    whole = Classifier(momentum=0.5).double()
    fit(whole, [kfac(**options)], loader(), max_epochs=3, precision="64-true")
    run(ranks, 2, jobs.resume, None, paths[0], 1, options)
    saved = torch.load(paths[0], weights_only=True)["callbacks"]["KFAC"]
    assert saved["step"] == 3
    run(ranks, 1, jobs.resume, paths[0], paths[1], 2, options)
    for resumed in run(ranks, 2, jobs.resume, paths[1], paths[2], 3, options):
        torch.testing.assert_close(resumed, weights(whole), **EXACT)


def test_a_single_device_fit_after_ddp_asks_nobody(ranks):
    """torch.distributed is still up with two ranks then, and the ranks make different numbers of steps."""
    assert run(ranks, 2, jobs.alone_after_ddp) == [(True, 1, 1), (True, 1, 3)]


@pytest.mark.parametrize("distribution", ["comm_opt", "mem_opt"])
def test_the_state_of_one_rank_waits_for_nobody(ranks, distribution):
    (steps, layers), (none, other_layers) = run(ranks, 2, jobs.state_of_one_rank, distribution)
    assert steps == [1, 2, 3]
    assert none == []
    assert_equal(other_layers, layers)


def test_errors_are_the_same_on_every_rank(ranks):
    first, second = run(ranks, 2, jobs.messages)
    assert first == second
    assert "set output_module to one of first" in first["logits"]
    assert 'use "auto"' in first["backend"]
    assert all(text.endswith("hooks: 0") for text in first.values())


def test_the_second_call_of_the_root_is_never_taken_for_logits(ranks):
    for scalar, shaped in run(ranks, 2, jobs.loss_of_one_element):
        assert_equal(shaped, scalar)


def test_hooks_of_the_main_process_are_gone():
    model = Classifier()
    fit(model, [kfac()])
    assert hooks(model) == 0
