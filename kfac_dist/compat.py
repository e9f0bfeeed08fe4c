"""Every symbol of torch that is private or that moves between releases, each with its fallback."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode


def in_backward() -> bool:
    """True while autograd runs a backward pass in this thread (a checkpointed forward is being recomputed)."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def in_transform() -> bool:
    """True inside of ``torch.func``'s transforms, whose tensors are wrappers that no hook may keep."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of DistributedDataParallel, torch.compile and Fabric.

    The wrappers are known by the names of their classes, so that torch.distributed need not be imported.
    """
    while True:
        names = {cls.__name__ for cls in type(model).__mro__}
        holds_module = names & {"DistributedDataParallel", "_FabricModule"}
        if holds_module and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        elif "OptimizedModule" in names and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


def ignored_by_ddp(model: nn.Module) -> frozenset[str] | None:
    """Names of the parameters that a DistributedDataParallel around ``model`` leaves alone; None: nothing was said."""
    if hasattr(unwrap(model), _IGNORED_BY_DDP):
        return frozenset(getattr(unwrap(model), _IGNORED_BY_DDP))
    wrapped = any(cls.__name__ == "DistributedDataParallel" for cls in type(model).__mro__)
    return frozenset() if wrapped else None


def let_ddp_ignore(model: nn.Module, names: Iterable[str]) -> Callable[[], None]:
    """Make a DistributedDataParallel that is yet to be built around ``model`` leave these parameters alone, too.

    Returns:
        What takes it back, for the next one.
    """
    before = getattr(model, _IGNORED_BY_DDP, None)
    setattr(model, _IGNORED_BY_DDP, sorted({*names, *(before or ())}))

    def restore() -> None:
        if before is None:
            model.__dict__.pop(_IGNORED_BY_DDP, None)
        else:
            setattr(model, _IGNORED_BY_DDP, before)

    return restore


def is_compiled(module: nn.Module) -> bool:
    """True where ``module.compile()`` or ``torch.compile(module)`` was applied to this very module."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


Called = TypeVar("Called", bound=Callable[..., Any])


def uncompiled(function: Called) -> Called:
    """A decorator: torch.compile leaves ``function`` alone, with its type as it is (torch's own has none)."""
    return cast(Called, torch.compiler.disable(function))


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


def current_function_mode() -> TorchFunctionMode | None:
    """The innermost mode that is entered in this thread."""
    mode: TorchFunctionMode | None = torch.overrides._get_current_function_mode()
    return mode


def attention_with(linear: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """``F.multi_head_attention_forward`` with ``linear`` in the place of ``F.linear``, computing the same bit by bit.

    It is the same code with names of its own, so that nothing is changed for anybody else. Where a tensor or an active
    ``torch.device`` overrides the whole function, it is this one that they are handed.
    """
    names = dict(vars(F)) | {"linear": linear}
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        function = names.get(name)
        if isinstance(function, FunctionType):
            copied = FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)
            copied.__kwdefaults__ = function.__kwdefaults__
            names[name] = copied
    attend: Callable[..., tuple[Tensor, Tensor | None]] = names["multi_head_attention_forward"]
    return attend


class _FullFloat32:
    """Keeps TF32 and bfloat16 out of float32 products while anybody is inside; the settings belong to the process.

    The first to enter notes what the user has chosen and the last to leave gives it back, so that threads and nested
    blocks do not take one another's setting for the user's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._legacy: str | None = None
        self._chosen: list[tuple[Any, str]] = []

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._chosen = [(place, place.fp32_precision) for place in _precision_places(torch.cuda.is_initialized())]
            self._legacy = _legacy_precision()
            if self._legacy in (None, "highest") and all(p in ("ieee", "none") for _, p in self._chosen):
                self._chosen = []  # nothing to do, as nearly always
            if self._legacy not in (None, "highest"):  # torch refuses to read TF32 flags where old and new ones differ
                torch.set_float32_matmul_precision("highest")
            for place, precision in self._chosen:
                if precision not in ("ieee", "none"):
                    place.fp32_precision = "ieee"

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            if self._legacy not in (None, "highest"):
                torch.set_float32_matmul_precision(self._legacy)
            for place, precision in self._chosen:
                if place.fp32_precision != precision:
                    place.fp32_precision = "none"  # now it takes after its backend again, as it may have done before
                if place.fp32_precision != precision:
                    place.fp32_precision = precision


def _legacy_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has mixed it with the settings by backend: those count
        return None


@cache
def _precision_places(with_cudnn: bool) -> list[Any]:
    """Where a backend's precision of float32 products is set: objects with an attribute ``fp32_precision``."""
    backends = torch.backends
    places = [(backends.mkldnn, "matmul"), (backends.mkldnn, "conv"), (backends.cuda, "matmul")]
    if with_cudnn:  # its own default is TF32, and once it is written it follows no other setting
        places.append((backends.cudnn, "conv"))
    found = [getattr(backend, operation, None) for backend, operation in places]
    return [place for place in found if hasattr(place, "fp32_precision")]


_full_float32 = _FullFloat32()


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 tensors are float32 ones inside, whatever ``torch.set_float32_matmul_precision`` says.

    A user chooses TF32 or bfloat16 for the network; statistics and factorisations would lose positive definiteness.
    """
    _full_float32.enter()
    try:
        yield
    finally:
        _full_float32.leave()
