"""Lines of runs that never ran."""

from __future__ import annotations


def made(
    rate: float, end: str = "done", epochs: int = 10, epoch_seconds: float = 6.0, share: float = 1.0
) -> list[dict]:
    """A run whose loss is 1 / (1 + rate * epochs) after every epoch."""
    lines: list[dict] = [{"run": {}, "torch": "2"}, {"batch_size": 256, "samples": [4500, 500]}]
    for epoch in range(epochs + 1):
        loss, seconds = 1 / (1 + rate * epoch), epoch_seconds * epoch
        clock = {"step": 18 * epoch, "seconds": seconds, "cpu_seconds": share * seconds}
        lines += [{"epoch": epoch, **clock, "loss": loss, "val_loss": 2 * loss}]
    return [*lines, lines[-1] | {"end": end}]
