"""The second moment of the patches of a convolution with stride 1 and dilation 1, without a patch being cut out.

The block of kernel places k and k' is the sum over images and locations o of x[o + k] x[o + k']^T. Were every location
summed at which a patch meets the map, it would depend on d = k' - k alone: it would be the map's autocorrelation R(d),
which is the weight gradient of a convolution whose input and output gradient are both x. There are (2 K_h - 1)
(2 K_w - 1) of the d, half of them transposes of the others, in the place of (K_h K_w)^2 pairs. What hangs over the
border further than the padding allows is formed from its patches, of which few rows lie in the map, and subtracted.

So the result is that of the patches up to rounding, in a K_h K_w-th of their memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """The patches of maps, one for every image and location.

    Attributes:
        maps: (B, C, H, W).
        kernel: rows and columns, K_h and K_w.
        padding: zeros (before, after) the rows, and the columns.
    """

    maps: Tensor
    kernel: Pair
    padding: tuple[Pair, Pair]

    @property
    def locations(self) -> Pair:
        """Rows and columns of the output."""
        height, width = self.maps.shape[2:]
        (rows, columns), (vertical, horizontal) = self.kernel, self.padding
        return height + sum(vertical) - rows + 1, width + sum(horizontal) - columns + 1

    @property
    def count(self) -> int:
        """B T."""
        return len(self.maps) * self.locations[0] * self.locations[1]

    @property
    def pays(self) -> bool:
        """Whether :meth:`moment` takes fewer than half the products of the patches: they run at half the speed.

        Never where a map is shorter than a patch less one place: patches hang over two opposite borders there.
        """
        (rows, columns), (height, width) = self.kernel, self.maps.shape[2:]
        if rows * columns == 1 or height < rows - 1 or width < columns - 1:
            return False
        vertical, horizontal = self._overhang()
        autocorrelation = height * width * rows * (2 * columns - 1)
        border = (width + columns - 1) * sum((n * columns) ** 2 for n in (*vertical[0], *vertical[1]))
        border += self.locations[0] * sum((n * rows) ** 2 for n in (*horizontal[0], *horizontal[1]))
        pays: bool = 2 * (autocorrelation + border) < self.locations[0] * self.locations[1] * (rows * columns) ** 2
        return pays

    def moment(self) -> Tensor:
        """Sum of p p^T over the patches p, (C K_h K_w, C K_h K_w) in the order of ``F.unfold``."""
        (rows, columns), maps = self.kernel, self.maps
        channels, R = maps.shape[1], self._autocorrelation()
        blocks = R.new_empty(channels, rows, columns, channels, rows, columns)
        for i, j in product(range(rows), range(columns)):  # at d = k' - k for k = (i, j) and every k'
            blocks[:, i, j] = R[:, :, rows - 1 - i : 2 * rows - 1 - i, columns - 1 - j : 2 * columns - 1 - j]
        vertical, horizontal = self._overhang()
        # Above and below, wherever a patch meets the map; left and right, in the rows of the locations.
        _subtract(blocks, maps, vertical, (columns - 1, columns - 1))
        before, after = (min(pad, rows - 1) for pad in self.padding[0])
        _subtract(blocks.permute(0, 2, 1, 3, 5, 4), maps.mT, horizontal, (before, after))
        return blocks.view(channels * rows * columns, -1)

    def sum(self) -> Tensor:
        """Sum of the patches, (C K_h K_w,): what each place of the kernel sees."""
        seen = F.pad(self.maps.sum(0), (*self.padding[1], *self.padding[0]))
        seen = seen.unfold(1, self.locations[0], 1).sum(-1).unfold(2, self.locations[1], 1).sum(-1)
        return seen.flatten()

    def _autocorrelation(self) -> Tensor:
        """R(d)[c, c'] = sum of x[c, q] x[c', q + d] for |d| below the kernel, (C, C, 2 K_h - 1, 2 K_w - 1)."""
        (rows, columns), maps = self.kernel, self.maps
        weight = maps.new_empty(1).expand(maps.shape[1], maps.shape[1], rows, 2 * columns - 1)  # no value matters
        how = ((1, 1), (0, columns - 1), (1, 1), False, (0, 0), 1, (False, True, False))
        half = torch.ops.aten.convolution_backward(maps, F.pad(maps, (0, 0, 0, rows - 1)), weight, None, *how)[1]
        return torch.cat([half[:, :, 1:].flip(2, 3).transpose(0, 1), half], dim=2)

    def _overhang(self) -> tuple[tuple[range, range], tuple[range, range]]:
        """Rows and columns, before and after: how much of the patches lies in the map that are no locations."""
        vertical, horizontal = (
            (range(1, k - before), range(1, k - after))
            for k, (before, after) in zip(self.kernel, self.padding, strict=True)
        )
        return vertical, horizontal


def _subtract(blocks: Tensor, maps: Tensor, overhang: tuple[range, range], across: Pair) -> None:
    """Subtract the moment of patches above and below the locations from ``blocks``, in place.

    Args:
        blocks: the moment, (C, K_h, K_w, C, K_h, K_w).
        maps: (B, C, H, W).
        overhang: how many rows of the map are in those above, and in those below.
        across: padding of the columns.
    """
    rows, columns = blocks.shape[1:3]
    for kernel_rows, map_rows in _borders(rows, maps.shape[2], overhang):
        cut = F.pad(maps[:, :, map_rows], across).unfold(3, columns, 1)  # (B, C, n, locations, K_w)
        flat = cut.permute(1, 2, 4, 0, 3).flatten(3).flatten(0, 2)
        part = blocks[:, kernel_rows, :, :, kernel_rows]
        part -= (flat @ flat.mT).view(part.shape)


def _borders(rows: int, height: int, overhang: tuple[range, range]) -> Iterator[tuple[slice, slice]]:
    """Which rows of the kernel lie on which rows of the map."""
    for n in overhang[0]:
        yield slice(rows - n, rows), slice(0, n)
    for n in overhang[1]:
        yield slice(0, n), slice(height - n, height)
