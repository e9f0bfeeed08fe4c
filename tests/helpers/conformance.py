"""The conformance table: the largest error of every check of every layer family, for ``pytest --conformance``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kfac_dist.layers import Layer, layers

ERRORS: dict[tuple[str, str], float] = {}


def agree(subject: Layer | str, check: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Assert that ``found`` is ``wanted`` to ``tolerance`` times its largest entry, or 1; and note how near it is.

    Args:
        subject: the layer, noted under its family; or what else was checked.
        check: what was compared.
        found: a float64 tensor.
        wanted: the reference.
        tolerance: the bound.
    """
    name = subject if isinstance(subject, str) else next(k for k in layers if isinstance(subject, layers[k]))
    assert found.shape == wanted.shape
    if not wanted.numel():
        return
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))
    assert error <= tolerance, f"{name}: {check} is off by {error:.2g}, more than {tolerance:.2g}"
    ERRORS[name, check] = max(ERRORS.get((name, check), 0.0), error)


def table() -> Iterator[str]:
    """The lines of the table, in markdown."""
    checks = list(dict.fromkeys(check for _, check in ERRORS))
    yield "| largest error, float64 | " + " | ".join(checks) + " |"
    yield "|---" * (len(checks) + 1) + "|"
    for name in dict.fromkeys(name for name, _ in ERRORS):
        cells = (ERRORS.get((name, check)) for check in checks)
        yield f"| {name} | " + " | ".join("" if cell is None else f"{cell:.1e}" for cell in cells) + " |"
