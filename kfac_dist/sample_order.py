"""Whether the samples of a batch lie where they are looked for: first, in the input and the gradient of every layer.

Sequences that lie before the samples, (S, B, ..), are moved behind them where the batch size shows it. What shapes
cannot show (S = B, windows or pairs folded into the first dimension in another order, experts that pick samples) a
trial shows: the gradient of ONE sample's logits must not reach what is taken for another sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfac_dist.layers import Part


def samples_first(part: Part, samples: int) -> Part:
    """``part`` with sequences, (S, B, ..), behind the samples: dimension 1 is as long as the batch and 0 is not."""
    layer, x, g = part
    if layer.leading(x) < 2 or x.shape[0] == samples or x.shape[1] != samples:
        return part
    return Part(layer, x.transpose(0, 1), g.transpose(0, 1))


def alone(cotangent: Tensor) -> tuple[Tensor, int]:
    """The cotangent of one sample, zero for all others, and which sample that is (one synchronisation)."""
    sample = int(cotangent.detach().flatten(1).abs().sum(1).argmax())
    kept = torch.zeros_like(cotangent)
    kept[sample] = cotangent[sample]
    return kept, sample


def spread(parts: Sequence[Part], sample: int, samples: int) -> list[str]:
    """The layers where the gradient of one sample's logits reaches more than what is taken for that sample."""
    found = []
    for layer, x, g in parts:
        if not g.dim() or g.shape[0] % samples or layer.shared(x, samples):  # these have messages of their own
            continue
        reached = g.reshape(samples, -1).ne(0).any(1)
        if bool(reached[:sample].any() | reached[sample + 1 :].any()):
            found.append(layer.name)
    return list(dict.fromkeys(found))


def couples_samples(model: nn.Module) -> bool:
    """Whether a norm over the batch is in training mode: every sample's logits depend on all samples then."""
    kind = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(module, kind) and (module.training or not module.track_running_stats) for module in model.modules()
    )
