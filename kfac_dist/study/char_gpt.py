"""A small GPT over characters: a decoder-only transformer with norms before the sublayers (Radford et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_dist.study.char_text import VOCABULARY
from kfac_dist.study.problem import Classifier


class CausalAttention(nn.Module):
    """Self-attention of every position to itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, width) -> (B, S, width)."""
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, S, width/heads)
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.project(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and a two-layer perceptron of four times the width, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, width) -> (B, S, width)."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.project(F.gelu(self.widen(self.norm2(x)))))


class GPT(nn.Module):
    """Logits of the next symbol at every position.

    Weights are drawn with deviation 0.02, those of the two projections of a block with 0.02 / sqrt(2 depth): each adds
    to the residual stream, 2 depth of them in all.

    Args:
        symbols: size of the vocabulary.
        length: the longest sequence.
        width: of the residual stream.
        depth: number of blocks.
        heads: of each attention; the width is divided among them.
        dropout: probability, at the embeddings, in the attention and at what a block adds.
        tie_weights: the output's weight is the token embedding's.

    Raises:
        ValueError: a size below 1, heads that do not divide the width, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        symbols: int,
        length: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"symbols": symbols, "length": length, "width": width, "depth": depth, "heads": heads}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        self.tokens = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, symbols, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if name.endswith("project") else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if tie_weights:
            self.output.weight = self.tokens.weight

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits (B, S, symbols) from the numbers of the symbols (B, S).

        Raises:
            ValueError: sequences longer than the positions that were made.
        """
        length = symbols.shape[1]
        if length > self.positions.num_embeddings:
            raise ValueError(
                f"sequences of {length} symbols, and the model has {self.positions.num_embeddings} positions: give "
                "both the same length"
            )
        # Every sample has positions of its own: K-FAC tells the samples' gradients apart.
        positions = torch.arange(length, device=symbols.device).expand(len(symbols), -1)
        x = self.tokens(symbols) + self.positions(positions)
        return self.output(self.norm(self.blocks(self.drop(x))))


class CharGPT(Classifier):
    """Predicts each next character; ``forward`` returns LOGITS (B, characters, S), as ``F.cross_entropy`` takes them.

    The loss is the cross-entropy averaged over ALL characters of a batch. That is 1/S of a sample's negative
    log-likelihood, so K-FAC must be told: ``loss_reduction="mean_all"``. Logs it, in nats per character, as ``loss``
    and ``val_loss`` and the share of characters predicted rightly as ``accuracy`` and ``val_accuracy``.

    Args:
        length: the longest window of text.
        width: of the residual stream.
        depth: number of blocks.
        heads: of each attention; the width is divided among them.
        dropout: probability; 0: none.
        tie_weights: the output's weight is the token embedding's.
        lr: learning rate of the SGD that serves unless the command line or a configuration names an optimizer.
        momentum: of that SGD.
        uncovered_lr: for the learning-rate-free mode, in which lr is 1: rate of what K-FAC does not cover, to which
            the momentum then belongs; None: one rate and one momentum for all parameters.

    Raises:
        ValueError: a size below 1, heads that do not divide the width, a dropout outside [0, 1), or an uncovered_lr of
            0 or less.
    """

    def __init__(
        self,
        length: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tie_weights: bool = False,
        lr: float = 0.1,
        momentum: float = 0.9,
        uncovered_lr: float | None = None,
    ) -> None:
        super().__init__(lr, momentum, uncovered_lr)
        self.net = GPT(len(VOCABULARY), length, width, depth, heads, dropout, tie_weights)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits (B, 97, S) of the characters that follow ``characters`` (B, S)."""
        return self.net(characters).movedim(-1, 1)
