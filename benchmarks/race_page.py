"""What the race's page says, computed from the runs: losses at equal epochs and seconds, and each target's verdict."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from kfac_dist.study.methods import method
from kfac_dist.study.readings import Runs, after_epochs, after_seconds, median, seconds_to, training_loss
from kfac_dist.study.report.conditions import quiet_words
from kfac_dist.study.report.words import text
from kfac_dist.study.run import Line
from kfac_dist.study.suite import Entry

if TYPE_CHECKING:
    from kfac_dist.study.protocol import Protocol

ADAM_SECONDS, WITHIN_SECONDS = 60.0, 20.0
AFTER_EPOCHS, BELOW = 10, 0.08
AHEAD = 0.10
NOBODY = "nobody"


@dataclass
class Curves:
    """What the page is made of.

    Attributes:
        problem: what was trained.
        settings: method -> the settings that its trials chose.
        lines: method -> its runs.
        twin: the best two-level method, and the settings and runs of its one-level form at its own settings.
    """

    problem: Entry
    settings: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    lines: dict[str, list[list[Line]]] = field(default_factory=dict)
    twin: tuple[str, Mapping[str, Any], list[list[Line]]] | None = None


def best_two_level(curves: Curves) -> str | None:
    """The two-level method with the lowest median loss at the end of the seconds."""
    names = [name for name in curves.lines if method(name).one_level and method(name).one_level in curves.lines]
    return min(names, key=lambda name: median(curves.lines[name], training_loss), default=None)


# -- the page ----------------------------------------------------------------------------------------------------------


def spread(runs: Runs, value: Callable[..., float], *arguments: Any) -> str:
    """Median and range over the seeds."""
    values = [value(lines, *arguments) for lines in runs]
    return f"{text(statistics.median(values))} ({text(min(values))} to {text(max(values))})"


def row(title: str, runs: Runs, protocol: Protocol, adam: float) -> str:
    """One line of the table."""
    ends = [lines[-1] for lines in runs]
    cells = [title, spread(runs, after_epochs, protocol.epochs)]
    cells += [text(median(runs, after_seconds, mark)) for mark in protocol.marks[:-1]]
    cells += [spread(runs, after_seconds, mark) for mark in protocol.marks[-1:]]
    cells += [text(median(runs, seconds_to, adam), 1)]
    cells += [text(median(runs, after_epochs, protocol.epochs, "val_loss"))]
    cells += [text(median(runs, after_seconds, mark, "val_loss")) for mark in protocol.marks[-1:]]
    cells += [f"{statistics.median(1e3 * end['seconds'] / max(1, end['step']) for end in ends):.0f}"]
    cells += [f"{sum(end['end'] != 'done' for end in ends)} of {len(ends)}"]
    return "| " + " | ".join(cells) + " |"


def table(curves: Curves, protocol: Protocol, adam: float) -> list[str]:
    """All methods, the best after the last mark first."""
    heads = ["method", f"{protocol.epochs} epochs", *(f"{mark:g} s" for mark in protocol.marks)]
    heads += ["s to Adam's last", f"held-out, {protocol.epochs} epochs"]
    heads += [f"held-out, {mark:g} s" for mark in protocol.marks[-1:]] + ["ms per step", "diverged"]
    order = sorted(curves.lines, key=lambda name: median(curves.lines[name], training_loss))
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return lines + [row(method(name).title, curves.lines[name], protocol, adam) for name in order]


@dataclass(frozen=True)
class Target:
    """One target: what was wanted, what came out, and whether it was reached (None: it cannot be told)."""

    what: str
    found: str
    met: bool | None

    def line(self) -> str:
        """For the page."""
        verdict = "cannot be told" if self.met is None else "met" if self.met else "MISSED"
        return f"| {self.what} | {self.found} | {verdict} |"


def leader(curves: Curves, value: Callable[..., float], *arguments: Any, ours: bool | None = None) -> tuple[float, str]:
    """The lowest median, and whose it is."""
    names = [name for name in curves.lines if ours is None or method(name).ours == ours]
    values = [(median(curves.lines[name], value, *arguments), method(name).title) for name in names]
    return min(values, default=(math.inf, NOBODY))


def targets(curves: Curves, protocol: Protocol, adam: float) -> list[Target]:
    """The targets and what became of them."""
    epochs = protocol.epochs
    loss, ours = leader(curves, after_epochs, epochs, ours=True)
    missing = epochs != AFTER_EPOCHS
    found = [
        Target(f"below {BELOW} after {AFTER_EPOCHS} epochs", f"{ours}: {text(loss)}", None if missing else loss < BELOW)
    ]
    for rival in ("muon", "soap"):
        what = f"per epoch ahead of {method(rival).title}"
        if rival not in curves.lines:
            found.append(Target(what, "it did not run", None))
            continue
        other = median(curves.lines[rival], after_epochs, epochs)
        found.append(Target(what, f"{ours}: {text(loss)} against {text(other)}", loss < other))
    for mark in protocol.marks:
        mine, theirs = (leader(curves, after_seconds, mark, ours=side) for side in (True, False))
        said = f"{mine[1]}: {text(mine[0])}; {theirs[1]}: {text(theirs[0])}"
        told = mine[0] < theirs[0] if theirs[1] != NOBODY else None
        found.append(Target(f"ahead of everything after {mark:g} s", said, told))
    when, who = leader(curves, seconds_to, adam, ours=True)
    within = None if protocol.seconds < ADAM_SECONDS or "adam" not in curves.lines else when <= WITHIN_SECONDS
    what = f"Adam's loss after {ADAM_SECONDS:g} s ({text(adam)}) in at most {WITHIN_SECONDS:g} s"
    found.append(Target(what, f"{who}: {text(when, 1)} s", within))
    return found + two_level_targets(curves, protocol)


def two_level_targets(curves: Curves, protocol: Protocol) -> list[Target]:
    """Two levels against one: the same settings, and each form's own best ones."""
    if curves.twin is None or not protocol.marks:
        return [Target("two levels ahead of one", "no two-level method and its one-level form ran", None)]
    best, _, runs = curves.twin
    form, mark = method(best).one_level or "", protocol.marks[-1]
    two = median(curves.lines[best], after_seconds, mark)
    found = []
    for words, other in ((f"at {method(best).title}'s settings", runs), ("each at its own", curves.lines[form])):
        one = median(other, after_seconds, mark)
        gain = 1 - two / one if math.isfinite(one) else 1.0
        word = f"{abs(gain):.1%} {'lower' if gain >= 0 else 'HIGHER'}"
        said = f"{text(two)} against {text(one)}: {word}"
        what = f"two levels {AHEAD:.0%} ahead of {method(form).title} after {mark:g} s, {words}"
        found.append(Target(what, said, gain >= AHEAD))
    return found


