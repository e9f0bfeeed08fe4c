"""Numbers and tables as a report writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kfac_dist.study.intervals import Interval

NEVER = "-"
INFINITE = "∞"


def text(value: float, digits: int = 4) -> str:
    """A number, or a dash for what was not reached."""
    return f"{value:.{digits}f}" if math.isfinite(value) else NEVER


def loss(value: float) -> str:
    """A loss; infinite where a run diverged."""
    if math.isinf(value):
        return INFINITE
    return f"{value:.4f}" if value >= 0.01 or value == 0 else f"{value:.2e}"


def loss_interval(interval: Interval) -> str:
    """Median and interval of a loss."""
    return f"{loss(interval.middle)} [{loss(interval.low)}, {loss(interval.high)}]"


def seconds_interval(interval: Interval) -> str:
    """Median and interval of a time; a dash for what was not reached."""
    if math.isinf(interval.middle):
        return NEVER
    return f"{interval.middle:.1f} [{interval.low:.1f}, {text(interval.high, 1)}]"


def milliseconds(value: float) -> str:
    """Of a step."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio_interval(interval: Interval) -> str:
    """Median and interval of a ratio."""
    middle, low, high = (
        INFINITE if math.isinf(v) else f"{v:.3g}" for v in (interval.middle, interval.low, interval.high)
    )
    return f"{middle} [{low}, {high}]"


def change(ratio: float) -> str:
    """What a ratio of losses means: "4.0 % lower", "12 times lower", "1.5 % higher"."""
    if ratio == 1:
        return "equal"
    if ratio == 0 or math.isinf(ratio):
        return "diverged" if ratio else "the other diverged"
    if ratio < 0.1 or ratio > 10:
        return f"{max(ratio, 1 / ratio):.3g} times {'lower' if ratio < 1 else 'higher'}"
    percent = 100 * abs(1 - ratio)
    return f"{percent:.{0 if percent >= 10 else 1}f} % {'lower' if ratio < 1 else 'higher'}"


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.0f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> list[str]:
    """A table in Markdown; the first columns hold words, the others numbers."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * names + "---:|" * (len(head) - names))
    return ["", *lines, ""]


def enumerated(words: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])
