"""``kfac-dist plan``: what K-FAC would cost on so many ranks, before a training is started."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kfac_dist.callbacks import KFAC
from kfac_dist.coarse import coarse_spaces
from kfac_dist.config import CoarseConfig, KFACConfig
from kfac_dist.costs import Forecast, Machine, Method, inversions, preconditioning, strategies
from kfac_dist.launch.calibrate import calibrate
from kfac_dist.launch.train import PROGRAM, TrainingCLI
from kfac_dist.launch.workload import workload
from kfac_dist.networks import Network, networks
from kfac_dist.one_level import wants_eigenbases

WIDTH = 150
"""Characters of a line that goes to a file or a pipe."""

COLUMNS = ("ranks", "strategy", "workers", "memory", "inversions", "bound", "precond.", "bound", "sent per step",
           "collectives", "SGD ms", "step ms", "ratio")  # fmt: skip

Plans = dict[int, dict[str, Forecast]]


def main(argv: Sequence[str]) -> int:
    """Print the plan.

    Args:
        argv: "plan" and its options; with --config, what is not its own goes to LightningCLI, as for ``fit``.

    Returns:
        0; the parser exits with 2 where it does not understand the options.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(list(argv)[1:])
    if (options.layers is None) == ("--config" not in " ".join(rest)):
        parser.error("name a layer list (--layers resnet50) or a configuration (--config FILE), one of the two")
    if options.layers is not None and rest:
        parser.error(f"unknown options beside --layers: {' '.join(rest)}")
    for name in ("world_size", "flops", "bandwidth", "batch_size", "factor_every_n_steps", "inverse_every_n_steps"):
        value = getattr(options, name)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            parser.error(f"--{name.replace('_', '-')} {value} must be above 0")
    network, method = (
        _configured(rest) if options.layers is None else (networks[options.layers](), Method(by_rows=True))
    )
    given = {"factor_every": options.factor_every_n_steps, "inverse_every": options.inverse_every_n_steps}
    method = replace(method, **{name: value for name, value in given.items() if value is not None})
    method = replace(method, by_rows=options.calibrate and method.by_rows)  # accelerators take the dense products
    machine = calibrate() if options.calibrate else Machine.from_rates(1e13, 1e10)
    if options.flops is not None:
        scaled = Machine.from_rates(options.flops, machine.bandwidth)
        machine = replace(machine, gemm=options.flops) if options.calibrate else scaled
    machine = machine if options.bandwidth is None else replace(machine, bandwidth=options.bandwidth)
    batch = options.batch_size or network.batch
    plans = {ranks: strategies(network, method, machine, ranks, batch) for ranks in sorted(set(options.world_size))}
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(table(network, method, machine, plans, batch))
    for line in limits(plans):
        console.print(line)
    if options.plot is not None:
        draw(network, plans, options.plot)
        console.print(f"{options.plot} shows the step times.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} plan",
        description="Memory, work, bytes and step time of K-FAC per rank, and where it stops scaling.",
        epilog="With --config, all other options are those of `kfac-dist fit`: --model.width=10, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--layers", choices=sorted(networks), help="a layer list, in the place of --config")
    parser.add_argument("--world-size", type=int, nargs="+", default=[1, 8, 64], help="numbers of ranks (1 8 64)")
    parser.add_argument("--flops", type=float, help="products, flops per second of a rank (1e13)")
    parser.add_argument("--bandwidth", type=float, help="bytes per second into and out of a rank (1e10)")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine's rates first")
    parser.add_argument("--batch-size", type=int, help="samples per rank")
    parser.add_argument("--factor-every-n-steps", type=int, help="in the place of the configured number")
    parser.add_argument("--inverse-every-n-steps", type=int, help="in the place of the configured number")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="step times over the numbers of ranks")
    return parser


def _configured(arguments: Sequence[str]) -> tuple[Network, Method]:
    """The model's work on one batch of its data, and the callback's settings."""
    with warnings.catch_warnings():  # the program's own arguments stand in sys.argv, and that is right
        warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter.*")
        cli = TrainingCLI(arguments, run=False, save_config_callback=None)
    found = [callback for callback in cli.trainer.callbacks if isinstance(callback, KFAC)]  # type: ignore[attr-defined]
    config, _, coarse = (found or [KFAC("empirical")])[0].settings()
    cli.model.configure_model()
    network = workload(cli.model, cli.datamodule, config)
    return network, method_of(config, coarse, len(network.layers))


