"""The monitor's pictures, and the way to every logger: drawn on matplotlib's Figure, without pyplot and its state."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from kfac_dist.coarse_solver import CoarseSystem
from kfac_dist.spectra import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = 40
SPREAD = 20.0  # between the median and the largest: from there on the axis is logarithmic
RESOLVED = 1e-7  # smaller shares of the largest eigenvalue are rounding


def check_matplotlib() -> None:
    """Raise MisconfigurationException where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MisconfigurationException(
            "KFACMonitor draws with matplotlib, which is not installed: pip install 'kfac-dist[monitor]', or choose "
            "KFACMonitor(figures_every_n_steps=0)"
        )


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415, an optional dependency

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title)
    return figure


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps  # noqa: PLC0415, an optional dependency

    return [colormaps["viridis"](0.95 * i / max(count - 1, 1)) for i in range(count)]


def _legend(axes: Axes, count: int) -> None:
    """Beside the axes, in the colours of the layers; every k-th of many."""
    handles, labels = axes.get_legend_handles_labels()
    every = -(-count // LABELS)
    axes.legend(
        handles[::every], labels[::every], fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
    )


def draw_couplings(system: CoarseSystem, step: int) -> Figure:
    """The heat map of E_ij / sqrt(E_ii E_jj): how strongly the layers' coarse vectors interact."""
    count = len(system.blocks)
    size = count * system.count
    side = min(max(4.5, 0.28 * size + 2.5), 16.0)
    names, couplings = system.interactions()
    figure = _figure(side + 1.0, side, f"interaction of the layers, step {step}")
    axes = figure.add_subplot()
    image = axes.imshow(couplings.numpy(), cmap="RdBu_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
    places = list(range(size))
    every = -(-size // LABELS)
    axes.set_xticks(places[::every], names[::every], rotation=90, fontsize=8)
    axes.set_yticks(places[::every], names[::every], fontsize=8)
    if system.count > 1:
        axes.set_xlabel(f"{system.count} vectors for each layer: the first of all layers, then the next")
    for j in range(1, system.count):
        axes.axhline(count * j - 0.5, color="0.2", linewidth=1.0)
        axes.axvline(count * j - 0.5, color="0.2", linewidth=1.0)
    figure.colorbar(image, ax=axes, shrink=0.8, label=r"$E_{ij}\,/\,\sqrt{E_{ii}E_{jj}}$")
    return figure


def draw_spectra(spectra: Mapping[str, Spectrum], step: int) -> Figure:
    """The eigenvalues of every layer's factors in falling order; a dot where the factored damping outweighs them."""
    figure = _figure(12.0, 5.0, f"eigenvalues of the factors, step {step}")
    left, right = figure.subplots(1, 2)
    colours = _colours(len(spectra))
    for axes, side, of in ((left, "A", "inputs"), (right, "G", "output gradients")):
        for (name, spectrum), colour in zip(spectra.items(), colours, strict=True):
            values = getattr(spectrum, side)
            if values is None:
                continue
            ordered = values.flatten().sort(descending=True).values
            shown = ordered[ordered > RESOLVED * ordered[0]]
            if not len(shown):
                continue
            axes.plot(range(1, len(shown) + 1), shown.numpy(), color=colour, linewidth=1.2, label=name)
            shift = spectrum.shift(side)
            if shift is not None:
                above = max(int((shown > shift).sum()), 1)
                axes.plot(above, float(shown[above - 1]), "o", color=colour, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", title=f"{side}, of the {of}")
        axes.grid(alpha=0.3)
    left.set_ylabel("eigenvalue (dot: the last one above the damping)")
    _legend(max((right, left), key=lambda axes: len(axes.lines)), len(spectra))
    return figure


def draw_coefficients(history: Sequence[tuple[int, Mapping[str, float]]]) -> Figure:
    """Beta over time, one panel per coarse vector: keys are "layer/number of the vector"."""
    names = list(dict.fromkeys(key for _, values in history for key in values))
    layers = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
    vectors = sorted({int(name.rpartition("/")[2]) for name in names})
    colours = dict(zip(layers, _colours(len(layers)), strict=True))
    figure = _figure(10.0, 1.5 + 3.0 * len(vectors), "coefficients of the coarse vectors")
    panels = figure.subplots(len(vectors), 1, squeeze=False, sharex=True)[:, 0]
    for axes, vector in zip(panels, vectors, strict=True):
        for layer in layers:
            points = [(step, values[f"{layer}/{vector}"]) for step, values in history if f"{layer}/{vector}" in values]
            if points:
                axes.plot(
                    *zip(*points, strict=True), ".-", color=colours[layer], linewidth=1.0, markersize=3, label=layer
                )
        sizes = sorted(abs(values[key]) for _, values in history for key in values if key.endswith(f"/{vector}"))
        middle = sizes[len(sizes) // 2]
        if 0 < SPREAD * middle < sizes[-1]:
            axes.set_yscale("symlog", linthresh=middle)
        axes.axhline(0.0, color="0.6", linewidth=0.6)
        axes.set_ylabel(rf"$\beta$ of vector {vector}")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    _legend(panels[0], len(layers))
    return figure


def show(figures: Mapping[str, Figure], loggers: Iterable[Any], step: int, folder: Path) -> None:
    """Hand the figures to every logger that takes pictures, and write files for those that do not.

    Args:
        figures: name -> figure.
        loggers: the Trainer's; TensorBoard's way is ``experiment.add_figure``, that of W&B ``log_image``.
        step: of the loggers.
        folder: where the files go, also where there is no logger at all.
    """
    without = []
    known = list(loggers)
    for logger in known:
        add = getattr(getattr(logger, "experiment", None), "add_figure", None)
        send = getattr(logger, "log_image", None)
        for name, figure in figures.items():
            if add is not None:
                add(f"kfac/{name}", figure, global_step=step)
            elif send is not None:
                send(key=f"kfac/{name}", images=[_pixels(figure)], step=step)
        if add is None and send is None:
            without.append(logger)
    if without or not known:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}-{step:06d}.png")


def _pixels(figure: Figure) -> Any:
    """(height, width, 4) uint8."""
    import numpy  # noqa: PLC0415, it comes with matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415, an optional dependency

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())
