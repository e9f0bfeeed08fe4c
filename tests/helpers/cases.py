"""Small float64 models with data and losses, on which a dense matrix can be formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model builder, its inputs and targets, its likelihood, and the loss: summed over outputs, mean over samples."""

    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    likelihood: str

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return self.build().double()

    def sum_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.likelihood == "categorical":
            return F.cross_entropy(logits, y, reduction="sum")
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        return 0.5 * (logits - y).square().sum()

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.sum_loss(logits, y) / logits.shape[0]


class Shared(nn.Module):
    """One hidden module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(h)))))


class Sequences(nn.Module):
    """Linear layers over (B, S, d), with non-contiguous inputs; logits (B, classes, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.mT))).mT


class Tokens(nn.Module):
    """Token and position embeddings, one with padding, summed over the sequence before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4, padding_idx=2), nn.Embedding(5, 4)
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        h = torch.tanh(self.tokens(x) + self.positions(positions))
        return self.head(torch.tanh(self.inner(h)).sum(1))


class Convolutions(nn.Module):
    """Three dimensions, two transposed, one transposed with an output_size of the call, one."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(2, 2, 2, stride=(2, 1, 1), padding=1, padding_mode="replicate")
        self.wider = nn.ConvTranspose2d(4, 2, (2, 1), stride=(1, 2), bias=False)
        self.longer = nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, groups=2)
        self.line = nn.Conv1d(2, 4, 3, stride=6, dilation=2, groups=2)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.volume(x)).flatten(1, 2)
        h = torch.tanh(self.wider(h)).flatten(2)
        h = torch.tanh(self.longer(h, output_size=[2 * h.shape[2]]))
        return self.head(torch.tanh(self.line(h)).flatten(1))


class Attending(nn.Module):
    """Self-attention (one packed product) and the attention of learnt places to it (two), for inputs (B, S, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(3, 4), nn.Linear(3, 4)
        self.itself = nn.MultiheadAttention(4, 2, batch_first=True)
        self.other = nn.MultiheadAttention(4, 2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = (h + self.itself(h, h, h, need_weights=False)[0]).transpose(0, 1)
        places = self.places(x[:, :2]).transpose(0, 1)
        return self.head(self.other(places, h, h)[0].mean(0))


class Recurrent(nn.Module):
    """Two directions of an LSTM, then a GRU of which only the last state is used, then a cell; inputs (B, T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(4, 2)
        self.cell = nn.RNNCell(2, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, (_, c_n) = self.lstm(x)
        h_n = self.gru(out.transpose(0, 1))[1]
        state = self.cell(h_n[0])
        return self.head(self.cell(c_n[1], state))


class Tied(nn.Module):
    """A table that is the weight of the output layer, with padding; logits (B, symbols, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner, self.head = nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 4), nn.Linear(4, 6)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        return self.head(torch.tanh(self.inner(h.cumsum(1))) + h).mT


class EveryKind(nn.Module):
    """One layer of each kind, for inputs (B, 3, 3) whose signs are the symbols; logits (B, symbols, 3).

    With ``uncovered="diagonal"`` all of it is covered, and with ``max_factor_dim=8`` some of it in blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = nn.Linear(3, 4, bias=False), nn.Conv1d(4, 4, 3, padding=1)
        self.tokens, self.positions = nn.Embedding(4, 4, padding_idx=2), nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.groups, self.slope = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.PReLU(4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        symbols = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0)
        h = self.norm(self.inner(x) + self.tokens(symbols) + self.positions(positions))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.slope(self.groups(torch.tanh(self.conv(h.mT)))).mT
        return self.head(self.lstm(h)[0]).mT


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (2, 3), padding="same", dilation=(1, 2), groups=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(2 * 4 * 4, 3),
    )


def slopes() -> nn.Module:
    """With parameters of no layer type's, for ``uncovered="diagonal"``."""
    return nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 4), nn.PReLU(init=0.1), nn.Linear(4, 3))


def norms() -> nn.Module:
    """For inputs (B, 4, 6); scale and shift away from 1 and 0."""
    net = nn.Sequential(
        nn.GroupNorm(2, 4),
        nn.Linear(6, 5),
        nn.RMSNorm(5),
        nn.ReLU(inplace=True),
        nn.LayerNorm((4, 5)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    for module in (net[0], net[2], net[4]):
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0.5)
    return net


def cases(batch: int = 12) -> dict[str, Case]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def classes(*shape: int) -> Tensor:
        return torch.randint(0, 3, shape, generator=generator)

    flat = normal(batch, 5)
    return {
        "mlp-categorical": Case(mlp, flat, classes(batch), "categorical"),
        "mlp-bernoulli": Case(mlp, flat, (normal(batch, 3) > 0).double(), "bernoulli"),
        "mlp-gaussian": Case(mlp, flat, normal(batch, 3), "gaussian"),
        "cnn": Case(cnn, normal(batch, 2, 6, 6), classes(batch), "categorical"),
        "shared": Case(Shared, flat, classes(batch), "categorical"),
        "sequences": Case(Sequences, normal(batch, 4, 6), classes(batch, 6), "categorical"),
        "tokens": Case(Tokens, torch.randint(0, 7, (batch, 5), generator=generator), classes(batch), "categorical"),
        "convolutions": Case(Convolutions, normal(batch, 2, 2, 1, 2), classes(batch), "categorical"),
        "slopes": Case(slopes, flat, classes(batch), "categorical"),
        "norms": Case(norms, normal(batch, 4, 6), classes(batch), "categorical"),
        "attention": Case(Attending, normal(batch, 4, 3), classes(batch), "categorical"),
        "recurrent": Case(Recurrent, normal(batch, 4, 3), classes(batch), "categorical"),
        "tied": Case(Tied, torch.randint(0, 6, (batch, 4), generator=generator), classes(batch, 4), "categorical"),
        "every kind": Case(EveryKind, normal(batch, 3, 3), classes(batch, 3), "categorical"),
    }
