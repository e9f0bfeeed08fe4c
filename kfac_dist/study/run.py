"""One run of the study: a problem, a method, its settings, a seed and a budget; its losses and seconds as they come.

The seed decides the initial weights and the order of the batches, whatever the method draws: runs of one seed are
paired. Seconds are those of the training steps, batches fetched within them; evaluations stand outside.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kfac_dist.config import check_choice, check_number, check_positive_int
from kfac_dist.study.dense_fisher import MAX_PARAMETERS
from kfac_dist.study.in_memory import InMemoryDataModule, InMemoryDataset
from kfac_dist.study.measures import Watch
from kfac_dist.study.methods import method
from kfac_dist.study.problem import Problem
from kfac_dist.study.stepper import Stepper
from kfac_dist.study.suite import PROBLEMS

EVALUATION_BATCH = 500
Line = dict[str, Any]
DENSE = (
    f"a problem of at most {MAX_PARAMETERS} covered parameters, one of "
    f"{', '.join(name for name, entry in PROBLEMS.items() if entry.dense)}"
)
"""What dense matrices can be formed for."""


def obstacle(problem: str, name: str) -> str | None:
    """Why the method cannot run on the problem here, or None.

    Raises:
        ValueError: an unknown method.
    """
    entry = method(name)
    return f"needs {DENSE}" if entry.dense_only and not PROBLEMS[problem].dense else entry.missing()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is run; two runs that are equal give the same weights.

    Attributes:
        problem: a name of ``kfac_dist.study.suite.PROBLEMS``.
        method: a name that ``kfac_dist.study.methods.method`` knows.
        settings: all settings of the method, the fixed ones included.
        seed: of the initial weights, the order of the batches and the sampled targets.
        epochs: the run goes on until both budgets are used up.
        seconds: of training.
        clock: whose seconds ``seconds`` and ``marks`` are: the wall's, or those of this process's CPU, which other
            processes do not disturb (for runs with one thread and no GPU).
        marks: seconds of training after which the losses are evaluated, besides the end of each of the ``epochs``.
        every_n_steps: steps between the lines that hold the mean loss of the batches only, and what a coarse level
            reports.
        threads: for torch.
        device: where the network is trained, such as "cpu" or "cuda".
        measure_every: steps between measures of K-FAC's directions against the natural gradient, on problems that are
            ``dense``; 0: never. A number without a common divisor with the intervals of K-FAC's updates meets the
            inverses at every age.
        label: tells runs of one plan apart, such as "trial-3".

    Raises:
        ValueError: no budget at all, or a value out of its bounds.
    """

    problem: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: int = 0
    seconds: float = 0.0
    clock: Literal["wall", "cpu"] = "wall"
    marks: Sequence[float] = ()
    every_n_steps: int = 6
    threads: int = 1
    device: str = "cpu"
    measure_every: int = 0
    label: str = "run"

    def __post_init__(self) -> None:
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem={self.problem!r} is unknown; choose one of {', '.join(PROBLEMS)}")
        check_positive_int("every_n_steps", self.every_n_steps)
        check_positive_int("threads", self.threads)
        check_device_name(self.device)
        if self.measure_every:
            check_positive_int("measure_every", self.measure_every)
        if self.measure_every and not PROBLEMS[self.problem].dense:
            raise ValueError(
                f"measure_every={self.measure_every} on problem={self.problem!r}: set it to 0; it needs {DENSE}"
            )
        check_choice("clock", self.clock, ("wall", "cpu"))
        check_number("epochs", self.epochs, 0)
        check_number("seconds", self.seconds, 0.0)
        if not self.epochs and not self.seconds:
            raise ValueError("epochs=0 and seconds=0: give the run a budget")

    def header(self) -> Line:
        """The run as JSON holds it."""
        return asdict(self) | {"settings": dict(self.settings), "marks": list(self.marks)}


def check_device_name(name: str) -> None:
    """Raise ValueError unless ``name`` is that of a device, here or elsewhere."""
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is no device; name one such as 'cpu', 'cuda' or 'cuda:1'") from error


def check_device(name: str) -> None:
    """Raise ValueError unless this machine has the device ``name``."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {error}; device='cpu' always can") from error


class Logged:
    """Takes the place of a model's logging: keeps the means that the last call was given."""

    def __init__(self, model: Problem) -> None:
        self.values: Mapping[str, Tensor] = {}
        # Not through nn.Module.__setattr__, which is for parts of the network; the class's method stays as it was.
        object.__setattr__(model, "log_means", self)

    def __call__(self, metrics: Mapping[str, Tensor], prefix: str, count: int) -> None:
        """Called by the model in place of its own method."""
        self.values = metrics


@contextmanager
def random_stream(state: list[Tensor]) -> Iterator[None]:
    """The global random stream goes on from ``state[0]`` inside, which is moved on; outside it is as it was."""
    outside = torch.get_rng_state()
    torch.set_rng_state(state[0])
    try:
        yield
    finally:
        state[0] = torch.get_rng_state()
        torch.set_rng_state(outside)


def batches(loader: DataLoader, seed: int) -> Iterator[tuple[int, Any]]:
    """The batches of one epoch after the other, without end, each with the number of its epoch (0, 1, ..).

    Their order, and what else the loader draws, comes from a stream of its own: no method can change it.
    """
    state = [torch.Generator().manual_seed(seed).get_state()]
    epoch = 0
    while True:
        with random_stream(state):
            source = iter(loader)
        while True:
            with random_stream(state):
                batch = next(source, None)
            if batch is None:
                break
            yield epoch, batch
        epoch += 1


