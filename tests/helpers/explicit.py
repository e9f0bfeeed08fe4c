"""Attention and recurrent modules written out in nn.Linear, which dense references treat as they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

FUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """With the values, the gradients and the frozenness of (slices of) parameters."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    for target, source in ((made.weight, weight), (made.bias, bias)):
        if source is not None:
            target.data.copy_(source.detach())
            target.requires_grad_(source.requires_grad)
    return made


class ExplicitAttention(nn.Module):
    """Heads one by one; batches of sequences inside are (B, L, E)."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = fused.num_heads, fused.batch_first
        weights = [fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight]
        if fused.in_proj_weight is not None:
            weights = list(fused.in_proj_weight.chunk(3))
        biases = [None] * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(linear, weights, biases)
        self.out_proj = linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        size = q.shape[2] // self.heads
        mixed = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].mT / size**0.5
            if key_padding_mask is not None:
                scores = scores.masked_fill(key_padding_mask[:, None], -torch.inf)
            mixed.append(scores.softmax(-1) @ v[..., part])
        out = self.out_proj(torch.cat(mixed, -1))
        if unbatched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None


class ExplicitRecurrent(nn.Module):
    """One linear map after the other, in a loop over the time steps; also cells."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.kind, self.cell = type(fused).__name__.removesuffix("Cell"), isinstance(fused, nn.RNNCellBase)
        self.act = torch.relu if getattr(fused, "nonlinearity", "tanh") == "relu" else torch.tanh
        self.hidden, self.projected = fused.hidden_size, getattr(fused, "proj_size", 0)
        self.directions = 1 + int(getattr(fused, "bidirectional", False))
        self.batch_first = getattr(fused, "batch_first", False)
        for name, weight in fused.named_parameters():
            if name.startswith("weight_"):
                bias = dict(fused.named_parameters()).get(name.replace("weight", "bias"))
                self.add_module(name.removeprefix("weight_"), linear(weight, bias))

    def one_step(self, suffix: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        maps = dict(self.named_children())
        a, b = maps[f"ih{suffix}"](x), maps[f"hh{suffix}"](h)
        n = self.hidden
        if self.kind == "RNN":
            return self.act(a + b), c
        if self.kind == "GRU":
            r, z = (a + b)[:, :n].sigmoid(), (a + b)[:, n : 2 * n].sigmoid()
            new = torch.tanh(a[:, 2 * n :] + r * b[:, 2 * n :])
            return (1 - z) * new + z * h, c
        i, f, o = (a + b)[:, :n].sigmoid(), (a + b)[:, n : 2 * n].sigmoid(), (a + b)[:, 3 * n :].sigmoid()
        c = f * c + i * torch.tanh((a + b)[:, 2 * n : 3 * n])
        h = o * torch.tanh(c)
        return (maps[f"hr{suffix}"](h) if self.projected else h), c

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        if self.cell:
            if hx is None:
                hx = (x.new_zeros(len(x), self.hidden),) * 2
            h, c = self.one_step("", x, *(hx if isinstance(hx, tuple) else (hx, hx)))
            return (h, c) if self.kind == "LSTM" else h
        x = x if self.batch_first else x.transpose(0, 1)
        places = [name.removeprefix("ih") for name, _ in self.named_children() if name.startswith("ih")]
        states = hx if isinstance(hx, tuple) else (hx, None)
        last_h, last_c, across = [], [], []
        for number, place in enumerate(places):
            h = x.new_zeros(len(x), self.projected or self.hidden) if states[0] is None else states[0][number]
            c = x.new_zeros(len(x), self.hidden) if states[1] is None else states[1][number]
            times = list(range(x.shape[1]))
            out = {}
            for t in times[::-1] if number % self.directions else times:
                h, c = self.one_step(place, x[:, t], h, c)
                out[t] = h
            last_h.append(h)
            last_c.append(c)
            across.append(torch.stack([out[t] for t in times], 1))
            if len(across) == self.directions:
                x, across = torch.cat(across, -1), []
        x = x if self.batch_first else x.transpose(0, 1)
        h_n, c_n = torch.stack(last_h), torch.stack(last_c)
        return x, ((h_n, c_n) if self.kind == "LSTM" else h_n)


def explicit(model: nn.Module) -> nn.Module:
    """The model itself, or where it has fused modules a copy with explicit ones in their places, ``.grad`` and all."""
    if not any(isinstance(module, FUSED) for module in model.modules()):
        return model
    made = _written_out(copy.deepcopy(model))
    with_gradients = copy.deepcopy(model)
    for target, source in zip(with_gradients.parameters(), model.parameters(), strict=True):
        target.data.copy_(source if source.grad is None else source.grad)
    for target, source in zip(made.parameters(), _written_out(with_gradients).parameters(), strict=True):
        target.grad = source.data if any(p.grad is not None for p in model.parameters()) else None
    return made


def _written_out(model: nn.Module) -> nn.Module:
    if isinstance(model, FUSED):
        kind = ExplicitAttention if isinstance(model, nn.MultiheadAttention) else ExplicitRecurrent
        return kind(model)
    for name, child in model.named_children():
        setattr(model, name, _written_out(child))
    return model
