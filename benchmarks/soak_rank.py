"""What one rank of the soak does: a long training, watched, which can be killed and resumed; and many short ones."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import CoarseConfig, DistributionConfig, KFACPreconditioner

BATCH, FEATURES, CLASSES = 16, 8, 5
CURVATURE, INVERSION = 5, 20
"""Steps between factor updates and between inversions; checkpoints fall on curvature steps, for the same bits."""


@dataclass
class Watched:
    """What one process saw of itself.

    Attributes:
        steps: the steps before which it looked.
        resident: bytes of its memory, then.
        descriptors: its open file descriptors.
        threads: its threads.
        groups: process groups of torch.distributed, then and at the end.
        hooks: hooks on the net while K-FAC was there, and at the end.
    """

    steps: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)

    def look(self, step: int) -> None:
        """Take one sample."""
        process = psutil.Process()
        self.steps.append(step)
        self.resident.append(process.memory_info().rss)
        self.descriptors.append(process.num_fds())
        self.threads.append(process.num_threads())
        self.groups.append(len(dist.distributed_c10d._world.pg_map))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a training in processes of its own.

    Attributes:
        first: where it begins; from the checkpoint, unless it is 0.
        last: where it ends, unless it is killed.
        look: steps between two samples.
        save: steps between checkpoints; 0: none.
        kill: the step in which ``victim`` kills itself, before the update or, where a checkpoint is due, while it is
            being written; -1: none.
        victim: the rank.
        mark: the weights before this step are kept; -1: none.
        patience: seconds after which a rank that has not ended says where it stands, and ends.
        folder: of the checkpoint and the result.
    """

    first: int
    last: int
    look: int
    save: int = 0
    kill: int = -1
    victim: int = 0
    mark: int = -1
    patience: float = 3600.0
    folder: str

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return Path(self.folder, "last.pt")

    def log(self, rank: int) -> Path:
        """What the rank and its libraries have to say."""
        return Path(self.folder, f"rank_{rank}.log")

    def result(self, rank: int) -> Path:
        """What the rank leaves at the end."""
        return Path(self.folder, f"rank_{rank}.pt")


def network() -> nn.Sequential:
    """Convolution, two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, CLASSES)),
    )


def batch(step: int, rank: int, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh images, and labels drawn from a fixed distribution given the image, so that the loss stays above 0."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    x = torch.randn(BATCH, 1, FEATURES, FEATURES, generator=generator)
    return x, torch.multinomial(F.softmax(x.flatten(1) @ teacher, 1), 1, generator=generator).squeeze(1)


def preconditioner(net: nn.Module) -> KFACPreconditioner:
    """Factors, inverses and an adaptive coarse level, learning-rate-free."""
    return KFACPreconditioner(
        net,
        likelihood="categorical",
        damping=0.1,
        kl_clip=0.01,
        factor_every_n_steps=CURVATURE,
        inverse_every_n_steps=INVERSION,
        coarse=CoarseConfig(space="layer_step_momentum", damping="adaptive"),
        distribution=DistributionConfig(strategy="mem_opt", average_gradients=True),
    )


def train_step(net: nn.Module, kfac: KFACPreconditioner, x: Tensor, y: Tensor) -> Tensor:
    """One step of SGD(lr=1); the loss before it."""
    net.zero_grad()
    logits = net(x)
    kfac.accumulate()
    loss = F.cross_entropy(logits, y)
    loss.backward()
    kfac.step(lr=1.0, closure=lambda: F.cross_entropy(net(x), y))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= parameter.grad
    return loss.detach()


def hooks(net: nn.Module) -> int:
    """Hooks on any of its modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in net.modules() for kind in kinds)


def write(path: Path, content: Any, torn: bool) -> None:
    """Beside the file, then in its place; ``torn``: be killed in between."""
    unfinished = path.with_suffix(".part")
    torch.save(content, unfinished)
    if torn:
        os.truncate(unfinished, unfinished.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    unfinished.replace(path)


def train(rank: int, part: Part) -> None:
    """The steps of ``part``."""
    watched = Watched()
    watched.groups.append(len(dist.distributed_c10d._world.pg_map))
    net = network()
    kfac = preconditioner(net)
    teacher = torch.randn(FEATURES**2, CLASSES, generator=torch.Generator().manual_seed(1)) / 4
    losses = torch.zeros(part.last)
    if part.first:
        saved = torch.load(part.checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        kfac.load_state_dict(saved["kfac"])
        losses[: part.first] = saved["losses"][rank, : part.first]
    marked: dict[str, Tensor] = {}
    for step in range(part.first, part.last):
        if step == part.mark:
            marked = {name: value.clone() for name, value in net.state_dict().items()}
        dies = rank == part.victim and step == part.kill
        if part.save and step and step % part.save == 0 and step > part.first:
            both = torch.zeros(2, part.last)
            both[rank] = losses
            dist.all_reduce(both)
            if rank == 0:
                state = {"step": step, "net": net.state_dict(), "kfac": kfac.state_dict(), "losses": both}
                write(part.checkpoint, state, dies)
            dist.barrier()
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % part.look == 0:
            watched.look(step)
        losses[step] = train_step(net, kfac, *batch(step, rank, teacher))
    watched.look(part.last)
    watched.hooks.append(hooks(net))
    kfac.close()
    watched.hooks.append(hooks(net))
    watched.groups.append(len(dist.distributed_c10d._world.pg_map))
    end = {"losses": losses, "net": net.state_dict(), "marked": marked}
    torch.save(end | {"metrics": dict(kfac.metrics), "watched": asdict(watched)}, part.result(rank))


def rebuild(rank: int, part: Part) -> None:
    """``part.last`` preconditioners one after another: built, a few steps, closed."""
    watched = Watched()
    teacher = torch.randn(FEATURES**2, CLASSES, generator=torch.Generator().manual_seed(1))
    net = network()
    for number in range(part.last):
        watched.look(number)
        kfac = preconditioner(net)
        for step in range(2):
            train_step(net, kfac, *batch(step, rank, teacher))
        kfac.close()
        watched.hooks.append(hooks(net))
    watched.look(part.last)
    torch.save({"watched": asdict(watched)}, part.result(rank))


JOBS = {"train": train, "rebuild": rebuild}


def main(rank: int, job: str, part: Part) -> None:
    """One of two ranks over gloo, in this process."""
    with part.log(rank).open("ab") as log:
        os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(part.patience, exit=True)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(part.folder, f"store_{job}_{part.first}")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    JOBS[job](rank, part)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