def fingerprint(model: nn.Module) -> str:
    """Tells whether two networks have the same weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def mean_loss(model: Problem, dataset: InMemoryDataset, metric: str, logged: Logged, device: str) -> float:
    """The metric's mean over all samples, in evaluation mode."""
    model.eval()
    total = 0.0
    for first in range(0, len(dataset), EVALUATION_BATCH):
        rows = list(range(first, min(first + EVALUATION_BATCH, len(dataset))))
        model.loss(moved(dataset.__getitems__(rows), device), "val_")
        total += float(logged.values[metric]) * len(rows)
    model.train()
    return total / len(dataset)


def moved(batch: Sequence[Tensor], device: str) -> tuple[Tensor, ...]:
    """The batch's tensors on the device."""
    return tuple(tensor.to(device) for tensor in batch)


class Clock:
    """Seconds of training, by the wall and of this process's CPU; ``passed`` are those that the budget counts."""

    def __init__(self, kind: Literal["wall", "cpu"], device: str) -> None:
        self.kind = kind
        self.device = torch.device(device)
        self.seconds = self.cpu_seconds = 0.0

    @property
    def passed(self) -> float:
        """Seconds of training."""
        return self.cpu_seconds if self.kind == "cpu" else self.seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is done inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu


def train(run: Run, data: InMemoryDataModule) -> Iterator[Line]:
    """Train, and yield a line of results now and then.

    The first line holds ``initial`` (the network's fingerprint). Then ``{epoch, step, seconds, cpu_seconds}`` with
    ``batch_loss`` (mean since the last such line) every few steps, and with ``loss`` and ``val_loss`` (means over the
    training and the held-out samples) at first, at the end of each of ``run.epochs``, at the marks and at the end. The
    last one holds ``end``: "done", "diverged" (a loss that is no number, or a training loss above the initial one) or
    "failed" with the message of the error.

    What :class:`~kfac_dist.study.measures.Watch` sees of K-FAC stands beside ``batch_loss`` (``coarse``), in lines of
    its own (``measures``), and in one before the last (``interactions`` and ``layers``).
    """
    entry = PROBLEMS[run.problem]
    if method(run.method).dense_only and not entry.dense:
        raise ValueError(f"method={run.method!r} on problem={run.problem!r}: it {obstacle(run.problem, run.method)}")
    torch.manual_seed(run.seed)
    model = entry.model().to(run.device)
    logged = Logged(model)
    twin = copy.deepcopy(model) if run.measure_every else None  # before anybody puts hooks into it
    stepper = method(run.method).build(model, entry.kfac, run.settings, run.seed)
    watch = Watch(stepper.preconditioner, twin, run.measure_every, entry.few_outputs)
    data.setup("fit")
    loader = data.train_dataloader()
    clock, step, evaluated, marks, since = Clock(run.clock, run.device), 0, 0, sorted(run.marks), list[float]()
    model.train()

    def line(**values: Any) -> Line:
        epoch = step / len(loader)
        return {"epoch": epoch, "step": step, "seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds} | values

    def losses() -> dict[str, float]:
        splits = {"loss": data.train_set, "val_loss": data.val_set}
        return {
            name: mean_loss(model, split, entry.loss, logged, run.device)
            for name, split in splits.items()
            if split is not None
        }

    now = time.perf_counter()
    last = losses()
    initial = last["loss"]
    sizes = [len(split) for split in (data.train_set, data.val_set) if split is not None]
    yield {
        "initial": fingerprint(model),
        "steps_per_epoch": len(loader),
        "batch_size": data.batch_size,
        "samples": sizes,
        "evaluation": time.perf_counter() - now,
    }
    yield line(**last)
    order = batches(loader, run.seed)
    try:
        while step < run.epochs * len(loader) or clock.passed < run.seconds:
            watch.before(step + 1, model)
            with clock.running():
                _, batch = next(order)
                batch = moved(batch, run.device)
                value = one_step(stepper, model, batch, logged, entry.loss)
            step += 1
            since.append(value)
            if not math.isfinite(value):
                last = {"loss": value, "val_loss": value}
                break
            measures = watch.after(step, batch)
            if step % run.every_n_steps == 0:
                yield line(batch_loss=sum(since) / len(since), **watch.coarse(clock.seconds))
                since = []
            if measures:
                yield line(**measures)
            due = step % len(loader) == 0 and step <= run.epochs * len(loader)
            while marks and clock.passed >= marks[0]:
                marks, due = marks[1:], True
            if due:
                evaluated, last = step, losses()
                yield line(**last)
                if not math.isfinite(last["loss"]):
                    break
        else:
            if evaluated < step:
                last = losses()
                yield line(**last)
        interactions = watch.interactions()
        if interactions:
            yield line(**interactions)
    except (RuntimeError, ArithmeticError) as error:  # a decomposition that does not converge, and the like
        yield line(end="failed", error=f"{type(error).__name__}: {error}")
        return
    diverged = not math.isfinite(last["loss"]) or last["loss"] > initial
    yield line(end="diverged" if diverged else "done", weights=fingerprint(model))


def one_step(stepper: Stepper, model: Problem, batch: Any, logged: Logged, metric: str) -> float:
    """One training step; the metric of its batch, before it."""
    values: list[Tensor] = []

    def loss() -> Tensor:
        value = model.loss(batch, "")
        values.append(logged.values[metric])
        return value

    stepper.step(loss, lambda: model.loss(batch, ""))
    return float(values[0])
