"""Rank, size and address of this process, from the variables that its launcher set.

Pure: it reads a mapping, starts nothing and imports neither torch nor mpi4py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchEnvironment:
    """Where this process stands among those that were launched with it.

    Attributes:
        rank: index among all processes, 0 .. size - 1.
        size: number of processes.
        local_rank: index among the processes of this host.
        local_size: number of processes on this host; None: the launcher does not say.
        address: host name or IP address of rank 0; None: the launcher does not say.
        port: free port of that host; None: the launcher does not say.
        launcher: "torchrun", "openmpi", "mpich", "slurm" or "single".
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    address: str | None
    port: int | None
    launcher: str

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(
                f"{self.launcher}: rank {self.rank} of {self.size} is impossible; start the job anew from a shell "
                "without left-over variables"
            )

    @property
    def trainer_options(self) -> str:
        """What a Trainer must be given to connect all of these processes, such as "devices=2, num_nodes=3"."""
        if not self.local_size:
            return "devices=<processes per node>, num_nodes=<nodes>"
        return f"devices={self.local_size}, num_nodes={-(-self.size // self.local_size)}"


def check_world(launched: LaunchEnvironment, connected: int, cure: str) -> None:
    """Refuse to go on where processes were launched together and train apart, which nobody notices otherwise.

    Args:
        launched: what the launcher says.
        connected: number of processes that reach one another.
        cure: what to do; "{devices}" in it becomes the ``devices`` and ``num_nodes`` that a Trainer needs.

    Raises:
        ValueError: fewer are connected than were launched.
    """
    if connected < launched.size:
        raise ValueError(
            f"{launched.launcher} started {launched.size} processes, but this one is connected to "
            f"{connected - 1} others: they would train apart. Cure: "
            + cure.replace("{devices}", launched.trainer_options)
        )


def detect_environment(variables: Mapping[str, str]) -> LaunchEnvironment:
    """Read the launcher's variables; the innermost launcher wins.

    torchrun or mpirun within a SLURM job sees SLURM's variables too, and theirs are about the actual processes: hence
    torchrun, then Open MPI, then MPICH (PMI), then SLURM, then one process.

    Args:
        variables: such as ``os.environ``.

    Raises:
        ValueError: a variable is no integer or is missing beside its siblings (it is named), or the rank is not below
            the size.
    """
    for read in (_torchrun, _open_mpi, _mpich, _slurm):
        found = read(variables)
        if found is not None:
            return found
    return LaunchEnvironment(0, 1, 0, 1, None, None, "single")


def _integer(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except KeyError:
        raise ValueError(f"{name} is missing although its launcher's other variables are set") from None
    except ValueError:
        raise ValueError(f"{name}={variables[name]!r} must be an integer") from None


def _integer_or_none(variables: Mapping[str, str], name: str) -> int | None:
    return _integer(variables, name) if name in variables else None


def _address(variables: Mapping[str, str]) -> tuple[str | None, int | None]:
    return variables.get("MASTER_ADDR"), _integer_or_none(variables, "MASTER_PORT")


def _torchrun(variables: Mapping[str, str]) -> LaunchEnvironment | None:
    # Containers may set WORLD_SIZE alone; without the elastic agent's mark all three must be there.
    if "TORCHELASTIC_RUN_ID" not in variables and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= variables.keys():
        return None
    return LaunchEnvironment(
        _integer(variables, "RANK"),
        _integer(variables, "WORLD_SIZE"),
        _integer(variables, "LOCAL_RANK"),
        _integer_or_none(variables, "LOCAL_WORLD_SIZE"),
        *_address(variables),
        "torchrun",
    )


def _mpi(
    launcher: str, rank: str, size: str, local_rank: str, local_size: str
) -> Callable[..., LaunchEnvironment | None]:
    def read(variables: Mapping[str, str]) -> LaunchEnvironment | None:
        # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE alone; the local rank is among its own variables then.
        if rank not in variables or (local_rank not in variables and _in_slurm_step(variables)):
            return None
        return LaunchEnvironment(
            _integer(variables, rank),
            _integer(variables, size),
            _integer(variables, local_rank),
            _integer_or_none(variables, local_size),
            *_address(variables),
            launcher,
        )

    return read


_open_mpi = _mpi(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_mpich = _mpi("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _in_slurm_step(variables: Mapping[str, str]) -> bool:
    # The batch script and an interactive shell see SLURM_NTASKS as well, but only srun starts that many processes:
    # it makes a step, and a step has an id.
    inside_a_step = "SLURM_STEP_ID" in variables or "SLURM_STEPID" in variables
    interactive = variables.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return inside_a_step and not interactive and "SLURM_PROCID" in variables


def _slurm(variables: Mapping[str, str]) -> LaunchEnvironment | None:
    if not _in_slurm_step(variables):
        return None
    address, port = _address(variables)
    hosts = (
        variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    )
    if address is None and hosts:
        address = first_host(hosts)
    if port is None and "SLURM_JOB_ID" in variables:
        # One port per job, so that jobs that share a host keep apart; above the range of system services.
        port = 15000 + _integer(variables, "SLURM_JOB_ID") % 10000
    return LaunchEnvironment(
        _integer(variables, "SLURM_PROCID"),
        _integer(variables, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"),
        _integer(variables, "SLURM_LOCALID"),
        _slurm_local_size(variables),
        address,
        port,
        "slurm",
    )


def _slurm_local_size(variables: Mapping[str, str]) -> int | None:
    counts = variables.get("SLURM_STEP_TASKS_PER_NODE")
    if counts is None or "SLURM_NODEID" not in variables:
        return None
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} must be a list such as '2(x3),1'")
        expanded += [int(match[1])] * int(match[2] or 1)
    node = _integer(variables, "SLURM_NODEID")
    if not 0 <= node < len(expanded):
        raise ValueError(f"SLURM_NODEID={node} must be below the {len(expanded)} nodes of {counts!r}")
    return expanded[node]


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "node[3-5,7],gpu1" -> "node3".

    Raises:
        ValueError: the list is empty or its brackets do not match.
    """
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodelist.strip())
    if match is None:
        raise ValueError(f"{nodelist!r} is no SLURM node list such as 'node[3-5,7],gpu1'")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])
