"""Every symbol of torch that is private or that moves between releases, each with its fallback."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


def in_backward() -> bool:
    """True while autograd runs a backward pass in this thread (a checkpointed forward is being recomputed)."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers.

    The wrappers are known by the names of their classes, so that torch.distributed need not be imported.
    """
    while True:
        names = {cls.__name__ for cls in type(model).__mro__}
        if "DistributedDataParallel" in names and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        elif "OptimizedModule" in names and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """True where ``module.compile()`` or ``torch.compile(module)`` was applied to this very module."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def open_compiled_code() -> Callable[[], None]:
    """Make compiled code fit for capture: its graphs may go backward twice, and hooks that come now are seen.

    Compiled code ignores hooks that were registered after its first call (``skip_nnmodule_hook_guards``), so all of it
    is dropped, to be compiled anew at the next call.

    Returns:
        What gives the setting back, and drops the code with the hooks in it.
    """
    functorch = importlib.import_module("torch._functorch.config")
    before = getattr(functorch, "donated_buffer", None)

    def donate(value: bool | None) -> None:
        if before is not None:
            functorch.donated_buffer = value  # type: ignore[attr-defined]
        torch.compiler.reset()

    donate(False)
    return lambda: donate(before)


def clean_name(name: str) -> str:
    """A module's name without the segments that torch.compile and activation checkpointing insert."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def is_uninitialized(parameter: object) -> bool:
    """True for the parameters of lazy modules before their first forward."""
    return isinstance(parameter, UninitializedTensorMixin)


GradientEdge = torch.autograd.graph.GradientEdge


def gradient_edge(tensor: Tensor) -> GradientEdge:
    """Where the gradient of ``tensor`` arrives in the graph, whatever is done to the tensor in place afterwards."""
    return torch.autograd.graph.get_gradient_edge(tensor)
