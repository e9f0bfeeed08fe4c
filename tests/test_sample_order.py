"""Samples are told apart by where they lie: sequences before the batch are seen, and what cannot be seen is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner

TOKENS, WIDTH = 7, 4


class Reader(nn.Module):
    """A sequence model that may work with time first, as torch's modules do by default."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.table, self.norm = nn.Embedding(TOKENS, WIDTH), nn.LayerNorm(WIDTH)
        self.inner, self.memory = nn.Linear(WIDTH, 5), nn.GRU(5, 3, batch_first=not time_first)
        self.head = nn.Linear(3, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, S) -> (B, S, TOKENS)
        x = self.table(tokens.mT if self.time_first else tokens)
        logits = self.head(self.memory(self.inner(self.norm(x)))[0])
        return logits.transpose(0, 1) if self.time_first else logits


class Pairs(nn.Module):
    """Two views of every sample, one batch after the other."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(8, 3)
        if normed:
            self.body = nn.Sequential(self.body, nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(torch.tanh(self.body(torch.cat([x, x.flip(1)]))).chunk(2), 1))


class Placed(nn.Module):
    """Positions that all samples share; ``batched`` gives each sample its own."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.batched = batched
        self.places, self.norm, self.head = nn.Embedding(9, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, 5) -> (B, 3)
        places = torch.arange(x.shape[1])
        return self.head(self.norm(x + self.places(places.expand(len(x), -1) if self.batched else places)).mean(1))


def directions(time_first: bool, samples: int, steps: int, masked: bool, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Reader(time_first).double()
    tokens, targets = torch.randint(0, TOKENS, (2, samples, steps))
    mask = torch.rand(samples, steps) < 0.7 if masked else None
    kfac = KFACPreconditioner(model, class_dim=-1, loss_reduction="sum", damping=0.1, **options)
    logits = model(tokens)
    kfac.accumulate(mask=mask)
    keep = torch.ones(samples, steps) if mask is None else mask.double()
    (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") * keep.flatten()).sum().backward()
    kfac.step()
    kfac.close()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize(("samples", "steps"), [(4, 8), (4, 6), (5, 3)])
def test_time_first_is_the_same_as_batch_first(
    samples: int, steps: int, likelihood: str, approximation: str, masked: bool
) -> None:
    options = {"likelihood": likelihood, "kfac_approx": approximation, "coarse": "layer_step"}
    if likelihood == "empirical":
        masked = False  # the gradients come from the backward, which has no entry masked here
    wanted = directions(False, samples, steps, masked, **options)
    found = directions(True, samples, steps, masked, **options)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name


def said(model: nn.Module, x: Tensor, steps: int = 1, **options: Any) -> list[str]:
    kfac = KFACPreconditioner(model, "categorical", factor_every_n_steps=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            logits = model(x)
            kfac.accumulate()
            F.cross_entropy(
                logits.flatten(0, -2), torch.zeros(logits.shape[:-1], dtype=torch.long).flatten()
            ).backward()
            kfac.step()
    kfac.close()
    return [str(w.message) for w in caught if "taken for other samples" in str(w.message)]


def tokens(samples: int, steps: int) -> Tensor:
    return torch.randint(0, TOKENS, (samples, steps))


def test_what_shapes_cannot_tell_is_tried_once_and_named() -> None:
    torch.manual_seed(0)
    (message,) = said(Reader(True), tokens(6, 6), steps=3, class_dim=-1, loss_reduction="mean_all")
    assert message.startswith("the logits of some of the 6 samples depend on what is taken for other samples")
    assert "in the layers table, norm, inner, head: " in message
    (message,) = said(Pairs(), torch.randn(6, 5), coarse="layer_step")
    assert "in the layers body: " in message
    (message,) = said(Pairs(normed=True), torch.randn(64, 5))
    assert "in the layers body.0, body.1: " in message
    (message,) = said(Placed(batched=False), torch.randn(6, 6, 5))
    assert "in the layers places: " in message


def test_no_word_where_samples_come_first_or_nobody_asks() -> None:
    torch.manual_seed(0)
    assert said(Reader(False), tokens(6, 6), class_dim=-1, loss_reduction="mean_all", coarse="layer_step") == []
    assert said(Reader(True), tokens(6, 12), class_dim=-1, loss_reduction="mean_all", coarse="layer_step") == []
    assert said(Placed(batched=True), torch.randn(6, 6, 5), coarse="layer_step") == []
    assert said(Pairs(), torch.randn(6, 5)) == []  # every row is a location: none is looked for
    halves = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU()) for _ in range(4)]
    for samples in (2, 16, 64):  # what BatchNorm lets through is no mistake
        assert said(nn.Sequential(*halves, nn.Linear(5, 3)), torch.randn(samples, 5), coarse="layer_step") == []
