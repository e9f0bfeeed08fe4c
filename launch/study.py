"""``kfac-dist study FILE``: run a comparison of methods, go on where it stopped, and write its report."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from kfac_dist.launch.train import PROGRAM
from kfac_dist.study.plan import STAGES, Stage, StudyPlan
from kfac_dist.study.readings import training_loss
from kfac_dist.study.report import Study, write_report
from kfac_dist.study.run import Line, Run, check_device
from kfac_dist.study.runner import calibrate, estimate, file_of, finished, read_lines, run_all

MINUTE = 60.0


def main(argv: Sequence[str]) -> int:
    """Run the study.

    Args:
        argv: "study", its file and its options.

    Returns:
        0; 1 where the plan does not fit into --budget. The parser exits with 2 where it does not understand.
    """
    arguments = list(argv)[1:]
    parser = parser_of_studies()
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    if not any(each.partition("=")[0] in ("--config", "--help", "-h") for each in arguments):
        parser.error(f"name the study's file: {PROGRAM} study configs/study/quick.yaml")
    options = parser.parse_args(arguments)
    if not 0 <= options.task < options.tasks:
        parser.error(f"--task {options.task} of --tasks {options.tasks}: it counts from 0")
    if options.processes < 1:
        parser.error(f"--processes {options.processes} must be at least 1")
    if not options.timeout > 0:
        parser.error(f"--timeout {options.timeout:g} must be above 0 minutes")
    try:
        plan = parser.instantiate(options).plan
        if options.stage != "report":
            check_device(plan.device)
    except ValueError as error:
        parser.error(str(error))
    name = Path(str(options.config[0])).stem
    folder = (options.folder or Path("outputs", "study", name)).resolve()
    console = Console(highlight=False, soft_wrap=True)
    stages: list[Stage] = list(STAGES) if options.stage == "all" else [s for s in STAGES if s == options.stage]
    if stages and not _run(plan, folder, stages, options, console):
        return 1
    if options.stage in ("all", "report") and not options.estimate and options.tasks == 1:
        report = (options.report or folder).resolve()
        command = shlex.join([*PROGRAM.split(), "study", os.path.relpath(str(options.config[0])), *_changes(arguments)])
        write_report(_study(plan, name, command, folder), folder, report)
        console.print(f"written: {report / 'report.html'} and report.md")
    return 0


def _changes(arguments: Sequence[str]) -> list[str]:
    """The options that take the place of the file's."""
    found: list[str] = []
    for option, value in pairwise([*arguments, ""]):
        if option.startswith("--plan"):
            found += [option] if "=" in option else [option, value]
    return found


def _study(plan: StudyPlan, name: str, command: str, folder: Path) -> Study:
    sides = plan.runs("side", folder)
    return Study(
        name=name,
        title=plan.title,
        command=command,
        protocols=plan.protocols,
        methods={problem: plan.methods_of(problem) for problem in plan.problems},
        side={problem: tuple(run for run in sides if run.problem == problem) for problem in plan.problems},
        left_out=plan.left_out(),
    )


def parser_of_studies() -> ArgumentParser:
    """What ``kfac-dist study`` understands."""
    parser = ArgumentParser(
        prog=f"{PROGRAM} study",
        description="Compare methods on problems: trials, fresh seeds, and a report. It goes on where it stopped.",
        epilog="A killed study loses at most the runs in flight; a run whose settings or budget changed is run again.",
    )
    parser.add_argument("--config", action="config", help="the study's file; may be given without --config")
    parser.add_class_arguments(StudyPlan, "plan", help="the plan; each option takes the place of the file's")
    parser.add_argument("--folder", type=Path, help="of the runs; default: outputs/study/NAME")
    parser.add_argument("--report", type=Path, help="folder of the report; default: that of the runs")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="MINUTES", help="for one run; then all stops")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="refuse a plan whose estimate is beyond it")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and run nothing")
    parser.add_argument("--stage", choices=["all", *STAGES, "report"], default="all", help="for jobs: one stage only")
    parser.add_argument("--task", type=int, default=0, help="of an array of jobs: this one's number")
    parser.add_argument("--tasks", type=int, default=1, help="of an array of jobs: how many")
    return parser


def _run(plan: StudyPlan, folder: Path, stages: Sequence[Stage], options: Namespace, console: Console) -> bool:
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)  # of the processes to come
    for method, reason in plan.left_out().items():
        console.print(f"{method} is left out: it {reason}")
    if options.tasks == 1 or options.estimate or options.budget is not None:
        minutes = _estimate(plan, folder, stages, options, console)
        if options.budget is not None and minutes > options.budget:
            console.print(
                f"{minutes:.0f} minutes are more than --budget {options.budget:g}: take fewer seeds, methods or "
                "problems (--plan.seeds '[0,1,2]'), more --processes, or a larger budget. Nothing was run."
            )
            return False
    if options.estimate:
        return True
    began = time.monotonic()

    def told(run: Run, end: Line) -> None:
        loss = training_loss(read_lines(file_of(run, folder)))
        passed = (time.monotonic() - began) / MINUTE
        console.print(
            f"[{passed:6.1f} min] {run.problem} {run.method} {run.label} seed {run.seed}: {end['end']}, {loss:.4f}"
        )

    for stage in stages:
        share = plan.runs(stage, folder)[options.task :: options.tasks]
        run_all(share, folder, options.processes, told, timeout=MINUTE * options.timeout)
    return True


def _estimate(plan: StudyPlan, folder: Path, stages: Sequence[Stage], options: Namespace, console: Console) -> float:
    """Minutes that are left, told per stage."""
    with TemporaryDirectory() as elsewhere:
        sgd = {name: calibrate(name, Path(elsewhere), **each.where) for name, each in plan.protocols.items()}
    total = 0.0
    for stage in stages:
        runs = [
            run
            for run in plan.runs(stage, folder, assume=True)[options.task :: options.tasks]
            if not finished(run, folder)
        ]
        parts = ([run for run in runs if run.problem == problem] for problem in sgd)
        seconds = sum(estimate(part, sgd[p], options.processes) for p, part in zip(sgd, parts, strict=True))
        total += seconds / MINUTE
        console.print(f"{stage}: {len(runs)} runs, about {seconds / MINUTE:.0f} min")
    steps = ", ".join(f"{problem} {1e3 * step:.0f} ms" for problem, (step, _, _) in sgd.items())
    console.print(f"A step of SGD takes: {steps}. In all about {total:.0f} min with {options.processes} at a time.")
    return total
