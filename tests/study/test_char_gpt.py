from __future__ import annotations

import math
import sys
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from kfac_dist.callbacks import KFAC
from kfac_dist.study import CharGPT, CharText, char_text
from kfac_dist.study.char_gpt import GPT
from kfac_dist.study.char_text import OTHER, VOCABULARY, decode, encode, python_topics, windows
from kfac_dist.study.in_memory import InMemoryDataset, already_collated
from tests.study.test_problems import quiet_trainer

SYMBOLS = len(VOCABULARY)
TINY = {"length": 16, "width": 12, "depth": 2, "heads": 3}


def tiny(**options: object) -> CharGPT:
    return CharGPT(**TINY | options)  # type: ignore[arg-type]


def text_batches(count: int = 6, length: int = 16, batch_size: int = 6) -> DataLoader:
    inputs, targets = windows(encode(python_topics()[:1000]), length)
    data = InMemoryDataset(inputs[:count], targets[:count])
    return DataLoader(data, batch_size=batch_size, collate_fn=already_collated)


def test_the_vocabulary_has_every_printable_character_once() -> None:
    assert len(set(VOCABULARY)) == SYMBOLS == 97
    assert set(VOCABULARY) == {chr(i) for i in range(32, 127)} | {"\n", OTHER}
    assert encode("a\N{EURO SIGN}b").tolist() == [VOCABULARY.index("a"), 0, VOCABULARY.index("b")]
    text = "if x:\n    return {'Y': 9}~"
    assert decode(encode(text)) == text


def test_nearly_all_of_the_text_is_in_the_vocabulary() -> None:
    numbers = encode(python_topics())
    assert len(numbers) > 300_000
    assert (numbers == 0).float().mean() < 0.02
    assert "the" in decode(numbers[:1000])


def test_a_python_without_the_text_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match=r"came without pydoc_data.*complete standard library"):
        CharText().setup("fit")


def test_targets_are_the_inputs_shifted_by_one() -> None:
    inputs, targets = windows(torch.arange(25), 8)
    assert inputs.flatten().tolist() == list(range(24))
    assert torch.equal(targets, inputs + 1)
    assert len(windows(torch.arange(24), 8)[0]) == 2  # the 24th character has no successor
    assert windows(torch.arange(3), 8)[0].shape == (0, 8)


def test_the_splits_are_contiguous_and_do_not_touch() -> None:
    (train, train_targets), (val, val_targets) = CharText(length=100, held_out=0.2).load()
    numbers = encode(python_topics())
    border = len(numbers) - round(len(numbers) * 0.2)
    assert torch.equal(train.flatten(), numbers[: train.numel()])
    assert torch.equal(train_targets.flatten(), numbers[1 : train.numel() + 1])
    assert border - 101 < train.numel() + 1 <= border
    assert torch.equal(val.flatten(), numbers[border : border + val.numel()])
    assert torch.equal(val_targets.flatten(), numbers[border + 1 : border + val.numel() + 1])


def test_no_window_crosses_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(char_text, "python_topics", lambda: "a" * 80 + "b" * 20)
    (train, train_targets), (val, val_targets) = CharText(length=10, held_out=0.2).load()
    assert train.shape == (7, 10)  # the last ten characters before the border would have an 11th beyond it
    assert {decode(t.flatten()) for t in (train, train_targets)} == {"a" * 70}
    assert {decode(t.flatten()) for t in (val, val_targets)} == {"b" * 10}


def test_windows_are_served_in_an_order_that_the_seed_fixes() -> None:
    data = CharText(length=64, batch_size=50)
    data.setup("fit")
    assert data.train_set is not None

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([inputs for inputs, _ in data.train_dataloader()])

    first = epoch(1)
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))
    assert sorted(first.tolist()) == sorted(data.train_set.tensors[0].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length=0 must be at least 1"),
        ({"held_out": 1.0}, r"held_out=1.0 must lie between 0 and 1"),
        ({"length": 100_000}, "length=100000, held_out=0.1: parts of .* choose a smaller length"),
    ],
)
def test_text_that_cannot_be_cut_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CharText(**arguments).load()  # type: ignore[arg-type]


