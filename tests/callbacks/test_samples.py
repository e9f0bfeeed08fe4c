"""KFAC by rows under Lightning, beside the gradients and instead of them: the same fits, alone and under DDP."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from kfac_dist import kept_rows
from kfac_dist.callbacks import KFAC
from kfac_dist.compat import ignored_by_ddp
from tests.callbacks.tiny import BATCH, CLASSES, FEATURES, Classifier, Manual, fit, hooks, kfac, loader, weights
from tests.helpers.ranks import RankPool

WIDTH = 30
EXACT = {"rtol": 1e-10, "atol": 1e-12}
OPTIONS = {"sample_ids_key": 2, "factor_every_n_steps": 2, "kl_clip": 1e-3}


class Wide(Classifier):
    """Three linear layers: one takes its samples, the others have too few columns to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.first = nn.Linear(FEATURES, WIDTH)
        self.dropout = nn.Linear(WIDTH, WIDTH)  # in the place of what Classifier has between its layers
        self.last = nn.Linear(WIDTH, CLASSES)


class WideManual(Wide, Manual):
    """The same by manual optimization."""


class Rows(pl.Callback):
    """How many weights have no gradient when the optimizer is about to step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.counts.append(sum(p.grad is not None and p.grad.is_sparse for p in pl_module.parameters()))


def run(
    rank: int,
    world_size: int,
    preconditioning: str,
    module: type[Classifier] = Wide,
    options: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[dict[str, Tensor], list[int], int]:
    """Weights after two epochs, the weights without gradients by step, and the hooks that are left."""
    model = module(momentum=0.5)
    if rank:
        nn.init.zeros_(model.dropout.weight)  # DDP begins with rank 0's parameters
    counts = Rows()
    made = KFAC(likelihood="categorical", preconditioning=preconditioning, **(OPTIONS | (options or {})))
    if trainer.get("strategy") is None:
        trainer["strategy"] = DDPStrategy(**trainer.pop("ddp", {}))
    batch = trainer.pop("batch", BATCH)
    train = loader(batch=batch, rank=rank, ranks=world_size)
    fit(model, [counts, made], train, devices=world_size, precision="64-true", max_epochs=2, **trainer)
    assert ignored_by_ddp(model) is None
    return weights(model), counts.counts, hooks(model)


@pytest.mark.parametrize("module", [Wide, WideManual])
@pytest.mark.parametrize("options", [{}, {"damping_method": "eigen", "factor_sides": "input"}], ids=["both", "input"])
def test_a_fit_is_the_same_to_rounding(module: type[Classifier], options: dict[str, Any]) -> None:
    wanted, none, _ = run(0, 1, "gradients", module, options, strategy="auto")
    found, counts, left = run(0, 1, "samples", module, options, strategy="auto")
    torch.testing.assert_close(found, wanted, **EXACT)
    assert (set(none), set(counts), left) == ({0}, {1}, 0)


@pytest.mark.parametrize(
    ("module", "options", "trainer", "by_rows"),
    [
        (Wide, {}, {}, True),
        (WideManual, {}, {}, True),
        (Wide, {"coarse": "layer_step"}, {}, True),
        (Wide, {}, {"batch": BATCH // 2, "accumulate_grad_batches": 2}, True),
        (Wide, {}, {"gradient_clip_val": 0.1}, True),  # of the directions
        (Wide, {"clip_raw_gradients": 1e-3}, {}, False),
    ],
)
def test_the_default_route_is_the_same_to_rounding(
    module: type[Classifier],
    options: dict[str, Any],
    trainer: dict[str, Any],
    by_rows: bool,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[set[str]],
) -> None:
    """Rows beside the gradients, taken where nothing was done to these before K-FAC sees them."""
    monkeypatch.setattr(kept_rows, "WORTH", 0)
    wanted, _, _ = run(0, 1, "gradients", module, options, strategy="auto", **trainer)
    dense = len(taken)
    found, counts, left = run(0, 1, "auto", module, options, strategy="auto", **trainer)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert (set(counts), left) == ({0}, 0)
    assert not any(taken[:dense])
    # A short last window has fewer rows, which pay in more layers.
    assert all(names >= {"dropout"} if by_rows else not names for names in taken[dense:])


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"batch": BATCH // 2, "accumulate_grad_batches": 2},
        {"ddp": {"static_graph": True}},
        {"ddp": {"gradient_as_bucket_view": True, "find_unused_parameters": True}},
        {"gradient_clip_val": 0.1},
    ],
    ids=["plain", "accumulated", "static", "views", "clipped"],
)
@pytest.mark.filterwarnings("ignore:find_unused_parameters")
def test_two_ranks_equal_one_process_with_dense_gradients(ranks: RankPool, trainer: dict[str, Any]) -> None:
    alone = {name: value for name, value in trainer.items() if name != "ddp"}
    wanted, _, _ = run(0, 1, "gradients", strategy="auto", **alone)
    for found, counts, left in ranks.run(2, run, "samples", init=False, timeout=120.0, **trainer):
        torch.testing.assert_close(found, wanted, **EXACT)
        assert (set(counts), left) == ({2}, 0)  # half the batch on each: less than two thirds of the width of one more


def test_ddp_on_one_device_waits_for_nothing(ranks: RankPool) -> None:
    wanted, _, _ = run(0, 1, "gradients", strategy="auto")
    for found, counts, _ in ranks.run(1, run, "samples", init=False, timeout=120.0):
        torch.testing.assert_close(found, wanted, **EXACT)
        assert set(counts) == {1}


def test_a_scaler_and_a_clip_of_raw_gradients_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"clip_raw_gradients=1.0 clips gradients, and .*use kl_clip"):
        kfac(preconditioning="samples", clip_raw_gradients=1.0)
    plugin = MixedPrecision("16-mixed", "cpu")
    with pytest.raises(MisconfigurationException, match=r"precision='16-mixed': its scaler .* use \"bf16-mixed\""):
        fit(Wide(), [kfac(preconditioning="samples")], plugins=[plugin])