def quiet(curves: Curves) -> str:
    """Whether the timed runs had their core to themselves."""
    runs = [lines for name in curves.lines for lines in curves.lines[name]]
    return quiet_words(runs, "wall")


def page(curves: Curves, protocol: Protocol, command: str, processes: int, left_out: Mapping[str, str]) -> str:
    """The whole page."""
    adam = median(curves.lines["adam"], after_seconds, ADAM_SECONDS) if "adam" in curves.lines else math.inf
    sample = next((lines for runs in curves.lines.values() for lines in runs), [{"torch": torch.__version__}, {}])
    begin = {"batch_size": 0, "samples": [0, 0]} | sample[1]
    lines = [
        f"# Race: {curves.problem.title}",
        "",
        f"`{command}`: {curves.problem.unit}, mean over the training samples; medians over "
        f"{len(protocol.seeds)} seeds, ranges in parentheses. Batch {begin['batch_size']}, {begin['samples'][0]:,} "
        f"samples for training and {begin['samples'][1]:,} held out, one process and one thread per run, {processes} "
        f"runs at a time. Each method: {protocol.trials} trials of {protocol.tuning_epochs} epochs, its documented "
        "default first and then quasi-random points, chosen on the training loss of another seed; then fresh seeds "
        f"until {protocol.epochs} epochs and {protocol.seconds:g} s are over. Seconds are those of the training steps, "
        "evaluations left out. Runs of one seed begin with the same weights and see the same batches. "
        f"torch {sample[0]['torch']}, {platform.machine()}. {quiet(curves)}",
        "",
        *table(curves, protocol, adam),
        "",
        "A dash: not reached. K-FAC updates factors and inverses every 10 steps, as SOAP, Shampoo and kfac-pytorch do.",
        "",
        "## Targets",
        "",
        "| target | found (medians) | verdict |",
        "|---|---|---|",
        *(target.line() for target in targets(curves, protocol, adam)),
        "",
        "## Settings that the trials chose",
        "",
        "| method | searched | fixed |",
        "|---|---|---|",
    ]
    for name, chosen in curves.settings.items():
        fixed = ", ".join(f"{k} {v}" for k, v in method(name).fixed.items())
        lines.append(f"| {method(name).title} | {', '.join(f'{k} {v:g}' for k, v in chosen.items())} | {fixed} |")
    for name, reason in left_out.items():
        if name not in curves.lines:
            lines += ["", f"{method(name).title} is left out: it {reason}."]
    return "\n".join(lines) + "\n"


def plot(curves: Curves, path: Path, epochs: int, seconds: float) -> None:
    """Median training loss against epochs and seconds, and the range over the seeds."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_xlabel("epochs")
    panels[1].set_xlabel("seconds of training")
    for index, (name, runs) in enumerate(curves.lines.items()):
        style = {"color": f"C{index % 10}", "linestyle": "-" if method(name).ours else "--"}
        grids = [float(e) for e in range(epochs + 1)], [seconds * i / 12 for i in range(13)] if seconds else [0.0]
        for axes, grid, value in zip(panels, grids, (after_epochs, after_seconds), strict=True):
            values = [[value(lines, x) for lines in runs] for x in grid]  # type: ignore[operator]
            shown = [(x, v) for x, v in zip(grid, values, strict=True) if max(v) < math.inf]
            axes.plot(
                [x for x, _ in shown], [statistics.median(v) for _, v in shown], label=method(name).title, **style
            )
            axes.fill_between(
                [x for x, _ in shown],
                [min(v) for _, v in shown],
                [max(v) for _, v in shown],
                alpha=0.15,
                color=style["color"],
            )
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_yscale("log")
    panels[0].set_ylabel(curves.problem.unit)
    panels[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