def test_forward_returns_logits_with_the_characters_in_dimension_one() -> None:
    torch.manual_seed(0)
    model, inputs = tiny(), torch.randint(0, SYMBOLS, (5, 8))
    logits = model(inputs)
    assert logits.shape == (5, SYMBOLS, 8)
    assert torch.equal(logits.movedim(1, -1), model.net(inputs))
    assert model(inputs[:, :3]).shape == (5, SYMBOLS, 3)
    assert torch.allclose(model.predict_step((inputs, inputs), 0).sum(1), torch.ones(5, 8))


def test_the_number_of_parameters_follows_from_the_sizes() -> None:
    width, depth = 12, 2
    block = 4 * width + 4 * width**2 + 4 * width + 8 * width**2 + 5 * width
    expected = 2 * SYMBOLS * width + 16 * width + depth * block + 2 * width
    assert sum(p.numel() for p in tiny().parameters()) == expected
    assert sum(p.numel() for p in tiny(tie_weights=True).parameters()) == expected - SYMBOLS * width


def test_a_later_character_does_not_change_earlier_logits() -> None:
    torch.manual_seed(0)
    net = GPT(SYMBOLS, **TINY).double()  # type: ignore[arg-type]
    inputs = torch.randint(0, SYMBOLS, (3, 8))
    before = net(inputs)
    for place in range(8):
        changed = inputs.clone()
        changed[:, place] = (changed[:, place] + 1) % SYMBOLS
        difference = (net(changed) - before).abs().amax((0, 2))
        assert not difference[:place].any()
        assert difference[place:].min() > 1e-9


def test_the_position_of_a_character_matters() -> None:
    torch.manual_seed(0)
    logits = tiny()(torch.full((1, 8), 5))
    assert (logits[..., 0] - logits[..., 4]).abs().max() > 1e-4


def test_tied_weights_serve_as_embedding_and_as_output() -> None:
    net = tiny(tie_weights=True).net
    assert net.output.weight is net.tokens.weight
    assert tiny().net.output.weight is not net.tokens.weight
    with torch.no_grad():
        net.tokens.weight[7] = 0
    assert not net(torch.zeros(1, 8, dtype=torch.long))[..., 7].any()


def test_the_loss_is_the_mean_over_all_characters() -> None:
    torch.manual_seed(0)
    model = tiny()
    ((inputs, targets),) = text_batches()
    probabilities = model(inputs).log_softmax(1)
    chosen = [probabilities[b, targets[b, s], s] for b in range(6) for s in range(16)]
    loss = model.training_step((inputs, targets), 0)
    assert loss.item() == pytest.approx(-torch.stack(chosen).sum().item() / 96, rel=1e-5)
    assert loss.item() == pytest.approx(math.log(SYMBOLS), rel=0.05)  # it starts near the uniform distribution


def test_logged_metrics_are_means_over_characters_of_uneven_batches() -> None:
    torch.manual_seed(0)
    model = tiny(lr=0.0)
    ((inputs, targets),) = text_batches(count=7, batch_size=7)
    expected = torch.nn.functional.cross_entropy(model(inputs), targets).item()
    right = (model(inputs).argmax(1) == targets).float().mean().item()
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(model, text_batches(count=7, batch_size=4))
    assert trainer.callback_metrics["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert trainer.callback_metrics["accuracy"].item() == pytest.approx(right, rel=1e-5)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model, inputs = tiny(dropout=0.5), torch.randint(0, SYMBOLS, (2, 8))
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"heads": 5}, "heads=5 must divide width=12"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_windows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="sequences of 17 symbols, and the model has 16 positions"):
        tiny()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("options", [{"lr": 0.05}, {"lr": 1.0, "uncovered_lr": 0.01}])
def test_one_step_with_kfac_moves_every_parameter(options: dict[str, float], tie_weights: bool) -> None:
    pl.seed_everything(0, verbose=False)
    coarse = "layer_step_momentum" if "uncovered_lr" in options else None
    model = tiny(tie_weights=tie_weights, **options)
    before = [p.detach().clone() for p in model.parameters()]
    kfac = KFAC(likelihood="categorical", loss_reduction="mean_all", kl_clip=0.1, coarse=coarse)
    trainer = quiet_trainer(max_steps=1, callbacks=[kfac], num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, text_batches())
    # With another loss_reduction K-FAC would find the loss 16 times too small for the likelihood, and say so.
    assert not [w for w in caught if "output gradients of the training loss" in str(w.message)]
    assert all((p != b).any() and p.isfinite().all() for p, b in zip(model.parameters(), before, strict=True))
    assert (model.net.output.weight is model.net.tokens.weight) == tie_weights
