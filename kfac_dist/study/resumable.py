"""A DataLoader that goes on within an epoch when a training is resumed, as Lightning offers it to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """Counts the batches that it serves; a resumed epoch gets the rest of them, in the same order.

    Lightning keeps :meth:`state_dict` in its checkpoints, rank 0's. Whatever the order is drawn from comes out again:
    the sampler's own seed, or the global random stream, which then goes on from where it was when the state was taken.
    It takes the arguments of ``torch.utils.data.DataLoader``; the batches that are skipped are fetched and dropped.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._served = 0
        self._begin: torch.Tensor | None = None
        self._loaded: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        loaded, self._loaded = self._loaded, None
        self._served, self._begin = 0, None
        return self._serve(super().__iter__(), loaded)

    def _serve(self, batches: Iterator[Any], loaded: dict[str, Any] | None) -> Iterator[Any]:
        """``batches``, without those that were served before the state ``loaded`` was taken."""
        if loaded is not None:
            torch.set_rng_state(loaded["begin"])
        self._begin = torch.get_rng_state()  # the sampler draws its order from here, with the first batch
        while loaded is not None and self._served < loaded["batches"]:
            next(batches)
            self._served += 1
        if loaded is not None:
            torch.set_rng_state(loaded["now"])
        for batch in batches:
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches served in this epoch, and the random stream before the first of them and now; {} between epochs."""
        if self._begin is None or not 0 < self._served < len(self):
            return {}
        return {"batches": self._served, "begin": self._begin, "now": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next epoch begins where ``state`` was taken."""
        self._loaded = state or None
