"""``kfac-dist launch LAUNCHER [options] -- fit --config FILE``: start a training on several processes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kfac_dist.launch import mpirun, slurm, torchrun
from kfac_dist.launch.base import launchers

_LAUNCHERS = (torchrun, mpirun, slurm)
WHAT = "after it, a subcommand of kfac-dist with its options, or a script of your own: -- fit --config FILE"


def parser() -> argparse.ArgumentParser:
    """The options of every launcher."""
    result = argparse.ArgumentParser(prog="kfac-dist launch", description=__doc__.split(": ", 1)[1])
    subparsers = result.add_subparsers(dest="launcher", required=True, metavar="|".join(launchers))
    for name in launchers:
        summary = launchers[name].summary
        each = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        launchers[name].add_arguments(each)
        each.add_argument("--dry-run", action="store_true", help="only show what would be run or submitted")
        each.usage = f"kfac-dist launch {name} [options] -- fit --config FILE"
        each.epilog = f"The options end with --; {WHAT}."
    return result


def main(argv: Sequence[str]) -> int:
    """Start, submit or show it.

    Args:
        argv: "launch", the launcher's name and options, "--", and what to run.

    Returns:
        The exit status; a launcher that takes the place of this process does not return. The parser exits with 2 for
        options that are unknown, out of their bounds or at odds with one another.
    """
    options, arguments = list(argv[1:]), list[str]()
    if "--" in options:
        split = options.index("--")
        options, arguments = options[:split], options[split + 1 :]
    top = parser()
    parsed = top.parse_args(options)
    if not arguments:
        top.error(f"what to run is missing: end the options with --, and give {WHAT}")
    if arguments[0] == "launch":
        top.error("'launch' cannot launch itself: name what the processes shall run, such as -- fit --config FILE")
    try:
        launcher = launchers[parsed.launcher].from_options(parsed)
        shown = launcher.show(arguments)
    except ValueError as error:
        top.error(str(error))
    if parsed.dry_run:
        print(shown)
        return 0
    return launcher.start(arguments)
