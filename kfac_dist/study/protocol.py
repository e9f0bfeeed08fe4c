"""What every method gets on a problem: the same trials, the same fresh seeds, the same budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kfac_dist.config import check_positive_int
from kfac_dist.study.methods import method
from kfac_dist.study.readings import training_loss
from kfac_dist.study.run import Line, Run
from kfac_dist.study.runner import finished_lines, make_run
from kfac_dist.study.search import Range, trials
from kfac_dist.study.suite import PROBLEMS

TUNING_SEED = 100
"""Of the trials; the runs that are compared have other seeds."""


def search_space(problem: str, name: str) -> Mapping[str, Range]:
    """What is searched for a method on a problem."""
    return {**method(name).space, **PROBLEMS[problem].ranges.get(name, {})}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One problem's share of a comparison.

    Attributes:
        problem: name of the problem.
        trials: points of the search space, the documented default first.
        tuning_epochs: length of a trial.
        seeds: of the runs with the chosen settings.
        epochs: their length; they go on until ``seconds`` are over, too.
        seconds: of training.
        points: evaluations spread over the seconds.
        marks: further seconds at which losses are compared.
        clock: whose seconds.
        threads: of torch, in each run.
        device: of each run.
        measure_every: steps between dense measures of the error in the runs that are compared; see ``Run``.
        twins: whether one-level forms run at the settings of the two-level methods, too.

    Raises:
        ValueError: the trials' seed among ``seeds``, a seed twice or none at all; no trial, or one without an epoch.
    """

    problem: str
    trials: int = 6
    tuning_epochs: int = 3
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 10
    seconds: float = 0.0
    points: int = 12
    marks: tuple[float, ...] = ()
    clock: Literal["wall", "cpu"] = "wall"
    threads: int = 1
    device: str = "cpu"
    measure_every: int = 0
    twins: bool = True

    def __post_init__(self) -> None:
        if TUNING_SEED in self.seeds or not self.seeds:
            raise ValueError(f"seeds={list(self.seeds)}: give at least one, but not {TUNING_SEED}, that of the trials")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: give each once; a seed's second run would be its first again")
        check_positive_int("trials", self.trials)
        check_positive_int("tuning_epochs", self.tuning_epochs)

    def evaluations(self) -> tuple[float, ...]:
        """Seconds at which the losses are evaluated: at equal distances, and at the marks."""
        grid = [self.seconds * i / self.points for i in range(1, self.points + 1)] if self.seconds else []
        return tuple(sorted({*grid, *self.marks}))

    @property
    def where(self) -> dict[str, object]:
        """What each of the runs is told of the machine."""
        return {"clock": self.clock, "threads": self.threads, "device": self.device}

    def points_of(self, name: str) -> list[dict[str, float]]:
        """The points of a method's search space that are tried on this problem."""
        return trials(search_space(self.problem, name), self.trials)

    def tuning(self, name: str) -> list[Run]:
        """The trials of a method."""
        points = self.points_of(name)
        budget = {"epochs": self.tuning_epochs, **self.where}
        return [
            make_run(self.problem, name, point, seed=TUNING_SEED, label=f"trial-{i}", **budget)
            for i, point in enumerate(points)
        ]

    def chosen(self, name: str, folder: Path) -> dict[str, float] | None:
        """The settings of the best trial; None where trials are missing."""
        runs = lines_of(self.tuning(name), folder)
        if not runs:
            return None
        losses = list(map(training_loss, runs))
        return self.points_of(name)[losses.index(min(losses))]

    def finals(self, name: str, settings: Mapping[str, float], label: str = "final") -> list[Run]:
        """The runs with the chosen settings, one per seed."""
        budget = {"epochs": self.epochs, "seconds": self.seconds, "marks": self.evaluations(), **self.where}
        budget["measure_every"] = self.measure_every
        return [make_run(self.problem, name, settings, seed=s, label=label, **budget) for s in self.seeds]

    def has_twin(self, name: str) -> bool:
        """Whether the one-level form runs at the method's settings: where its trials have chosen some."""
        return self.twins and method(name).one_level is not None and bool(method(name).space)

    def twin(self, name: str, chosen: Mapping[str, Mapping[str, float]]) -> list[Run]:
        """The one-level form of a two-level method at that method's settings.

        The fine level's settings are the two-level method's. Where that one chooses its step, it has no learning rate,
        and its clip bounds another thing: both are then the one-level form's own chosen ones.

        Args:
            name: the two-level method.
            chosen: method -> the settings that its trials chose; both methods' must be there.

        Raises:
            ValueError: the method has no one-level form.
        """
        form = method(name).one_level
        if form is None:
            raise ValueError(f"{name!r} is no two-level method")
        own, two = chosen[form], chosen[name]
        chooses = "lr" not in two
        shared = {key: value for key, value in two.items() if key in own and not (chooses and key == "kl_clip")}
        return self.finals(form, {**own, **shared}, label=f"as-{name}")


def lines_of(runs: Sequence[Run], folder: Path) -> list[list[Line]]:
    """The lines of runs that are all finished, else nothing."""
    found = [finished_lines(run, folder) for run in runs]
    return found if all(found) else []