def method_of(config: KFACConfig, coarse: CoarseConfig | None, layers: int) -> Method:
    """What a configuration means for costs; "exact" Fisher samples are counted as one backward pass."""
    draws = 0 if config.likelihood == "empirical" else config.fisher_samples
    method = Method(
        factor_every=config.factor_every_n_steps,
        inverse_every=config.inverse_every_n_steps,
        eigen=wants_eigenbases(config),
        sides=config.factor_sides,
        draws=1 if isinstance(draws, str) else draws,
        by_rows=config.preconditioning == "auto",
    )
    if coarse is None:
        return method
    space = coarse_spaces[coarse.space](coarse)
    dimension = space.count * (1 if space.spans_network else layers)
    samples = coarse.max_samples if isinstance(coarse.max_samples, int) else space.samples(layers)
    return replace(
        method,
        eigen=method.eigen or space.uses_eigenbases,
        coarse=dimension,
        coarse_every=coarse.every_n_steps,
        coarse_samples=samples,
    )


# -- what is shown ----------------------------------------------------------------------------------------------------


def table(network: Network, method: Method, machine: Machine, plans: Plans, batch: int) -> Table:
    """One row per number of ranks and strategy."""
    shown = Table(
        title=f"K-FAC of {network.name}, {network.parameters / 1e6:.1f} M parameters, batch {batch} per rank, factors "
        f"every {method.factor_every} steps, inverses every {method.inverse_every}",
        caption="memory: K-FAC's, in MB, of the rank with most; inversions and preconditioning: the busiest rank's, in "
        "1e9 multiply-adds, and over the lower bound; sent: MB per step beside the gradients; "
        f"{machine.gemm:.3g} flops/s, {machine.bandwidth:.3g} B/s",
    )
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=True)
    for ranks, found in plans.items():
        for name, plan in found.items():
            shown.add_row(f"{ranks}", name, *_cells(plan), end_section=name == "best")
    return shown


def _cells(plan: Forecast) -> list[str]:
    return [
        f"{plan.assignment.gradient_workers}",
        f"{sum(plan.memory.values()) / 1e6:,.0f}",
        f"{plan.inversions.longest / 1e9:,.1f}",
        f"{plan.inversions.ratio:.2f}",
        f"{plan.preconditioning.longest / 1e9:,.1f}",
        f"{plan.preconditioning.ratio:.2f}",
        f"{plan.bytes_per_step / 1e6:,.1f}",
        f"{plan.collectives_per_step:.2f}",
        f"{plan.sgd * 1e3:.1f}",
        f"{plan.step * 1e3:.1f}",
        f"{plan.step / plan.sgd:.2f}",
    ]


def limits(plans: Plans) -> list[str]:
    """Where more ranks help no more, and who is to blame."""
    plan = next(iter(plans.values()))["comm_opt"]
    costs, sides = plan.assignment.costs, plan.assignment.sides
    longest, side, factor = max((cost.inversion(s), s, cost.name) for cost in costs for s in cost.blocks(sides))
    heaviest, layer = max((cost.preconditioning(sides), cost.name) for cost in costs)
    total, precondition = inversions(plan.assignment).total, preconditioning(plan.assignment).total
    return [
        f"Inversions scale to {total / longest:.1f} ranks: factor {side} of {factor} is all that a rank does then.",
        "Preconditioning does not under comm_opt, where every rank does all of it; under mem_opt it scales to "
        f"{precondition / heaviest:.1f} ranks ({layer}).",
        "The bytes that a rank sends do not shrink with the number of ranks.",
    ]


def draw(network: Network, plans: Plans, path: Path) -> None:
    """Step times over the numbers of ranks.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'kfac-dist[study]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = list(plans)
    axes.plot(ranks, [1e3 * found["best"].sgd for found in plans.values()], "k--", label="SGD")
    for name, marker in (("comm_opt", "o"), ("mem_opt", "s"), ("best", "x")):
        axes.plot(ranks, [1e3 * found[name].step for found in plans.values()], marker=marker, label=f"K-FAC, {name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks")
    axes.set_ylabel("ms per step, same batch per rank")
    axes.set_title(network.name)
    axes.legend()
    figure.savefig(path, dpi=150)
