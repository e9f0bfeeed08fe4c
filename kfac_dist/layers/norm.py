"""LayerNorm, RMSNorm, GroupNorm, BatchNorm and InstanceNorm: scale and shift, y = scale * xhat + shift.

xhat is the input as the module normalises it. A sample's gradient, (sum_t xhat_t g_t, sum_t g_t) over its locations t,
is exact, and so is the block that is made of it: the whole of it ("full"), its 2 x 2 blocks of one channel each
("channel", hence the order of Theta: scale and shift of channel 0, then of channel 1, ..), or its diagonal.

BatchNorm couples the samples of a batch. Its statistics are taken as constants, as if the module were in evaluation
mode with the statistics of this batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_dist.config import LayerOptions
from kfac_dist.factors import FactorShape, statistics_dtype
from kfac_dist.layers.base import layers
from kfac_dist.layers.joint import JointLayer
from kfac_dist.layers.watch import Record, watch_calls


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)


def _rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, None, norm.eps)


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, None, None, norm.eps)


def _batch_norm(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    if norm.training or norm.running_mean is None:
        return F.batch_norm(x, None, None, None, None, True, 0.0, norm.eps)
    return F.batch_norm(x, norm.running_mean, norm.running_var, None, None, False, 0.0, norm.eps)


def _instance_norm(norm: nn.InstanceNorm1d, x: Tensor) -> Tensor:
    if norm.training or not norm.track_running_stats:
        return F.instance_norm(x, None, None, None, None, True, 0.0, norm.eps)
    return F.instance_norm(x, norm.running_mean, norm.running_var, None, None, False, 0.0, norm.eps)


KINDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
}

LOCATIONS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
"""How many dimensions follow the channels, for the norms that may have no batch dimension before them."""


@layers.register("norm")
class NormLayer(JointLayer):
    """The trainable scale and shift of a norm; its recorded input is xhat, in the layout of the output."""

    def __init__(self, name: str, module: nn.Module) -> None:
        own = module._parameters.items()
        super().__init__(name, module, [key for key, value in own if value is not None and value.requires_grad])
        self._kind = next(kind for kind in KINDS if isinstance(module, kind))
        self._normalise = KINDS[self._kind]
        # The dimensions of scale and shift are the last ones of the input; or there is one, behind the batch.
        self._trailing = self.parameters[0].dim() if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 0
        self.channels = self.parameters[0].numel()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        if isinstance(module, nn.SyncBatchNorm):
            return "SyncBatchNorm normalises with the samples of other processes"
        kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
        if kind is None:
            return ""
        if type(module).forward is not kind.forward:
            return f"{type(module).__name__} is a {kind.__name__} with a forward of its own"
        if "weight" not in module._parameters or hasattr(module, "parametrizations"):
            return "its scale or shift is computed from other parameters (a parametrization)"
        return None

    def configure(self, options: LayerOptions) -> str | None:
        """See :meth:`Layer.configure`."""
        blocks = {"full": 1, "channel": self.channels, "diagonal": self.input_dim}[options.norm_blocks]
        self.factors["A"] = FactorShape(1, self.input_dim, blocks)
        return super().configure(options)

    def watch(self, record: Record) -> list[RemovableHandle]:
        """See :meth:`Layer.watch`."""
        return watch_calls(self, record, prepare=self.normalised)

    @torch.no_grad()
    def normalised(self, x: Tensor) -> Tensor:
        """The input of the module's call that has just been made, as xhat in at least float32."""
        return self._normalise(self.module, x.to(statistics_dtype(x.dtype)))

    def leading(self, x: Tensor) -> int:
        """See :meth:`Layer.leading`: what a norm over the last dimensions keeps."""
        return x.dim() - self._trailing if self._trailing else 1

    # -- scale and shift ------------------------------------------------------------------------------------------

    def to_matrix(self, *parts: Tensor | None) -> Tensor:
        """Scale and shift, channel by channel: (1, 1, p)."""
        return torch.stack([part.reshape(-1) for part in parts if part is not None], dim=-1).view(1, 1, -1)

    def parts(self, theta: Tensor) -> list[Tensor]:
        """See :meth:`Layer.parts`."""
        columns = theta.reshape(self.channels, -1).unbind(-1)
        return [column.reshape(p.shape) for column, p in zip(columns, self.parameters, strict=True)]

    def _axis(self, x: Tensor) -> int:
        """The dimension of the channels, for norms over channels; an InstanceNorm may lack the batch."""
        return x.dim() - LOCATIONS[self._kind] - 1 if self._kind in LOCATIONS else 1

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`; ``x`` is xhat."""
        out = torch.zeros_like(x)
        for name, part in zip(self.names, self.parts(theta), strict=True):
            if not self._trailing:
                part = part.view(-1, *[1] * (x.dim() - self._axis(x) - 1))
            out = out + (part * x if name == "weight" else part)
        return out

    def sample_gradients(self, x: Tensor, g: Tensor, samples: int) -> Tensor:
        """See :meth:`JointLayer.sample_gradients`; ``x`` is xhat.

        Raises:
            ValueError: samples cannot be told apart.
        """
        sums = [self._sum(x * g if name == "weight" else g, samples) for name in self.names]
        return torch.stack(sums, dim=-1).flatten(1)

    def _sum(self, t: Tensor, samples: int) -> Tensor:
        """The sums over the locations of each sample, (samples, channels)."""
        if self._trailing:
            rows = t.reshape(-1, self.channels)
        else:
            t = t if self._axis(t) else t[None]
            rows = t.flatten(2).sum(2) if t.dim() > 2 else t
        if len(rows) % samples:
            raise ValueError(
                f"layer {self.name!r} has an output of shape {tuple(t.shape)} for {samples} samples: its samples "
                "cannot be told apart. Put the batch first, or add the layer to skip_layers"
            )
        return rows.view(samples, -1, self.channels).sum(1)
