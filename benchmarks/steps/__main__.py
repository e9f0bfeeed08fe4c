"""Time everything in turns, and write its sections of ``benchmarks/results.md``: ``python -m benchmarks.steps``."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.page import RESULTS, machine, write_sections
from benchmarks.steps import memory, one_level, peer, profile, ranks, two_levels
from benchmarks.steps.problems import SMOKE, Sizes

ROUNDS = {"full": 12, "quick": 3, "smoke": 1}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n")[0])
    parser.add_argument("--kfac-pytorch", type=Path, metavar="PATH", help="a clone of kfac-pytorch, measured as well")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), default=list(TITLES), help="only these sections")
    parser.add_argument("--threads", type=int, default=2, help="of a single process")
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--smoke", action="store_true", help="tiny nets, one round: does it run at all?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the page; other sections of it stay")
    return parser.parse_args(argv)


TITLES = {
    "one-level": "One level over SGD",
    "two-level": "Two levels over one level",
    "ranks": "Two ranks",
    "memory": "Memory",
    "profile": "Where the time goes",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections, and write each as soon as it is there."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    effort = "smoke" if arguments.smoke else "quick" if arguments.quick else "full"
    rounds, sizes = ROUNDS[effort], SMOKE if arguments.smoke else Sizes()
    clone = arguments.kfac_pytorch.resolve() if arguments.kfac_pytorch else None
    rival = peer.load(clone) if clone else None
    programs: dict[str, Callable[[], str]] = {
        "one-level": lambda: one_level.sections(sizes, rounds, rival),
        "two-level": lambda: two_levels.section(sizes, rounds),
        "ranks": lambda: ranks.section(sizes, rounds, clone),
        "memory": lambda: memory.section(sizes, clone),
        "profile": lambda: profile.section(sizes, rounds),
    }
    console = Console(highlight=False, soft_wrap=True)
    known = f"kfac-pytorch {peer.version(clone)}" if clone else "no clone of kfac-pytorch"
    for name in arguments.only:
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings that the race found, not a user's
            text = programs[name]()
        threads = "1 thread per rank" if name in ("ranks", "memory") else f"{arguments.threads} threads"
        head = f"`python -m benchmarks.steps --only {name}`, {effort}: {machine()}, {threads}, {known}"
        text = f"{head}; {time.monotonic() - start:.0f} s.\n\n{text}"
        write_sections({TITLES[name]: text}, arguments.output)
        console.print(f"## {TITLES[name]}\n\n{text}")


if __name__ == "__main__":
    main()
