"""nn.MultiheadAttention: four linear maps, of queries, keys, values and of the heads' output.

The module calls none of its submodules. It hands its parameters to ``F.multi_head_attention_forward``, which multiplies
by all three input maps at once (self-attention), by two of them, or by each for itself: what a product was to each map
is read off the rows of the parameter that went into it.

Inside that function sequences are (L, N, E), whatever ``batch_first`` says; x and g are handed on as (N, L, E).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from kfac_dist.compat import attention_with, current_function_mode, uncompiled
from kfac_dist.config import LayerOptions
from kfac_dist.layers.base import layers
from kfac_dist.layers.linear_map import MapOfSeveral
from kfac_dist.layers.watch import Part, Record

INPUTS = ("q_proj", "k_proj", "v_proj")


@layers.register("attention")
class AttentionLayer(MapOfSeveral):
    """One of the four maps: ``q_proj``, ``k_proj``, ``v_proj`` or ``out_proj``.

    Args:
        name: the map's name in the model.
        attention: the whole module.
        map_name: which of the four.
    """

    def __init__(self, name: str, attention: nn.MultiheadAttention, map_name: str) -> None:
        self.attention = attention
        if map_name == "out_proj":
            super().__init__(name, attention.out_proj)
            return
        index = INPUTS.index(map_name)
        weight, bias = _parameters(attention)[index]
        rows = slice(index * attention.embed_dim, (index + 1) * attention.embed_dim)
        super().__init__(name, attention, weight=weight, bias=bias, rows=rows)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        if not isinstance(module, nn.MultiheadAttention):
            return ""
        if type(module).forward is not nn.MultiheadAttention.forward:
            return f"{type(module).__name__} is a MultiheadAttention with a forward of its own"
        if type(module.out_proj).forward is not nn.Linear.forward or "weight" not in module.out_proj._parameters:
            return f"its out_proj is a {type(module.out_proj).__name__}, not a Linear"
        weights = [module._parameters.get(weight) for weight, _ in _parameters(module)]
        if any(weight is None for weight in weights):
            return "its weight is computed from other parameters (a parametrization)"
        return "its weight is complex" if any(weight.is_complex() for weight in weights if weight is not None) else None

    @classmethod
    def adapt(cls, name: str, module: nn.Module, options: LayerOptions) -> Sequence[MapOfSeveral]:
        """See :meth:`Layer.adapt`."""
        assert isinstance(module, nn.MultiheadAttention)
        trained = [
            map_name
            for map_name, (weight, bias) in zip(INPUTS, _parameters(module), strict=True)
            if any(p is not None and p.requires_grad for p in map(module._parameters.get, (weight, bias)))
        ]
        if any(parameter.requires_grad for parameter in module.out_proj.parameters(recurse=False)):
            trained.append("out_proj")
        prefix = f"{name}." if name else ""
        return cls.together([cls(prefix + map_name, module, map_name) for map_name in trained], options)

    @classmethod
    def claims(cls, module: nn.Module) -> Sequence[nn.Module]:
        """See :meth:`Layer.claims`."""
        own = isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
        return (module.out_proj,) if own else ()  # type: ignore[return-value]

    @classmethod
    def left_out(cls, module: nn.Module) -> Sequence[str]:
        """See :meth:`Layer.left_out`."""
        parameters = {name: module._parameters.get(name) for name in ("bias_k", "bias_v")}
        return [name for name, parameter in parameters.items() if parameter is not None and parameter.requires_grad]

    def part(self, tensor: Tensor) -> Tensor:
        """See :meth:`Layer.part`: weights of their own beside a packed bias are whole."""
        return tensor if len(tensor) == self.attention.embed_dim else super().part(tensor)

    def columns(self, weight: Tensor) -> slice | None:
        """Where this map's outputs lie in a product with ``weight``, some rows of a parameter; None where they do not.

        The rows are compared by where they lie in memory: the parameter is cut by ``chunk`` or ``split``.
        """
        parameter = self.weight
        if weight is not parameter and weight._base is not parameter:
            return None
        start = self.part(parameter.detach()).storage_offset() - weight.storage_offset()
        first = start // parameter.stride(0)
        return slice(first, first + self.output_dim) if 0 <= first < weight.shape[0] else None

    def watch_siblings(self, record: Record) -> list[RemovableHandle]:
        """See :meth:`Layer.watch`."""
        attention, maps = self.attention, self.siblings
        names = [one.name for one in maps]
        running = threading.local()

        def leave() -> None:
            mode: _Recording | None = getattr(running, "mode", None)
            running.mode = None
            if mode is not None and mode is current_function_mode():
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        @uncompiled
        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is not attention:
                return
            leave()  # what an interrupt by the keyboard left behind
            if record.wanted(names):
                running.mode = _Recording(maps, record)  # type: ignore[arg-type]
                running.mode.__enter__()

        @uncompiled
        def end(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if module is attention:
                leave()

        return [attention.register_forward_pre_hook(begin), attention.register_forward_hook(end, always_call=True)]


class _Recording(TorchFunctionMode):
    """While it is entered, the products inside ``F.multi_head_attention_forward`` with the maps' weights are recorded.

    The mode is needed because that function is one call to whoever overrides torch functions, and the module reaches
    it by its global name.
    """

    def __init__(self, maps: Sequence[AttentionLayer], record: Record) -> None:
        super().__init__()
        self._maps = maps
        self._record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        attend = func is F.multi_head_attention_forward
        return (self._attend if attend else func)(*args, **(kwargs or {}))

    @uncompiled
    def _attend(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        samples = query.shape[1] if query.dim() == 3 else 1
        return attention_with(self._linear(samples))(query, *args, **kwargs)

    def _linear(self, samples: int) -> Callable[..., Tensor]:
        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out = F.linear(x, weight, bias)
            found = [(one, columns) for one in self._maps if (columns := one.columns(weight)) is not None]
            if found:
                inputs = samples_first(x.detach(), samples)

                def split(gradients: Sequence[Tensor | None]) -> Sequence[Part]:
                    g = samples_first(gradients[0], samples)  # type: ignore[arg-type]
                    return [Part(one, inputs, g[..., columns]) for one, columns in found]

                self._record([one.name for one, _ in found], [out], split)
            return out

        return linear


def samples_first(tensor: Tensor, samples: int) -> Tensor:
    """(L, N, E), or (L N, E), as (N, L, E); without samples there are no locations either."""
    locations = tensor.numel() // max(samples * tensor.shape[-1], 1)
    return tensor.reshape(locations, samples, tensor.shape[-1]).transpose(0, 1)


def _parameters(attention: nn.MultiheadAttention) -> list[tuple[str, str]]:
    """The names of the weight and the bias that hold the rows of each input map."""
    packed = attention._qkv_same_embed_dim
    return [("in_proj_weight" if packed else f"{name}_weight", "in_proj_bias") for name in INPUTS]
