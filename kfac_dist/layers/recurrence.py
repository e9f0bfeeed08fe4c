"""A recurrent module's call in plain operations, for the gradients at its linear maps.

Inside, everything is (B, T, ..), and a cell is a module of one step; inputs and outputs are in the module's own layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.factors import statistics_dtype


def places(module: Any) -> list[str]:
    """What follows ``weight_ih`` in the names of a module's parameters, in the order of its states."""
    if isinstance(module, nn.RNNCellBase):
        return [""]
    ends = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{number}{end}" for number in range(module.num_layers) for end in ends]


class Recurrence:
    """One call, run again when it is first asked for; its graph then serves every draw of the targets.

    Args:
        module: an LSTM, GRU or RNN, or a cell, without random numbers inside.
        x: the input of the call.
        hx: the states it began with, as the module takes them; None: zeros.
    """

    def __init__(self, module: nn.Module, x: Tensor, hx: Tensor | Sequence[Tensor] | None) -> None:
        self._module: Any = module
        self._cell = isinstance(module, nn.RNNCellBase)
        self._lstm = isinstance(module, (nn.LSTM, nn.LSTMCell))
        self._unbatched = x.dim() == (1 if self._cell else 2)
        self._dtype = statistics_dtype(next(module.parameters()).dtype)
        self._x = x.detach()
        self._states = [state.detach() for state in ([hx] if isinstance(hx, Tensor) else hx or [])]
        self._inputs: dict[str, list[Tensor]] = {}
        self._products: dict[str, list[Tensor]] = {}
        self._outputs: list[Tensor] = []

    def rows(self, suffixes: Sequence[str], gradients: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """For the weights of these names the inputs and the gradients of the products, (B, T, ..) each.

        Args:
            suffixes: what follows ``weight_``.
            gradients: of the module's outputs, None where one is not used.
        """
        if not self._outputs:
            with torch.enable_grad():
                self._outputs = self._run()
        given = [(out, g.to(self._dtype)) for out, g in zip(self._outputs, gradients, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in given],
                [product for suffix in suffixes for product in self._products[suffix]],
                [g for _, g in given],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        rows = []
        for suffix in suffixes:
            x = torch.cat(self._inputs[suffix], 1).detach()
            rows.append((x, torch.cat([next(found) for _ in self._products[suffix]], 1)))
        return rows

    def _run(self) -> list[Tensor]:
        x = self._sequences()
        h0, c0 = self._first_states(x)
        last: list[tuple[Tensor, Tensor]] = []
        outputs: list[Tensor] = []
        for place, h, c in zip(places(self._module), h0, c0, strict=True):
            backwards = place.endswith("_reverse")
            entering = self._map(f"ih{place}", x)
            hidden = []
            for step in range(x.shape[1])[:: -1 if backwards else 1]:
                h, c = self._step(entering[:, step], self._map(f"hh{place}", h[:, None])[:, 0], h, c)
                if getattr(self._module, "proj_size", 0):
                    h = self._map(f"hr{place}", h[:, None])[:, 0]
                hidden.append(h)
            if backwards:  # rows lie in the order of time
                hidden.reverse()
                for lists in (self._inputs, self._products):
                    for one in ("hh", "hr"):
                        lists.get(f"{one}{place}", []).reverse()
            last.append((h, c))
            outputs.append(torch.stack(hidden, 1))
            if backwards or not getattr(self._module, "bidirectional", False):
                x, outputs = torch.cat(outputs, 2), []
        h_n, c_n = (torch.stack(states) for states in zip(*last, strict=True))
        return self._as_given(x, [h_n, c_n] if self._lstm else [h_n])

    def _map(self, suffix: str, x: Tensor) -> Tensor:
        weight, bias = (self._module._parameters.get(f"{kind}_{suffix}") for kind in ("weight", "bias"))
        product = F.linear(x, weight.detach().to(self._dtype), None if bias is None else bias.detach().to(self._dtype))
        self._inputs.setdefault(suffix, []).append(x)
        self._products.setdefault(suffix, []).append(product)
        return product

    def _step(self, entering: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The new hidden and cell state from the two products; (B, ..) each."""
        if self._lstm:
            i, f, g, o = (entering + recurrent).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        if isinstance(self._module, (nn.GRU, nn.GRUCell)):
            (r, z, n), (r_h, z_h, n_h) = entering.chunk(3, -1), recurrent.chunk(3, -1)
            kept = (z + z_h).sigmoid()
            return (1 - kept) * (n + (r + r_h).sigmoid() * n_h).tanh() + kept * h, c
        return (torch.tanh if self._module.nonlinearity == "tanh" else torch.relu)(entering + recurrent), c

    # -- layouts --------------------------------------------------------------------------------------------------

    def _sequences(self) -> Tensor:
        """The input as (B, T, d). It is a leaf of the graph, like the first states, so that all products are in it."""
        x = self._x[None] if self._unbatched else self._x
        if self._cell:
            x = x[:, None]
        elif not self._unbatched and not self._module.batch_first:
            x = x.transpose(0, 1)
        return x.to(self._dtype).detach().requires_grad_()

    def _first_states(self, x: Tensor) -> list[Tensor]:
        """The hidden states and the cell states, (places, B, ..) each."""
        count, sizes = len(places(self._module)), [self._module.hidden_size] * 2
        sizes[0] = getattr(self._module, "proj_size", 0) or sizes[0]
        states = [x.new_zeros(count, x.shape[0], size) for size in sizes]
        for number, state in enumerate(self._states):
            states[number] = state.to(self._dtype).reshape(states[number].shape)
        return [state.detach().requires_grad_() for state in states]

    def _as_given(self, outputs: Tensor, states: list[Tensor]) -> list[Tensor]:
        """What the module returns, flattened: (output, h_n, c_n), of a cell (h, c)."""
        if self._cell:
            return [state[0, 0] if self._unbatched else state[0] for state in states]
        if self._unbatched:
            return [outputs[0], *(state[:, 0] for state in states)]
        return [outputs if self._module.batch_first else outputs.transpose(0, 1), *states]
