"""A study: which methods meet on which problems, with what budgets, and the runs that this takes, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

from kfac_dist.coarse import coarse_spaces
from kfac_dist.coarse.base import StepSpace
from kfac_dist.config import CORRECTIONS, check_number, check_positive_int
from kfac_dist.study.methods import method
from kfac_dist.study.protocol import Protocol, search_space
from kfac_dist.study.run import Run, check_device_name, obstacle
from kfac_dist.study.runner import make_run
from kfac_dist.study.search import trials
from kfac_dist.study.suite import PROBLEMS

Stage = Literal["tuning", "finals", "twins", "side"]
STAGES: tuple[Stage, ...] = ("tuning", "finals", "twins", "side")
"""In their order: each begins with what the one before has found."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run gets on one problem.

    Attributes:
        epochs: length of a run with the chosen settings.
        seconds: of training; the run goes on until both are over.
        side_epochs: length of the runs of the side table (every space with every correction, once); 0: none.
        measure_every: steps between dense measures of the error, on problems that are small enough; 0: none.
        twins: run the one-level forms at the settings of the two-level methods, too.
        methods: that meet on this problem only.

    Raises:
        ValueError: a value out of its bounds.
    """

    epochs: int = 10
    seconds: float = 0.0
    side_epochs: int = 0
    measure_every: int = 0
    twins: bool = True
    methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive_int("epochs", self.epochs)
        check_number("seconds", self.seconds, 0.0)
        for name in ("side_epochs", "measure_every"):
            check_number(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """A file of configs/study.

    Attributes:
        title: of the report.
        problems: name of a problem -> its budget.
        methods: that meet on every problem.
        trials: points of each method's search space, the documented default first.
        tuning_epochs: length of a trial.
        seeds: of the runs that are compared; not 100, which the trials use.
        clock: whose seconds: "cpu" for runs of one thread (they leave out what other work on the machine takes), "wall"
            with several threads or a GPU.
        threads: of torch, in each run.
        device: of each run: "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: an unknown problem or method, no problem, or what :class:`Protocol` refuses.
    """

    title: str
    problems: Mapping[str, Budget]
    methods: Sequence[str]
    trials: int = 6
    tuning_epochs: int = 3
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    clock: Literal["wall", "cpu"] = "cpu"
    threads: int = 1
    device: str = "cpu"
    protocols: Mapping[str, Protocol] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError(f"problems={dict(self.problems)}: name at least one of {', '.join(PROBLEMS)}")
        for problem in self.problems:
            if problem not in PROBLEMS:
                raise ValueError(f"problem {problem!r} is unknown; choose one of {', '.join(PROBLEMS)}")
        for name in chain(self.methods, *(budget.methods for budget in self.problems.values())):
            method(name)
        check_positive_int("threads", self.threads)
        check_device_name(self.device)
        if self.clock == "cpu" and (self.threads > 1 or self.device != "cpu"):
            raise ValueError(
                f"clock='cpu' with threads={self.threads}, device={self.device!r}: seconds of the CPU mislead there; "
                "set clock='wall'"
            )
        object.__setattr__(self, "protocols", {name: self._protocol(name) for name in self.problems})

    def _protocol(self, problem: str) -> Protocol:
        budget = self.problems[problem]
        return Protocol(
            problem=problem,
            trials=self.trials,
            tuning_epochs=self.tuning_epochs,
            seeds=tuple(self.seeds),
            epochs=budget.epochs,
            seconds=budget.seconds,
            points=6,
            clock=self.clock,
            threads=self.threads,
            device=self.device,
            measure_every=budget.measure_every,
            twins=budget.twins,
        )

    def methods_of(self, problem: str) -> tuple[str, ...]:
        """Those that can run here, each once, in the plan's order."""
        names = dict.fromkeys([*self.methods, *self.problems[problem].methods])
        return tuple(name for name in names if obstacle(problem, name) is None)

    def left_out(self) -> dict[str, str]:
        """Method -> why it cannot run here, or not on every problem."""
        reasons = {
            name: obstacle(problem, name)
            for problem, budget in self.problems.items()
            for name in chain(self.methods, budget.methods)
            if obstacle(problem, name) is not None
        }
        return {name: str(reason) for name, reason in reasons.items()}

    def runs(self, stage: Stage, folder: Path, *, assume: bool = False) -> list[Run]:
        """What a stage runs, given what the stages before have left in ``folder``.

        Runs of one seed stand together, so that what a busy machine does to times falls on all methods alike.

        Args:
            stage: one of ``STAGES``.
            folder: of the runs.
            assume: take the default settings where the trials are not finished; else those methods are left out.
        """
        found: list[Run] = []
        for problem, protocol in self.protocols.items():
            names = self.methods_of(problem)
            if stage == "tuning":
                found += by_turns(protocol.tuning(name) for name in names)
                continue
            chosen = {name: protocol.chosen(name, folder) for name in names}
            if assume:
                chosen = {name: settings or protocol.points_of(name)[0] for name, settings in chosen.items()}
            known = {name: settings for name, settings in chosen.items() if settings is not None}
            if stage == "finals":
                found += by_turns(protocol.finals(name, settings) for name, settings in known.items())
            elif stage == "twins":
                two_level = [name for name in known if protocol.has_twin(name) and method(name).one_level in known]
                found += by_turns(protocol.twin(name, known) for name in two_level)
            else:
                found += self.side_table(problem, known)
        return found

    def side_table(self, problem: str, chosen: Mapping[str, Mapping[str, float]]) -> list[Run]:
        """Every space with every correction, once, and the one-level form they are held against.

        A space that corrects a direction runs at the settings that the trials chose for one-level K-FAC, one that
        chooses the step at those of ``layer_step_momentum``; at the defaults where these are not in the study.
        """
        budget = self.problems[problem]
        if not budget.side_epochs:
            return []
        options = {"epochs": budget.side_epochs, **self.protocols[problem].where}
        runs = []
        for name in ["kfac", *(f"{space}:{correction}" for space in coarse_spaces for correction in CORRECTIONS)]:
            space = name.partition(":")[0]
            chooses = space in coarse_spaces and issubclass(coarse_spaces[space], StepSpace)
            settings = chosen.get(
                "layer_step_momentum" if chooses else "kfac", trials(search_space(problem, name), 1)[0]
            )
            runs.append(make_run(problem, name, settings, seed=min(self.seeds), label="side", **options))
        return runs


def by_turns(groups: Iterable[Sequence[Run]]) -> list[Run]:
    """The first of every group, then the second of every group, and so on."""
    return [run for turn in zip_longest(*groups) for run in turn if run is not None]
