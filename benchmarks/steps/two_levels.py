"""Two levels over one level at the very settings of the race's result."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.page import table
from benchmarks.steps.one_level import CYCLES, shown, verdict
from benchmarks.steps.problems import Sizes, autoencoder
from benchmarks.steps.runs import OurRun, race_settings
from benchmarks.steps.timing import Spread, measure, ratio
from kfac_dist import CoarseConfig

ONE = "one level"
TARGETS = {"layer_step": 1.15, "layer_step_momentum": 1.15, "layer_step_residual": 1.25}
HEAD = ("", "m", "B_c", "updates every", "mean step, ms", "over one level (quartiles)", "target", "")


def compare(sizes: Sizes, levels: Mapping[str, CoarseConfig], rounds: int) -> list[list[str]]:
    """Rows of the table: one level, and every coarse level over it."""
    settings, problem = race_settings(), autoencoder(sizes, sizes.batch)
    runs = [
        OurRun(name, problem, settings.fine, level, settings.optimizer)
        for name, level in [(ONE, None), *levels.items()]
    ]
    times = measure(runs, rounds)
    found = []
    for each in runs:
        for every in CYCLES:
            mean = f"{Spread.of(times[each.name].cycles(every)).median:.1f}"
            if each.name == ONE:
                found.append([ONE, "", "", str(every), mean, "1", "", ""])
                continue
            over, target = ratio(times[each.name], times[ONE], every), TARGETS.get(each.name)
            size = [f"{each.kfac.metrics[f'coarse/{what}']:.0f}" for what in ("dimension", "samples")]
            wanted = [f"{target:g}", verdict(over.median, target)] if target else ["", ""]
            found.append([each.name, *size, str(every), mean, shown(over), *wanted])
    return found


def section(sizes: Sizes, rounds: int) -> str:
    """The targets; what other spaces cost, and how the interval matters, have programs of their own."""
    settings = race_settings()
    coarse, fine = settings.coarse, ", ".join(f"{name} {value}" for name, value in settings.fine.items())
    return "\n".join(
        [
            "`configs/mnist_autoencoder_two_level.yaml`: "
            f"max_samples {coarse.max_samples}, every_n_steps {coarse.every_n_steps}, coarse damping {coarse.damping}; "
            f"{fine}; batch {sizes.batch}. An adaptive damping evaluates the loss every five steps, twice. "
            "Other spaces: `python -m benchmarks.coarse_cost`; other intervals and samples: `coarse_interval`.\n",
            table(HEAD, compare(sizes, {name: settings.with_space(name) for name in TARGETS}, rounds)),
        ]
    )
