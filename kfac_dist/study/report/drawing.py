"""How the pictures look: one line style per method throughout a report, and small files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from kfac_dist.study.methods import METHODS, method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours without their yellow, which is faint on white, then those of Tol's muted scheme that are
# furthest from them: colour-blind readers tell them apart.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222"),
    *("#882255", "#999933", "#332288", "#AA4499", "#117733", "#661100", "#888888"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
DPI, SHADES = 110, 128
WIDTH = 7.2
LABEL = 38
"""Characters of a label's line."""


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Method -> its line: ours solid, the others dashed; colour and marker both tell methods apart."""
    known = [*METHODS, *(name for name in names if name not in METHODS)]
    found = {}
    for ours in (True, False):
        for i, name in enumerate(n for n in known if method(n).ours == ours):
            found[name] = {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": "-" if ours else (0, (4, 2)),
                "markersize": 4.5,
                "linewidth": 1.6,
                "markerfacecolor": COLOURS[i % len(COLOURS)] if ours else "white",
            }
    return found


def label(name: str) -> str:
    """A method's title, short enough for a legend of two columns; long ones take several lines."""
    words = method(name).title.replace("two-level K-FAC, ", "two-level ").replace(", error_minimizing", "")
    return textwrap.fill(words, LABEL, subsequent_indent="  ")


def panel(height: float, title: str) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(which="both", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def logarithmic(axes: Axes, top: float = math.inf) -> None:
    """A logarithmic axis with numbers as one reads them, up to ``top`` at most."""
    axes.set_yscale("log")
    axes.set_ylim(top=min(axes.get_ylim()[1], top))
    low, high = axes.get_ylim()
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 30 else (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, place: ""))


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """In the order in which the lines were drawn."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, handlelength=3
        )


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG with a palette, which makes a third of the file."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(SHADES).save(path, optimize=True)
    return path
