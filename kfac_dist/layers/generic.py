"""Any module with parameters of its own that no other family treats: the diagonal of its Fisher block.

The gradients of single samples come from repeating the module's forward (:mod:`kfac_dist.layers.repeat`). A module is
one unit with the parameters behind its parametrizations and in its ParameterLists; its other children are theirs.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_dist.compat import uncompiled
from kfac_dist.factors import FactorShape
from kfac_dist.layers.base import layers
from kfac_dist.layers.joint import JointLayer
from kfac_dist.layers.repeat import Repetition
from kfac_dist.layers.watch import Part, Record, silenced


def attached(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children that only hold parameters for ``module``: its parametrizations, ParameterLists and -Dicts."""
    kinds = (nn.ParameterList, nn.ParameterDict)
    if isinstance(module, kinds):
        return []
    children = module._modules.items()
    return [(name, c) for name, c in children if c is not None and (name == "parametrizations" or isinstance(c, kinds))]


def unit(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that belong to ``module`` itself, by their (dotted) names in it."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    for prefix, child in attached(module):
        own |= child.named_parameters(prefix)
    return own


class Values(dict[str, Tensor]):
    """Copies of a module's parameters, and what tells whether the parameters are still the same."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__({name: p.detach().clone() for name, p in module.named_parameters()})
        self.versions = versions(module)


def versions(module: nn.Module) -> list[tuple[int, int]]:
    """Numbers that differ as soon as a parameter does."""
    return [(p._version, p.data_ptr()) for p in module.parameters()]


@layers.register("generic")
class GenericLayer(JointLayer):
    """The trainable parameters of one unit; its first recorded call decides whether it can be treated."""

    last_resort = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module, [key for key, parameter in unit(module).items() if parameter.requires_grad])
        self.factors = {"A": FactorShape(1, self.input_dim, self.input_dim)}
        self._tried = False
        self._batched = self._forward_mode = True
        self._latest: weakref.ref[Values] | None = None
        self._values: Values | None = None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`; a module without a forward, or with one that cannot be repeated, is refused."""
        if type(module).forward is nn.Module.forward:
            return "it has no forward: another module computes with its parameters"
        inputs = _required_inputs(module)
        if inputs > 1:
            return f"its forward takes {inputs} inputs"
        if any(parameter.is_complex() for parameter in unit(module).values()):
            return "it has complex parameters"
        return next((reason for reason in map(_not_repeatable, module.modules()) if reason), None)

    @classmethod
    def claims(cls, module: nn.Module) -> Sequence[nn.Module]:
        """See :meth:`Layer.claims`."""
        return [part for _, child in attached(module) for part in child.modules()]

    # -- calls ----------------------------------------------------------------------------------------------------

    def watch(self, record: Record) -> list[RemovableHandle]:
        """See :meth:`Layer.watch`."""

        @uncompiled
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if module is not self.module or silenced() or self.trouble is not None or not record.wanted([self.name]):
                return
            inputs = [value for value in (*args, *kwargs.values()) if value is not None]
            if not self._tried and not (isinstance(output, Tensor) and output.numel() == 0):  # without samples: later
                self.trouble = self._trouble(inputs, output)
                self._tried = True
            usable = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            if self.trouble is None and usable:
                called, x = self._as_it_is(), inputs[0].detach().clone()  # in-place operations may come after it
                record([self.name], [output], lambda gradients: [Part(called, x, gradients[0])])  # type: ignore[list-item,arg-type]

        return [self.module.register_forward_hook(hook, with_kwargs=True)]

    def _trouble(self, inputs: list[Any], output: object) -> str | None:
        """Why a call like this one cannot be treated; None where its first samples, repeated alone, give its output."""
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            return f"it was called with {', '.join(type(value).__name__ for value in inputs)}, not with one tensor"
        if not isinstance(output, Tensor):
            return f"it returned {type(output).__name__}, not a tensor"
        x, out = inputs[0].detach()[:2], output.detach()[:2]
        if not x.dim() or not out.dim() or inputs[0].shape[0] != output.shape[0]:
            shapes = f"{tuple(inputs[0].shape)} to {tuple(output.shape)}"
            return f"it does not keep samples in the first dimension: it maps {shapes}"
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            before = _random_state(x.device)
            reason = self._cannot_repeat(x, out)
            random = not torch.equal(before, _random_state(x.device))
        return "its forward is random" if random else reason

    def _cannot_repeat(self, x: Tensor, out: Tensor) -> str | None:
        direction = self.parts(torch.ones(self.shape, dtype=self.dtype, device=self.device))
        for self._batched, self._forward_mode in ((True, True), (False, True), (True, False), (False, False)):
            repeat = self._as_it_is().repetition
            try:
                found = repeat.outputs(x)
                list(repeat.gradients(x[:, None], torch.ones_like(out)[:, None]))
                repeat.along(x, dict(zip(self.names, direction, strict=True)))
            except Exception as error:  # whatever a module of somebody else's raises
                reason = f"its forward cannot be repeated ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
                continue
            tolerance = torch.finfo(out.dtype).eps ** 0.5 * float(out.abs().max())
            same = found.shape == out.shape and torch.allclose(found.to(out.dtype), out, rtol=0, atol=tolerance)
            return None if same else "its forward gives something else for a sample alone, or when it is repeated"
        return reason

    def _as_it_is(self) -> GenericLayer:
        """This layer with the parameters that it has now: later products belong to this call, whatever is trained."""
        values = self._latest() if self._latest is not None else None
        if values is None or values.versions != versions(self.module):
            values = Values(self.module)
            self._latest = weakref.ref(values)
        called = copy.copy(self)
        called._values = values
        return called

    @property
    def repetition(self) -> Repetition:
        """The module's forward at the values of the recorded call, or of now."""
        values = self._values if self._values is not None else Values(self.module)
        return Repetition(self.module, self.names, values, self._batched, self._forward_mode)

    # -- products -------------------------------------------------------------------------------------------------

    def _by_sample(self, x: Tensor, g: Tensor, samples: int) -> Iterator[Tensor]:
        if len(x) % samples:
            raise ValueError(
                f"layer {self.name!r} has an input of shape {tuple(x.shape)} for {samples} samples: its samples cannot "
                "be told apart. Put the batch first, or add the layer to skip_layers"
            )
        cut = [t.reshape(samples, -1, *t.shape[1:]) for t in (x, g)]
        return self.repetition.gradients(*cut)

    def sample_gradients(self, x: Tensor, g: Tensor, samples: int) -> Tensor:
        """See :meth:`JointLayer.sample_gradients`."""
        return torch.cat(list(self._by_sample(x, g, samples)))

    def gradient_moment(self, x: Tensor, g: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
        """See :meth:`Layer.gradient_moment`; only some samples' gradients exist at once."""
        total = torch.zeros(self.input_dim, dtype=dtype, device=g.device)
        for rows in self._by_sample(x, g, samples):
            total += rows.to(dtype).square().sum(0)
        return total.view(-1, 1, 1)

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        return self.repetition.gradient(x, g)[None, None]

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """J Theta: the derivative of the forward along Theta, which is linear in it where the forward is not."""
        parts = [part.to(self.dtype) for part in self.parts(theta)]
        return self.repetition.along(x, dict(zip(self.names, parts, strict=True)))


def _required_inputs(module: nn.Module) -> int:
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return 1  # the first call will tell
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) - 1


def _not_repeatable(module: nn.Module) -> str | None:
    """Why a forward with this module in it cannot be repeated sample by sample; None where nothing is known."""
    kind = type(module).__name__
    rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
    if (isinstance(rate, float) and rate > 0) or isinstance(module, nn.RReLU):
        return f"its forward is random ({kind})"
    over_batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if over_batch or (isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats):
        return f"its forward changes buffers or couples samples ({kind})"
    if any(type(hook).__module__.startswith("torch.nn.utils") for hook in module._forward_pre_hooks.values()):
        return "a hook of torch.nn.utils computes its weight; use torch.nn.utils.parametrizations"
    return None


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
